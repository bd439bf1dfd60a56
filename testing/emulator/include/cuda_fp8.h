// 8-bit floats, as generated texts use them. Conversions to them saturate (__NV_SATFINITE), as CUDA's constructors do.
#pragma once
#include <cuda_bf16.h>

typedef uint8_t __nv_fp8_storage_t;
typedef uint16_t __nv_fp8x2_storage_t;
typedef uint32_t __nv_fp8x4_storage_t;

#define EMULATOR_FLOAT8(T, TO_FLOAT, ENCODE)                                                                  \
  struct __nv_fp8_##T {                                                                                       \
    __nv_fp8_storage_t __x;                                                                                   \
    __nv_fp8_##T() = default;                                                                                 \
    explicit __nv_fp8_##T(float x) : __x(emulator::ENCODE(x)) {}                                              \
    explicit __nv_fp8_##T(double x) : __x(emulator::ENCODE(x)) {}                                             \
    explicit __nv_fp8_##T(__half x) : __x(emulator::ENCODE(float(x))) {}                                      \
    explicit __nv_fp8_##T(__nv_bfloat16 x) : __x(emulator::ENCODE(float(x))) {}                               \
    explicit __nv_fp8_##T(int x) : __x(emulator::ENCODE(x)) {}                                                \
    explicit __nv_fp8_##T(unsigned x) : __x(emulator::ENCODE(x)) {}                                           \
    explicit __nv_fp8_##T(long x) : __x(emulator::ENCODE(double(x))) {}                                       \
    explicit __nv_fp8_##T(long long x) : __x(emulator::ENCODE(double(x))) {}                                  \
    explicit operator float() const { return emulator::TO_FLOAT(__x); }                                       \
    explicit operator double() const { return emulator::TO_FLOAT(__x); }                                      \
    explicit operator __half() const { return __half(emulator::TO_FLOAT(__x)); }                              \
    explicit operator __nv_bfloat16() const { return __nv_bfloat16(emulator::TO_FLOAT(__x)); }                \
    explicit operator int() const { return emulator::saturate<int>(truncf(emulator::TO_FLOAT(__x))); }        \
    explicit operator bool() const { return (__x & 0x7f) != 0; }                                              \
  };                                                                                                          \
  struct alignas(2) __nv_fp8x2_##T {                                                                          \
    __nv_fp8x2_storage_t __x;                                                                                 \
    __nv_fp8x2_##T() = default;                                                                               \
    explicit __nv_fp8x2_##T(float2 v) : __x(uint16_t(emulator::ENCODE(v.y) << 8 | emulator::ENCODE(v.x))) {}  \
    explicit __nv_fp8x2_##T(__half2 v) : __nv_fp8x2_##T(float2{float(v.x), float(v.y)}) {}                    \
    explicit __nv_fp8x2_##T(__nv_bfloat162 v) : __nv_fp8x2_##T(float2{float(v.x), float(v.y)}) {}             \
    explicit operator float2() const {                                                                        \
      return {emulator::TO_FLOAT(uint8_t(__x)), emulator::TO_FLOAT(uint8_t(__x >> 8))};                       \
    }                                                                                                         \
    explicit operator __half2() const { return __float22half2_rn(float2(*this)); }                            \
    explicit operator __nv_bfloat162() const { return __float22bfloat162_rn(float2(*this)); }                 \
  };                                                                                                          \
  struct alignas(4) __nv_fp8x4_##T {                                                                          \
    __nv_fp8x4_storage_t __x;                                                                                 \
    __nv_fp8x4_##T() = default;                                                                               \
    explicit __nv_fp8x4_##T(float4 v)                                                                         \
        : __x(uint32_t(emulator::ENCODE(v.w)) << 24 | emulator::ENCODE(v.z) << 16 | emulator::ENCODE(v.y) << 8 | \
              emulator::ENCODE(v.x)) {}                                                                       \
    explicit operator float4() const {                                                                        \
      return {emulator::TO_FLOAT(uint8_t(__x)), emulator::TO_FLOAT(uint8_t(__x >> 8)),                        \
              emulator::TO_FLOAT(uint8_t(__x >> 16)), emulator::TO_FLOAT(uint8_t(__x >> 24))};                \
    }                                                                                                         \
  };
EMULATOR_FLOAT8(e4m3, e4m3_to_float, to_e4m3)
EMULATOR_FLOAT8(e5m2, e5m2_to_float, to_e5m2)
EMULATOR_FLOAT8(e8m0, e8m0_to_float, to_e8m0)
#undef EMULATOR_FLOAT8
