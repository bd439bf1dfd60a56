// Activations to int8, with float32 arithmetic as IEEE says: s = max(largest magnitude of the row, eps) / 127, and a / s to
// nearest, ties to even.
#pragma once

// The larger of what was found and the magnitudes in a word, by their bits, which are ordered as numbers are, infinity and NaN
// above all. Those of 16 bits stand in the upper half; what stands below them does not matter.
BITBLAS_DEVICE unsigned bitblas_larger_f32(unsigned found, unsigned word) {
  unsigned magnitude = word & 0x7FFFFFFFu;
  return magnitude > found ? magnitude : found;
}

BITBLAS_DEVICE unsigned bitblas_larger_f16(unsigned found, unsigned pair) {
  return bitblas_larger_f32(bitblas_larger_f32(found, pair), pair << 16);
}

BITBLAS_DEVICE unsigned bitblas_larger_bf16(unsigned found, unsigned pair) {
  return bitblas_larger_f16(found, pair);
}

// What was found, as the bits of a float32.
BITBLAS_DEVICE unsigned bitblas_found_f32(unsigned found) {
  return found;
}

BITBLAS_DEVICE unsigned bitblas_found_f16(unsigned found) {
  return __float_as_uint(bitblas_low_f16(found >> 16));
}

BITBLAS_DEVICE unsigned bitblas_found_bf16(unsigned found) {
  return found & 0xFFFF0000u;
}

// The largest of a warp.
BITBLAS_DEVICE unsigned bitblas_warp_max(unsigned x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  unsigned y;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
#else
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    unsigned other = __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
    x = other > x ? other : x;
  }
  return x;
#endif
}

// What a row of a small scale, and the scale, are multiplied with, so that no remainder of a division is subnormal.
BITBLAS_DEVICE float bitblas_lift(float scale) {
  return scale < 1e-18f ? 18446744073709551616.0f : 1.0f;
}

// What is known of a row, in shared memory, 32 bits each, `rows` apart: its scale, the inverse of that, and the largest magnitudes
// that warps have found. The scale is NaN where the row has an infinity or a NaN.
BITBLAS_DEVICE void bitblas_scale_row(float* facts, int rows, unsigned largest, unsigned eps) {
  float scale = __fdiv_rn(__uint_as_float(largest > eps ? largest : eps), 127.0f);
  if (largest >= 0x7F800000u) scale = __uint_as_float(0x7FC00000u);
  facts[0] = scale;
  facts[rows] = __frcp_rn(scale * bitblas_lift(scale));
}

#define BITBLAS_SCALE_ROW(type)                                                                                        \
  BITBLAS_DEVICE void bitblas_scale_row_##type(void* facts, int rows, int warps, unsigned eps) {                       \
    unsigned largest = 0;                                                                                              \
    for (int warp = 0; warp < warps; ++warp) {                                                                         \
      unsigned found = static_cast<const unsigned*>(facts)[(2 + warp) * rows];                                         \
      largest = found > largest ? found : largest;                                                                     \
    }                                                                                                                  \
    bitblas_scale_row(static_cast<float*>(facts), rows, bitblas_found_##type(largest), eps);                           \
  }
BITBLAS_SCALE_ROW(f32)
BITBLAS_SCALE_ROW(f16)
BITBLAS_SCALE_ROW(bf16)
#undef BITBLAS_SCALE_ROW

// a / scale to nearest, ties to even, in the lowest byte: magnitudes of at most 127. The quotient is that of an IEEE division:
// inverse is 1 / scale to nearest, the first two lines give one of the two floats beside the quotient, and by a theorem of
// Markstein's the third then gives the nearest. Of a row whose scale is NaN, anything.
BITBLAS_DEVICE unsigned bitblas_whole(float a, float scale, float inverse) {
  float quotient = __fmul_rn(a, inverse);
  quotient = __fmaf_rn(__fmaf_rn(-quotient, scale, a), inverse, quotient);
  quotient = __fmaf_rn(__fmaf_rn(-quotient, scale, a), inverse, quotient);
  return __float_as_uint(__fadd_rn(quotient, 12582912.0f));  // 1.5 * 2^23
}

BITBLAS_DEVICE unsigned bitblas_low_bytes(unsigned first, unsigned second, unsigned third, unsigned fourth) {
  return bitblas_pick_bytes(bitblas_pick_bytes(first, second, 0x0040), bitblas_pick_bytes(third, fourth, 0x0040), 0x5410);
}

// Four activations, in two or four words, to the bytes of a word, with what is known of their row.
BITBLAS_DEVICE unsigned bitblas_quantize_f32(const unsigned* words, const void* facts, int rows) {
  float scale = static_cast<const float*>(facts)[0], inverse = static_cast<const float*>(facts)[rows];
  float lift = bitblas_lift(scale);
  unsigned whole[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    whole[i] = bitblas_whole(__fmul_rn(__uint_as_float(words[i]), lift), __fmul_rn(scale, lift), inverse);
  return bitblas_low_bytes(whole[0], whole[1], whole[2], whole[3]);
}

BITBLAS_DEVICE unsigned bitblas_quantize_bf16(const unsigned* words, const void* facts, int rows) {
  unsigned wide[4] = {words[0] << 16, words[0] & 0xFFFF0000u, words[1] << 16, words[1] & 0xFFFF0000u};
  return bitblas_quantize_f32(wide, facts, rows);
}

// … of which none but 0 is so small that its row would be lifted.
BITBLAS_DEVICE unsigned bitblas_quantize_f16(const unsigned* words, const void* facts, int rows) {
  float scale = static_cast<const float*>(facts)[0], inverse = static_cast<const float*>(facts)[rows];
  return bitblas_low_bytes(bitblas_whole(bitblas_low_f16(words[0]), scale, inverse),
                           bitblas_whole(bitblas_high_f16(words[0]), scale, inverse),
                           bitblas_whole(bitblas_low_f16(words[1]), scale, inverse),
                           bitblas_whole(bitblas_high_f16(words[1]), scale, inverse));
}

BITBLAS_DEVICE void bitblas_store_shared_4(void* to, unsigned word) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(bitblas_shared_address(to)), "r"(word) : "memory");
}

BITBLAS_DEVICE void bitblas_store_shared_8(void* to, unsigned first, unsigned second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};"
               :
               : "r"(bitblas_shared_address(to)), "r"(first), "r"(second)
               : "memory");
}

// Let the lanes of a warp see what others of it have written.
BITBLAS_DEVICE void bitblas_sync_warp() {
  __syncwarp();
}
