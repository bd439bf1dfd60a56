// Arithmetic on 32-bit registers that hold two 16-bit floats, or four bytes. No includes, so that NVRTC takes it as well.
#pragma once

#define BITBLAS_DEVICE static __device__ __forceinline__

// (x & mask) | bits, in one instruction.
BITBLAS_DEVICE unsigned bitblas_and_or(unsigned x, unsigned mask, unsigned bits) {
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// Bytes of the eight in low and high, by the nibbles of the selector.
BITBLAS_DEVICE unsigned bitblas_pick_bytes(unsigned low, unsigned high, unsigned selector) {
  unsigned y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(selector));
  return y;
}

BITBLAS_DEVICE unsigned bitblas_sub_f16(unsigned x, unsigned y) {
  unsigned z;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// x * y + z, rounded once.
BITBLAS_DEVICE unsigned bitblas_fma_f16(unsigned x, unsigned y, unsigned z) {
  unsigned w;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(w) : "r"(x), "r"(y), "r"(z));
  return w;
}

// As above, of bfloat16: capability 8.0 and later.
BITBLAS_DEVICE unsigned bitblas_fma_bf16(unsigned x, unsigned y, unsigned z) {
  unsigned w = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(w) : "r"(x), "r"(y), "r"(z));
#endif
  return w;
}

// Two floats to bfloat16, the first in the lower half.
BITBLAS_DEVICE unsigned bitblas_pack_bf16(float low, float high) {
  unsigned w = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#endif
  return w;
}

// Two floats to float16, the first in the lower half.
BITBLAS_DEVICE unsigned bitblas_pack_f16(float low, float high) {
  unsigned w;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
#else
  asm("{ .reg .b16 first, second; cvt.rn.f16.f32 first, %1; cvt.rn.f16.f32 second, %2; mov.b32 %0, {first, second}; }"
      : "=r"(w)
      : "f"(low), "f"(high));
#endif
  return w;
}

BITBLAS_DEVICE float bitblas_float_of_bits(unsigned bits) {
  float x;
  asm("mov.b32 %0, %1;" : "=f"(x) : "r"(bits));
  return x;
}

// Both halves to float32, exactly.
BITBLAS_DEVICE float bitblas_low_f16(unsigned x) {
  float y;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(y) : "r"(x));
  return y;
}

BITBLAS_DEVICE float bitblas_high_f16(unsigned x) {
  return bitblas_low_f16(x >> 16);
}

// Two integers 0..255, in halves of the register, less an offset, to bfloat16: by way of float32, since 128 + 255 has too many
// bits for the trick that is used for fewer.
BITBLAS_DEVICE unsigned bitblas_bytes_to_bf16(unsigned pair, float offset) {
  float low = bitblas_float_of_bits(0x4B000000u | (pair & 255u)) - 8388608.0f;
  float high = bitblas_float_of_bits(0x4B000000u | (pair >> 16)) - 8388608.0f;
  return bitblas_pack_bf16(low - offset, high - offset);
}

BITBLAS_DEVICE unsigned bitblas_f16_to_bf16(unsigned pair) {
  return bitblas_pack_bf16(bitblas_low_f16(pair), bitblas_high_f16(pair));
}

// Each byte of x, at most 127, less that of y, at most 128 more than it: two's complement.
BITBLAS_DEVICE unsigned bitblas_sub_bytes(unsigned x, unsigned y) {
  return ((x | 0x80808080u) - y) ^ 0x80808080u;
}

// Pairs of float8_e4m3 in the lower bytes of the halves (nothing else there) to float16. The exponent's bias is 8 less there.
BITBLAS_DEVICE unsigned bitblas_e4m3_to_f16(unsigned pair) {
  unsigned magnitude = pair & 0x007F007Fu;
  unsigned value = bitblas_fma_f16(bitblas_and_or(pair << 8, 0x80008000u, magnitude << 7), 0x5C005C00u, 0x80008000u);
  return value | (((magnitude + 0x00010001u) & 0x00800080u) * 0xFCu);  // 0x7F is a NaN
}

BITBLAS_DEVICE unsigned bitblas_e4m3_to_bf16(unsigned pair) {
  return bitblas_f16_to_bf16(bitblas_e4m3_to_f16(pair));
}

