// What half and bfloat16 have in common. `EMULATOR_FLOAT16(T, T2, ...)` defines a type and its pair with their operators; every
// operation is rounded once: sums and products of 16-bit floats in float are exact enough that a second rounding is harmless,
// fused products are rounded to odd first.
#pragma once
#include <emulator/atomics.h>
#include <emulator/round.h>

#define EMULATOR_FLOAT16_INTEGER(T, TO16, I)                                                                          \
  T(I x) : __x(emulator::TO16(double(x))) {}                                                                          \
  operator I() const { return emulator::saturate<I>(truncf(float(*this))); }

struct __half;
struct __nv_bfloat16;

#define EMULATOR_FLOAT16(T, T2, OTHER, TO_FLOAT, FROM_FLOAT, FROM_DOUBLE)                                             \
  struct alignas(2) T {                                                                                               \
    uint16_t __x;                                                                                                     \
    T() = default;                                                                                                    \
    T(float x) : __x(emulator::FROM_FLOAT(x)) {}                                                                      \
    T(double x) : __x(emulator::FROM_DOUBLE(x)) {}                                                                    \
    explicit T(OTHER x);                                                                                              \
    operator float() const { return emulator::TO_FLOAT(__x); }                                                        \
    operator bool() const { return (__x & 0x7fff) != 0; }                                                             \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, short)                                                                   \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, unsigned short)                                                          \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, int)                                                                     \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, unsigned)                                                                \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, long)                                                                    \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, unsigned long)                                                           \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, long long)                                                               \
    EMULATOR_FLOAT16_INTEGER(T, FROM_DOUBLE, unsigned long long)                                                      \
    operator signed char() const { return emulator::saturate<signed char>(truncf(float(*this))); }                    \
    operator unsigned char() const { return emulator::saturate<unsigned char>(truncf(float(*this))); }                \
    operator char() const { return emulator::saturate<char>(truncf(float(*this))); }                                  \
    static T of(uint16_t bits) { return emulator::bit_cast<T>(bits); }                                                \
  };                                                                                                                  \
  struct alignas(4) T2 {                                                                                              \
    T x, y;                                                                                                           \
    T2() = default;                                                                                                   \
    T2(T x_, T y_) : x(x_), y(y_) {}                                                                                  \
  };                                                                                                                  \
  inline T __hadd(T a, T b) { return T(float(a) + float(b)); }                                                        \
  inline T __hsub(T a, T b) { return T(float(a) - float(b)); }                                                        \
  inline T __hmul(T a, T b) { return T(float(a) * float(b)); }                                                        \
  inline T __hdiv(T a, T b) { return T(float(a) / float(b)); }                                                        \
  inline T __hfma(T a, T b, T c) {                                                                                    \
    return T::of(emulator::FROM_DOUBLE(emulator::fma_to_odd(float(a), float(b), float(c))));                          \
  }                                                                                                                   \
  inline T __hadd_rn(T a, T b) { return __hadd(a, b); }                                                               \
  inline T __hsub_rn(T a, T b) { return __hsub(a, b); }                                                               \
  inline T __hmul_rn(T a, T b) { return __hmul(a, b); }                                                               \
  inline T __hneg(T a) { return T::of(uint16_t(a.__x ^ 0x8000)); }                                                    \
  inline T __habs(T a) { return T::of(uint16_t(a.__x & 0x7fff)); }                                                    \
  inline bool __hisnan(T a) { return float(a) != float(a); }                                                          \
  inline int __hisinf(T a) {                                                                                          \
    return float(a) == __builtin_huge_valf() ? 1 : float(a) == -__builtin_huge_valf() ? -1 : 0;                       \
  }                                                                                                                   \
  inline bool __heq(T a, T b) { return float(a) == float(b); }                                                        \
  inline bool __hne(T a, T b) { return float(a) < float(b) || float(a) > float(b); }                                  \
  inline bool __hlt(T a, T b) { return float(a) < float(b); }                                                         \
  inline bool __hle(T a, T b) { return float(a) <= float(b); }                                                        \
  inline bool __hgt(T a, T b) { return float(a) > float(b); }                                                         \
  inline bool __hge(T a, T b) { return float(a) >= float(b); }                                                        \
  inline T __hmax(T a, T b) {                                                                                         \
    if (__hisnan(a) || __hisnan(b)) return __hisnan(a) ? (__hisnan(b) ? T::of(0x7fff) : b) : a;                       \
    return float(a) == float(b) ? (a.__x & 0x8000 ? b : a) : __hgt(a, b) ? a : b;                                     \
  }                                                                                                                   \
  inline T __hmin(T a, T b) {                                                                                         \
    if (__hisnan(a) || __hisnan(b)) return __hisnan(a) ? (__hisnan(b) ? T::of(0x7fff) : b) : a;                       \
    return float(a) == float(b) ? (a.__x & 0x8000 ? a : b) : __hlt(a, b) ? a : b;                                     \
  }                                                                                                                   \
  inline T operator+(T a, T b) { return __hadd(a, b); }                                                               \
  inline T operator-(T a, T b) { return __hsub(a, b); }                                                               \
  inline T operator*(T a, T b) { return __hmul(a, b); }                                                               \
  inline T operator/(T a, T b) { return __hdiv(a, b); }                                                               \
  inline T& operator+=(T& a, T b) { return a = __hadd(a, b); }                                                        \
  inline T& operator-=(T& a, T b) { return a = __hsub(a, b); }                                                        \
  inline T& operator*=(T& a, T b) { return a = __hmul(a, b); }                                                        \
  inline T& operator/=(T& a, T b) { return a = __hdiv(a, b); }                                                        \
  inline T operator-(T a) { return __hneg(a); }                                                                       \
  inline T operator+(T a) { return a; }                                                                               \
  inline bool operator==(T a, T b) { return __heq(a, b); }                                                            \
  inline bool operator!=(T a, T b) { return float(a) != float(b); }                                                   \
  inline bool operator<(T a, T b) { return __hlt(a, b); }                                                             \
  inline bool operator<=(T a, T b) { return __hle(a, b); }                                                            \
  inline bool operator>(T a, T b) { return __hgt(a, b); }                                                             \
  inline bool operator>=(T a, T b) { return __hge(a, b); }                                                            \
  inline T2 __hadd2(T2 a, T2 b) { return T2(__hadd(a.x, b.x), __hadd(a.y, b.y)); }                                    \
  inline T2 __hsub2(T2 a, T2 b) { return T2(__hsub(a.x, b.x), __hsub(a.y, b.y)); }                                    \
  inline T2 __hmul2(T2 a, T2 b) { return T2(__hmul(a.x, b.x), __hmul(a.y, b.y)); }                                    \
  inline T2 __h2div(T2 a, T2 b) { return T2(__hdiv(a.x, b.x), __hdiv(a.y, b.y)); }                                    \
  inline T2 __hfma2(T2 a, T2 b, T2 c) { return T2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }                    \
  inline T2 __hadd2_rn(T2 a, T2 b) { return __hadd2(a, b); }                                                          \
  inline T2 __hsub2_rn(T2 a, T2 b) { return __hsub2(a, b); }                                                          \
  inline T2 __hmul2_rn(T2 a, T2 b) { return __hmul2(a, b); }                                                          \
  inline T2 __hmax2(T2 a, T2 b) { return T2(__hmax(a.x, b.x), __hmax(a.y, b.y)); }                                    \
  inline T2 __hmin2(T2 a, T2 b) { return T2(__hmin(a.x, b.x), __hmin(a.y, b.y)); }                                    \
  inline T2 __hneg2(T2 a) { return T2(__hneg(a.x), __hneg(a.y)); }                                                    \
  inline T2 __habs2(T2 a) { return T2(__habs(a.x), __habs(a.y)); }                                                    \
  inline T2 operator+(T2 a, T2 b) { return __hadd2(a, b); }                                                           \
  inline T2 operator-(T2 a, T2 b) { return __hsub2(a, b); }                                                           \
  inline T2 operator*(T2 a, T2 b) { return __hmul2(a, b); }                                                           \
  inline T2 operator/(T2 a, T2 b) { return __h2div(a, b); }                                                           \
  inline T2 operator-(T2 a) { return __hneg2(a); }                                                                    \
  inline T2& operator+=(T2& a, T2 b) { return a = __hadd2(a, b); }                                                    \
  inline T2& operator-=(T2& a, T2 b) { return a = __hsub2(a, b); }                                                    \
  inline T2& operator*=(T2& a, T2 b) { return a = __hmul2(a, b); }                                                    \
  inline T hexp(T x) { return T(exp(double(x))); }                                                                    \
  inline T hexp2(T x) { return T(exp2(double(x))); }                                                                  \
  inline T hlog(T x) { return T(log(double(x))); }                                                                    \
  inline T hlog2(T x) { return T(log2(double(x))); }                                                                  \
  inline T hlog10(T x) { return T(log10(double(x))); }                                                                \
  inline T hsqrt(T x) { return T(sqrtf(float(x))); }                                                                  \
  inline T hrsqrt(T x) { return T(1.0 / sqrt(double(x))); }                                                           \
  inline T hrcp(T x) { return T(1.0f / float(x)); }                                                                   \
  inline T hsin(T x) { return T(sin(double(x))); }                                                                    \
  inline T hcos(T x) { return T(cos(double(x))); }                                                                    \
  inline T htanh(T x) { return T(tanh(double(x))); }                                                                  \
  inline T hfloor(T x) { return T(floorf(float(x))); }                                                                \
  inline T hceil(T x) { return T(ceilf(float(x))); }                                                                  \
  inline T htrunc(T x) { return T(truncf(float(x))); }                                                                \
  inline T hrint(T x) { return T(rintf(float(x))); }                                                                  \
  EMULATOR_PLAIN inline T atomicAdd(T* p, T value) {                                                                  \
    emulator::touch(p, sizeof(T), emulator::Access::atomic);                                                          \
    const T old = *p;                                                                                                 \
    *p = __hadd(old, value);                                                                                          \
    return old;                                                                                                       \
  }                                                                                                                   \
  EMULATOR_PLAIN inline T2 atomicAdd(T2* p, T2 value) {                                                               \
    emulator::touch(p, sizeof(T2), emulator::Access::atomic);                                                         \
    const T2 old = *p;                                                                                                \
    *p = __hadd2(old, value);                                                                                         \
    return old;                                                                                                       \
  }
