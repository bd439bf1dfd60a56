// CUDA's arithmetic on built-in types. Approximate functions (`__expf`, `__fdividef`) are computed exactly rounded or nearly so.
#pragma once
#include <math.h>

#include <emulator/core.h>

#define EMULATOR_MIN_MAX(T)                            \
  constexpr T min(T a, T b) { return b < a ? b : a; }  \
  constexpr T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

namespace emulator {
template <typename To, typename From>
EMULATOR_TINY To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
// To an integer as `cvt` does it: rounded by `round`, out of range clamped, NaN becomes 0.
template <typename To, typename From>
inline To saturate(From value) {
  if (value != value) return 0;
  const To low = To(-1) < To(0) ? To(1ull << (8 * sizeof(To) - 1)) : To(0), high = To(~low);
  if (value <= From(low)) return low;
  if (value >= From(high)) return high;
  return To(value);
}
}  // namespace emulator

inline int __float_as_int(float x) { return emulator::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return emulator::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bit_cast<double>(x); }
inline double __hiloint2double(int high, int low) {
  return emulator::bit_cast<double>((uint64_t)(unsigned)high << 32 | (unsigned)low);
}
inline int __double2hiint(double x) { return int(emulator::bit_cast<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return int(emulator::bit_cast<uint64_t>(x)); }

#define EMULATOR_ROUNDINGS(NAME, TO, FROM, NEAREST, DOWN, UP, ZERO)                  \
  inline TO NAME##_rn(FROM x) { return emulator::saturate<TO>(NEAREST(x)); }         \
  inline TO NAME##_rd(FROM x) { return emulator::saturate<TO>(DOWN(x)); }            \
  inline TO NAME##_ru(FROM x) { return emulator::saturate<TO>(UP(x)); }              \
  inline TO NAME##_rz(FROM x) { return emulator::saturate<TO>(ZERO(x)); }
EMULATOR_ROUNDINGS(__float2int, int, float, rintf, floorf, ceilf, truncf)
EMULATOR_ROUNDINGS(__float2uint, unsigned, float, rintf, floorf, ceilf, truncf)
EMULATOR_ROUNDINGS(__float2ll, long long, float, rintf, floorf, ceilf, truncf)
EMULATOR_ROUNDINGS(__float2ull, unsigned long long, float, rintf, floorf, ceilf, truncf)
EMULATOR_ROUNDINGS(__double2int, int, double, rint, floor, ceil, trunc)
EMULATOR_ROUNDINGS(__double2uint, unsigned, double, rint, floor, ceil, trunc)
EMULATOR_ROUNDINGS(__double2ll, long long, double, rint, floor, ceil, trunc)
#undef EMULATOR_ROUNDINGS
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline double __int2double_rn(int x) { return x; }
inline float __double2float_rn(double x) { return float(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return float(pow(10.0, double(x))); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __tanhf(float x) { return tanhf(x); }
#ifndef __USE_GNU
inline float exp10f(float x) { return __exp10f(x); }
#endif

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __mul24(int a, int b) { return int(unsigned(a << 8 >> 8) * unsigned(b << 8 >> 8)); }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i & 15, byte = unsigned(bytes >> 8 * (choice & 7)) & 255;
    result |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((((uint64_t)high << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

namespace emulator {
template <typename A, typename B>
inline unsigned dot4(unsigned a, unsigned b, unsigned sum) {
  for (int i = 0; i < 32; i += 8) sum += unsigned(int(A(a >> i)) * int(B(b >> i)));
  return sum;
}
// Applies `combine` to each lane of type T in two words.
template <typename T, typename Combine>
inline unsigned by_lane(unsigned a, unsigned b, Combine combine) {
  unsigned result = 0;
  for (unsigned i = 0; i < 32; i += 8 * sizeof(T)) {
    const auto lane = T(combine(T(a >> i), T(b >> i)));
    result |= (unsigned(lane) & (sizeof(T) == 1 ? 0xffu : 0xffffu)) << i;
  }
  return result;
}
}  // namespace emulator

inline int __dp4a(int a, int b, int c) { return int(emulator::dot4<int8_t, int8_t>(a, b, c)); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return emulator::dot4<uint8_t, uint8_t>(a, b, c); }
inline int __dp4a(char4 a, char4 b, int c) {
  return __dp4a(emulator::bit_cast<int>(a), emulator::bit_cast<int>(b), c);
}
inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
  return __dp4a(emulator::bit_cast<unsigned>(a), emulator::bit_cast<unsigned>(b), c);
}
#define EMULATOR_LANES(NAME, T, EXPRESSION) \
  inline unsigned NAME(unsigned x, unsigned y) { return emulator::by_lane<T>(x, y, [](int a, int b) { return EXPRESSION; }); }
EMULATOR_LANES(__vadd2, uint16_t, a + b)
EMULATOR_LANES(__vadd4, uint8_t, a + b)
EMULATOR_LANES(__vsub2, uint16_t, a - b)
EMULATOR_LANES(__vsub4, uint8_t, a - b)
EMULATOR_LANES(__vmaxs2, int16_t, max(a, b))
EMULATOR_LANES(__vmaxs4, int8_t, max(a, b))
EMULATOR_LANES(__vmaxu2, uint16_t, max(a, b))
EMULATOR_LANES(__vmaxu4, uint8_t, max(a, b))
EMULATOR_LANES(__vmins2, int16_t, min(a, b))
EMULATOR_LANES(__vmins4, int8_t, min(a, b))
EMULATOR_LANES(__vminu2, uint16_t, min(a, b))
EMULATOR_LANES(__vminu4, uint8_t, min(a, b))
EMULATOR_LANES(__vcmpeq4, uint8_t, a == b ? 255 : 0)
EMULATOR_LANES(__vcmpgeu4, uint8_t, a >= b ? 255 : 0)
#undef EMULATOR_LANES

#define __builtin_assume(condition) ((void)0)
#undef assert
#define assert(condition) ((condition) ? (void)0 : ::emulator::fail("line %d: assertion failed: %s", __LINE__, #condition))
inline void __trap() { emulator::fail("__trap() was called"); }
inline void __nanosleep(unsigned) { emulator::let_others_run(); }
inline long long clock64() { return 0; }

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
#define EMULATOR_CACHE_HINTS(SUFFIX)           \
  template <typename T>                        \
  inline T __ld##SUFFIX(const T* p) {          \
    return *p;                                 \
  }                                            \
  template <typename T>                        \
  inline void __st##SUFFIX(T* p, const T& v) { \
    *p = v;                                    \
  }
EMULATOR_CACHE_HINTS(ca)
EMULATOR_CACHE_HINTS(cg)
EMULATOR_CACHE_HINTS(cs)
EMULATOR_CACHE_HINTS(lu)
EMULATOR_CACHE_HINTS(cv)
EMULATOR_CACHE_HINTS(wb)
EMULATOR_CACHE_HINTS(wt)
#undef EMULATOR_CACHE_HINTS
