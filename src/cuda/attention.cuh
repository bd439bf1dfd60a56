// Softmax: exponentials, and maxima and sums of rows that lanes share.
#pragma once

// 2^x, to two units of the last place; results below the normal numbers are 0.
BITBLAS_DEVICE float bitblas_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The largest of neighbouring lanes, a power of 2 of them that begin at a multiple; a NaN is passed over.
template <int lanes>
BITBLAS_DEVICE float bitblas_lanes_max(float x) {
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  return x;
}

// … and their sum.
template <int lanes>
BITBLAS_DEVICE float bitblas_lanes_sum(float x) {
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
  return x;
}
