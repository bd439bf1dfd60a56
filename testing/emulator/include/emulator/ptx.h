// What translated inline assembly calls. Registers are variables of the width of their PTX type; `as` and `set` move bits.
#pragma once
#include <emulator/core.h>
#include <emulator/round.h>

namespace emulator {

// ---- instructions of the runtime ------------------------------------------------------------------------------------

enum class Number { f16, bf16, tf32, e4m3, e5m2, s8, u8, s4, u4, f32, s32 };
struct MmaShape {
  int m, n, k;
  Number a, b, accumulator;
  bool saturate;
};
// d = a * b + c over the fragments of 32 lanes, in 32-bit registers as PTX lays them out.
EMULATOR_API void mma(const MmaShape& shape, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c, int line);
EMULATOR_API void ldmatrix(uint32_t address, int matrices, bool transposed, uint32_t* d, int line);
EMULATOR_API void stmatrix(uint32_t address, int matrices, bool transposed, const uint32_t* s, int line);
EMULATOR_API uint32_t movmatrix(uint32_t source, int line);
// Copies later, when waited for. Of `bytes`, those beyond `source_bytes` become zero.
EMULATOR_API void cp_async(uint32_t shared, const void* global, int bytes, int source_bytes, int line);
EMULATOR_API void cp_async_commit();
EMULATOR_API void cp_async_wait(int groups_left);  // -1: also those not committed
EMULATOR_API void bar_arrive(int number, int threads, int line);

namespace ptx {

// ---- registers ------------------------------------------------------------------------------------------------------

template <typename T>
inline constexpr bool is_pointer = false;
template <typename T>
inline constexpr bool is_pointer<T*> = true;

// An operand with an input constraint: the register that nvcc would pass.
template <typename Register, typename T>
EMULATOR_TINY Register in(T value) {
  if constexpr (is_pointer<T>) return Register(uintptr_t(value));
  else return Register(value);
}
// To an operand with an output constraint.
template <typename T, typename Register>
EMULATOR_TINY void out(T& target, Register value) {
  static_assert(sizeof(T) == sizeof(Register), "an operand of another width than its constraint");
  memcpy(&target, &value, sizeof(T));
}
// The low bits of a register as a T, zero-extended where T is wider.
template <typename T, typename Register>
EMULATOR_TINY T as(Register value) {
  T result{};
  memcpy(&result, &value, sizeof(T) < sizeof(Register) ? sizeof(T) : sizeof(Register));
  return result;
}
template <typename Register, typename T>
EMULATOR_TINY void set(Register& target, T value) {
  target = as<Register>(value);
}
EMULATOR_TINY void set(bool& target, bool value) { target = value; }

// ---- memory ---------------------------------------------------------------------------------------------------------

EMULATOR_TINY char* shared(uint64_t address) { return shared_arena() + uint32_t(address); }
EMULATOR_TINY char* global(uint64_t address) { return (char*)address; }

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T item[N];
};
template <typename T, int N>
inline Vector<T, N> load(const char* address, int line) {
  if ((uintptr_t)address % sizeof(Vector<T, N>) != 0)
    fail("line %d: a load of %d bytes at an address that is not a multiple of it", line, int(sizeof(T) * N));
  return *(const Vector<T, N>*)address;
}
template <typename T, int N>
inline void store(char* address, Vector<T, N> value, int line) {
  if ((uintptr_t)address % sizeof(Vector<T, N>) != 0)
    fail("line %d: a store of %d bytes at an address that is not a multiple of it", line, int(sizeof(T) * N));
  *(Vector<T, N>*)address = value;
}
// The fourth operand of cp.async: how many bytes to read, or a predicate that says to read none.
inline int source_bytes(bool ignored, int bytes) { return ignored ? 0 : bytes; }
template <typename Register>
inline int source_bytes(Register given, int) {
  return int(given);
}
// A load of a narrow signed type extends its sign.
template <typename T>
inline auto widened(T value) {
  if constexpr (sizeof(T) < 4 && T(-1) < T(0)) return int64_t(value);
  else return value;
}

// ---- integers -------------------------------------------------------------------------------------------------------

EMULATOR_TINY uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  const auto term = [=](uint32_t i) {  // of the table's bit i, which stands for the bits of i in a, b and c
    return (table >> i & 1 ? ~0u : 0u) & (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  };
  return term(0) | term(1) | term(2) | term(3) | term(4) | term(5) | term(6) | term(7);
}
template <typename T>
inline T shl(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <typename T>
inline T shr(T a, uint32_t n) {  // T signed: arithmetic
  return T(a >> (n >= 8 * sizeof(T) ? 8 * sizeof(T) - 1 : n)) >> (n >= 8 * sizeof(T) ? 1 : 0);
}
template <typename T>
inline T bfe(T a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  const uint32_t bits = 8 * sizeof(T);
  const bool is_signed = T(-1) < T(0);
  uint64_t result = 0;
  const uint32_t last = position + length - 1 < bits - 1 ? position + length - 1 : bits - 1;
  const bool sign = is_signed && length != 0 && (uint64_t(a) >> last & 1);
  for (uint32_t i = 0; i < bits; ++i) {
    const bool bit = i < length && position + i < bits ? uint64_t(a) >> (position + i) & 1 : sign;
    result |= uint64_t(bit) << i;
  }
  return T(result);
}
template <typename T>
inline T bfi(T a, T b, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  for (uint32_t i = 0; i < length && position + i < 8 * sizeof(T); ++i) {
    const T bit = T(1) << (position + i);
    b = a >> i & 1 ? b | bit : b & ~bit;
  }
  return b;
}
template <typename Wide, typename T>
inline Wide mul_wide(T a, T b) {
  return Wide(a) * Wide(b);
}
template <typename A, typename B>
inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  return dot4<A, B>(a, b, c);
}
inline uint64_t pack64(uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; }


// ---- 16-bit floats, one in 16 bits or two in 32 ---------------------------------------------------------------------

// None of these is inlined: each is much code, and texts have many.
template <typename Format, typename Bits, typename Function>
inline Bits by_half(Bits a, Bits b, Bits c, Function function) {
  Bits result = 0;
  for (unsigned i = 0; i < 8 * sizeof(Bits); i += 16)
    result |= Bits(Format::encode(function(double(Format::decode(uint16_t(a >> i))), double(Format::decode(uint16_t(b >> i))),
                                           double(Format::decode(uint16_t(c >> i)))))) << i;
  return result;
}
template <typename Format, typename Bits>
__noinline__ Bits half_fma(Bits a, Bits b, Bits c) {
  return by_half<Format>(a, b, c, [](double x, double y, double z) { return fma_to_odd(x, y, z); });
}
template <typename Format, typename Bits>
__noinline__ Bits half_add(Bits a, Bits b) {
  return by_half<Format>(a, b, b, [](double x, double y, double) { return fma_to_odd(x, 1.0, y); });
}
template <typename Format, typename Bits>
__noinline__ Bits half_sub(Bits a, Bits b) {
  return by_half<Format>(a, b, b, [](double x, double y, double) { return fma_to_odd(x, 1.0, -y); });
}
template <typename Format, typename Bits>
__noinline__ Bits half_mul(Bits a, Bits b) {
  return by_half<Format>(a, b, b, [](double x, double y, double) { return x * y; });
}
template <typename Format, typename Bits>
__noinline__ Bits half_max(Bits a, Bits b) {
  return by_half<Format>(a, b, b, [](double x, double y, double) { return fmax(x, y); });
}
template <typename Format, typename Bits>
__noinline__ Bits half_min(Bits a, Bits b) {
  return by_half<Format>(a, b, b, [](double x, double y, double) { return fmin(x, y); });
}
inline uint32_t pair(uint16_t low, uint16_t high) { return uint32_t(high) << 16 | low; }

}  // namespace ptx
}  // namespace emulator
