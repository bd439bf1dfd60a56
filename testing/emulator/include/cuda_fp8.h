// 8-bit floats, as generated texts use them. Conversions to them saturate (__NV_SATFINITE), as CUDA's constructors do.
#pragma once
#include <cuda_bf16.h>

#include <type_traits>

typedef uint8_t __nv_fp8_storage_t;
typedef uint16_t __nv_fp8x2_storage_t;
typedef uint32_t __nv_fp8x4_storage_t;

namespace emulator {

template <typename T>
using if_integer = std::enable_if_t<std::is_integral_v<T> && !std::is_same_v<T, bool>, int>;

template <typename Format>
struct Float8 {
  __nv_fp8_storage_t __x;
  Float8() = default;
  explicit Float8(float x) : __x(Format::encode(x)) {}
  explicit Float8(double x) : __x(Format::encode(x)) {}
  explicit Float8(__half x) : Float8(float(x)) {}
  explicit Float8(__nv_bfloat16 x) : Float8(float(x)) {}
  template <typename T, if_integer<T> = 0>
  explicit Float8(T x) : Float8(double(x)) {}
  explicit operator float() const { return Format::decode(__x); }
  explicit operator double() const { return Format::decode(__x); }
  explicit operator __half() const { return __half(Format::decode(__x)); }
  explicit operator __nv_bfloat16() const { return __nv_bfloat16(Format::decode(__x)); }
  explicit operator bool() const { return Format::decode(__x) != 0; }
  template <typename T, if_integer<T> = 0>
  explicit operator T() const {
    return saturate<T>(truncf(Format::decode(__x)));
  }
};

template <typename Format>
struct alignas(2) Float8x2 {
  __nv_fp8x2_storage_t __x;
  Float8x2() = default;
  explicit Float8x2(float2 v) : Float8x2(double2{v.x, v.y}) {}
  explicit Float8x2(double2 v) : __x(uint16_t(Format::encode(v.y) << 8 | Format::encode(v.x))) {}
  explicit Float8x2(__half2 v) : Float8x2(float2{v.x, v.y}) {}
  explicit Float8x2(__nv_bfloat162 v) : Float8x2(float2{v.x, v.y}) {}
  explicit operator float2() const { return {Format::decode(uint8_t(__x)), Format::decode(uint8_t(__x >> 8))}; }
  explicit operator __half2() const { return __float22half2_rn(float2(*this)); }
  explicit operator __nv_bfloat162() const { return __float22bfloat162_rn(float2(*this)); }
};

template <typename Format>
struct alignas(4) Float8x4 {
  __nv_fp8x4_storage_t __x;
  Float8x4() = default;
  explicit Float8x4(float4 v) : Float8x4(double4{v.x, v.y, v.z, v.w}) {}
  explicit Float8x4(double4 v)
      : __x(uint32_t(Format::encode(v.w)) << 24 | uint32_t(Format::encode(v.z)) << 16 | uint32_t(Format::encode(v.y)) << 8 |
            Format::encode(v.x)) {}
  Float8x4(__half2 low, __half2 high) : Float8x4(float4{low.x, low.y, high.x, high.y}) {}
  Float8x4(__nv_bfloat162 low, __nv_bfloat162 high) : Float8x4(float4{low.x, low.y, high.x, high.y}) {}
  explicit operator float4() const {
    return {Format::decode(uint8_t(__x)), Format::decode(uint8_t(__x >> 8)), Format::decode(uint8_t(__x >> 16)),
            Format::decode(uint8_t(__x >> 24))};
  }
};

}  // namespace emulator

using __nv_fp8_e4m3 = emulator::Float8<emulator::E4M3>;
using __nv_fp8x2_e4m3 = emulator::Float8x2<emulator::E4M3>;
using __nv_fp8x4_e4m3 = emulator::Float8x4<emulator::E4M3>;
using __nv_fp8_e5m2 = emulator::Float8<emulator::E5M2>;
using __nv_fp8x2_e5m2 = emulator::Float8x2<emulator::E5M2>;
using __nv_fp8x4_e5m2 = emulator::Float8x4<emulator::E5M2>;
using __nv_fp8_e8m0 = emulator::Float8<emulator::E8M0>;
using __nv_fp8x2_e8m0 = emulator::Float8x2<emulator::E8M0>;
using __nv_fp8x4_e8m0 = emulator::Float8x4<emulator::E8M0>;
