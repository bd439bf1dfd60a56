// Correctly rounded conversions to 16-bit floats, on bits. NaN becomes 0x7fff, as in PTX.
#pragma once
#include <emulator/math.h>

namespace emulator {

inline float half_to_float(uint16_t bits) { return float(bit_cast<_Float16>(bits)); }
inline uint16_t float_to_half(float x) { return x != x ? 0x7fff : bit_cast<uint16_t>(_Float16(x)); }
inline float bfloat_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }
inline uint16_t float_to_bfloat(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bit_cast<uint32_t>(x);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// To float rounding to odd: a second rounding, to 22 bits or fewer, is then that of the exact value.
inline float to_odd(double x) {
  float y = float(x);
  if (double(y) == x || x != x) return y;
  uint32_t bits = bit_cast<uint32_t>(y);
  if (fabs(double(y)) > fabs(x)) --bits;  // towards zero; infinity becomes the greatest float
  return bit_cast<float>(bits | 1u);
}
// a * b + c rounded to odd, for factors of 24 bits or fewer, whose product a double holds.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!(fabs(sum) < __builtin_huge_val())) return sum;
  const double virtual_c = sum - product;
  const double error = (product - (sum - virtual_c)) + (c - virtual_c);
  uint64_t bits = bit_cast<uint64_t>(sum);
  if (error == 0.0 || (bits & 1u)) return sum;
  bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
  return bit_cast<double>(bits);
}
inline uint16_t double_to_half(double x) { return float_to_half(to_odd(x)); }
inline uint16_t double_to_bfloat(double x) { return float_to_bfloat(to_odd(x)); }

inline float e4m3_to_float(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return __builtin_nanf("");
  const float size = exponent == 0 ? ldexpf(float(mantissa), -9) : ldexpf(float(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -size : size;
}
inline float e5m2_to_float(uint8_t bits) { return half_to_float(uint16_t(bits << 8)); }
// To a float of 8 bits with `mantissa` bits of mantissa, at most `greatest`; NaN becomes 0x7f.
inline uint8_t to_float8(double x, int mantissa, int least_exponent, uint8_t greatest) {
  if (x != x) return 0x7f;
  const uint8_t sign = __builtin_signbit(x) ? 0x80 : 0;
  if (fabs(x) >= 65536.0) return sign | greatest;
  const int own = x == 0.0 ? least_exponent : ilogb(x), exponent = own < least_exponent ? least_exponent : own;
  const int steps = int(rint(ldexp(fabs(x), mantissa - exponent)));
  const int code = steps + ((exponent - least_exponent) << mantissa);
  return sign | uint8_t(code > greatest ? greatest : code);
}
inline uint8_t to_e4m3(double x) { return to_float8(x, 3, -6, 0x7e); }
inline uint8_t to_e5m2(double x) { return to_float8(x, 2, -14, 0x7b); }
// Powers of two, 2^-127 to 2^127; 0xff is NaN. Of what lies between, the greater.
inline float e8m0_to_float(uint8_t bits) { return bits == 0xff ? __builtin_nanf("") : ldexpf(1.0f, int(bits) - 127); }
inline uint8_t to_e8m0(double x) {
  if (x != x) return 0xff;
  if (fabs(x) < ldexp(1.0, -127)) return 0;
  const int power = ilogb(x) + (ldexp(1.0, ilogb(x)) < fabs(x) ? 1 : 0);
  return uint8_t(power > 127 ? 254 : power + 127);
}

struct E4M3 {
  static float decode(uint8_t bits) { return e4m3_to_float(bits); }
  static uint8_t encode(double x) { return to_e4m3(x); }
};
struct E5M2 {
  static float decode(uint8_t bits) { return e5m2_to_float(bits); }
  static uint8_t encode(double x) { return to_e5m2(x); }
};
struct E8M0 {
  static float decode(uint8_t bits) { return e8m0_to_float(bits); }
  static uint8_t encode(double x) { return to_e8m0(x); }
};

// The 16-bit floats, as the template argument of what works on both.
struct F16 {
  static float decode(uint16_t bits) { return half_to_float(bits); }
  static uint16_t encode(double x) { return double_to_half(x); }
};
struct BF16 {
  static float decode(uint16_t bits) { return bfloat_to_float(bits); }
  static uint16_t encode(double x) { return double_to_bfloat(x); }
};

}  // namespace emulator