// Pairs of float8_e5m2 in the lower bytes of the halves: the upper byte of a float16.
BITBLAS_DEVICE unsigned bitblas_e5m2_to_f16(unsigned pair) {
  return pair << 8;
}

BITBLAS_DEVICE unsigned bitblas_e5m2_to_bf16(unsigned pair) {
  return bitblas_f16_to_bf16(pair << 8);
}

// Pairs of int8 in the lower bytes of the halves.
BITBLAS_DEVICE unsigned bitblas_s8_to_f16(unsigned pair) {
  return bitblas_sub_f16((pair ^ 0x00800080u) | 0x64006400u, 0x64806480u);
}

BITBLAS_DEVICE unsigned bitblas_s8_to_bf16(unsigned pair) {
  return bitblas_bytes_to_bf16(pair ^ 0x00800080u, 128.0f);
}

// Pairs of fp4_e2m1 in the lowest bits of the halves (anything above) to float16, whose bias is 14 more.
BITBLAS_DEVICE unsigned bitblas_e2m1_to_f16(unsigned pair) {
  unsigned bits = bitblas_and_or(pair << 12, 0x80008000u, (pair << 9) & 0x0E000E00u);
  return bitblas_fma_f16(bits, 0x74007400u, 0x80008000u);
}

// … to bfloat16, whose bias is 126 more.
BITBLAS_DEVICE unsigned bitblas_e2m1_to_bf16(unsigned pair) {
  unsigned bits = bitblas_and_or(pair << 12, 0x80008000u, (pair << 6) & 0x01C001C0u);
  return bitblas_fma_bf16(bits, 0x7E807E80u, 0x80008000u);
}

// Look up the eight 4-bit codes of a word, as the layout "mma16" has them, in a table of sixteen 16-bit values, whose lower
// bytes stand in table[0..3] and upper bytes in table[4..7]: out[0..3], pairs of values.
BITBLAS_DEVICE void bitblas_look_up(unsigned* out, unsigned word, const unsigned* table) {
  unsigned low_bits = word & 0x77777777u, half = bitblas_and_or(word >> 1, 0x44444444u, 0x32103210u);
  unsigned interleaved[4];
#pragma unroll
  for (int element = 0; element < 2; ++element) {  // of the pairs
    unsigned bytes[2];
#pragma unroll
    for (int byte = 0; byte < 2; ++byte) {
      const unsigned* part = table + 4 * byte;
      unsigned first = bitblas_pick_bytes(part[0], part[1], low_bits);
      unsigned second = bitblas_pick_bytes(part[2], part[3], low_bits);
      bytes[byte] = bitblas_pick_bytes(first, second, half);
    }
    interleaved[element] = bitblas_pick_bytes(bytes[0], bytes[1], 0x5140);
    interleaved[element + 2] = bitblas_pick_bytes(bytes[0], bytes[1], 0x7362);
    low_bits >>= 16;
    half >>= 16;
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    out[2 * pair] = bitblas_pick_bytes(interleaved[2 * pair], interleaved[2 * pair + 1], 0x5410);
    out[2 * pair + 1] = bitblas_pick_bytes(interleaved[2 * pair], interleaved[2 * pair + 1], 0x7632);
  }
}

// Four bytes in a row of A to two registers of pairs: float16 or bfloat16.
#define BITBLAS_WIDEN(name, type)                                                   \
  BITBLAS_DEVICE void bitblas_widen_##name##_##type(unsigned* out, unsigned bytes) { \
    out[0] = bitblas_##name##_to_##type(bitblas_pick_bytes(bytes, 0, 0x4140));       \
    out[1] = bitblas_##name##_to_##type(bitblas_pick_bytes(bytes, 0, 0x4342));       \
  }
BITBLAS_WIDEN(s8, f16)
BITBLAS_WIDEN(e4m3, f16)
BITBLAS_WIDEN(e5m2, f16)
#undef BITBLAS_WIDEN

// Whether x is not 0 in any thread of the warp.
BITBLAS_DEVICE int bitblas_any(int x) {
  return __any_sync(0xFFFFFFFFu, x);
}
