// Products of tensor cores: 16 rows of weights by 8 rows of activations. weights: 4 registers, activations: 2, sums: 4, whose
// columns are rows of activations. Before capability 8.0 by way of the smaller ones there.
#pragma once

// 16 k of float16, sums float32.
BITBLAS_DEVICE void bitblas_mma_f16(float* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(weights[2 * half]), "r"(weights[2 * half + 1]), "r"(half ? second : first));
#endif
}

// 16 k of bfloat16, sums float32: capability 8.0 and later.
BITBLAS_DEVICE void bitblas_mma_bf16(float* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#endif
}

// 32 k of bytes, sums int32: weights and activations signed.
BITBLAS_DEVICE void bitblas_mma_s8(int* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#else
#pragma unroll
  for (int part = 0; part < 4; ++part)
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(sums[2 * (part % 2)]), "+r"(sums[2 * (part % 2) + 1])
                 : "r"(weights[part]), "r"(part / 2 ? second : first));
#endif
}

// … weights unsigned.
BITBLAS_DEVICE void bitblas_mma_u8(int* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#else
#pragma unroll
  for (int part = 0; part < 4; ++part)
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(sums[2 * (part % 2)]), "+r"(sums[2 * (part % 2) + 1])
                 : "r"(weights[part]), "r"(part / 2 ? second : first));
#endif
}

// 32 k of float8, weights e4m3 and activations e4m3, sums float32, or rather fewer bits of it: capability 8.9 and later.
BITBLAS_DEVICE void bitblas_mma_e4m3_e4m3(float* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#endif
}

// … weights e4m3 and activations e5m2.
BITBLAS_DEVICE void bitblas_mma_e4m3_e5m2(float* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#endif
}

// … weights e5m2 and activations e4m3.
BITBLAS_DEVICE void bitblas_mma_e5m2_e4m3(float* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#endif
}

// … weights e5m2 and activations e5m2.
BITBLAS_DEVICE void bitblas_mma_e5m2_e5m2(float* sums, const unsigned* weights, unsigned first, unsigned second) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first), "r"(second));
#endif
}
