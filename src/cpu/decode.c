/* How fast weights can be decoded and multiplied with one row of activations, measured with the weights in registers: what a
 * kernel at M=1 could reach if memory cost nothing. Built beside peak.c by `bitblas.bench`; no part of an operator.
 *
 * As in the kernels, sixteen outputs (eight with AVX2) stand in the lanes, a 32-bit word holds consecutive k of one lane, and
 * each activation is broadcast from a vector that stays in the L1 cache. A step decodes whole words, which the empty assembly
 * makes unknown to the compiler, so that nothing is computed ahead of the loop. */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

enum { SUMS = 8, A_STEPS = 16, A_STEP = 32 }; /* independent sums; activations: 16 · 32 floats, 2 KB */

#define UNROLL _Pragma("GCC unroll 64")
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#define INLINE(features) __attribute__((target(features), always_inline)) static inline
#define LOOP(features) __attribute__((target(features), noinline)) static

/* The words of a step: a macro, since their number is part of a loop's code. */
#define OPAQUE_ALL(words)                                                    \
  UNROLL for (unsigned word = 0; word < sizeof(words) / sizeof(*words); ++word) OPAQUE(words[word])

#define V512 "avx512f,avx512bw"

INLINE(V512) __m512i shifted_512(__m512i word, int by) { /* to the right; to the left where `by` is negative */
  return by > 0 ? _mm512_srli_epi32(word, by) : by < 0 ? _mm512_slli_epi32(word, -by) : word;
}

INLINE(V512) __m512i select_512(__m512i mask, __m512i low, __m512i high) { /* mask ? low : high, in one instruction */
  return _mm512_ternarylogic_epi32(low, high, mask, 0xE4);
}

INLINE(V512) void multiply_512(__m512 sums[SUMS], int k, const float* a, __m512 weight) {
  sums[k % SUMS] = _mm512_fmadd_ps(weight, _mm512_set1_ps(a[k]), sums[k % SUMS]);
}

INLINE(V512) void keep_512(__m512 sums[SUMS]) {
  UNROLL for (int i = 0; i < SUMS; ++i) OPAQUE(sums[i]);
}

#define SUMS_512                                             \
  __m512 sums[SUMS];                                         \
  UNROLL for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_setzero_ps()

/* 1, 2 and 4 bits: a shift and a lookup, which looks at the lowest four bits alone. */
#define TABLE_512(bits)                                                                             \
  LOOP(V512) void table##bits##_512(int64_t steps, const float* a) {                                \
    SUMS_512;                                                                                       \
    __m512i words[1] = {_mm512_set1_epi32(0x12345678)};                                             \
    __m512 table = _mm512_set1_ps(0.5f);                                                            \
    OPAQUE(table);                                                                                  \
    for (int64_t i = 0; i < steps; ++i) {                                                           \
      const float* part = a + (i % A_STEPS) * A_STEP;                                               \
      OPAQUE_ALL(words);                                                                            \
      UNROLL for (int k = 0; k < 32 / bits; ++k)                                                    \
        multiply_512(sums, k, part, _mm512_permutexvar_ps(shifted_512(words[0], bits * k), table)); \
    }                                                                                               \
    keep_512(sums);                                                                                 \
  }
TABLE_512(1)
TABLE_512(2)
TABLE_512(4)

/* 3 bits in planes of 2 and 1: two shifts, one selection, a lookup. */
LOOP(V512) void planes3_512(int64_t steps, const float* a) {
  SUMS_512;
  __m512i words[3] = {_mm512_set1_epi32(0x12345678), _mm512_set1_epi32(0x3456789a), _mm512_set1_epi32(0x56789abc)};
  __m512i mask = _mm512_set1_epi32(3);
  __m512 table = _mm512_set1_ps(0.5f);
  OPAQUE(mask); OPAQUE(table);
  for (int64_t i = 0; i < steps; ++i) {
    const float* part = a + (i % A_STEPS) * A_STEP;
    OPAQUE_ALL(words);
    UNROLL for (int k = 0; k < 32; ++k) {
      __m512i low = shifted_512(words[k / 16], k % 16 * 2), high = shifted_512(words[2], k - 2);
      multiply_512(sums, k, part, _mm512_permutexvar_ps(select_512(mask, low, high), table));
    }
  }
  keep_512(sums);
}

/* 5 bits in planes of 4 and 1: the same, and a lookup among 32. */
LOOP(V512) void planes5_512(int64_t steps, const float* a) {
  SUMS_512;
  __m512i words[5];
  UNROLL for (int i = 0; i < 5; ++i) words[i] = _mm512_set1_epi32(0x12345678 + i);
  __m512i mask = _mm512_set1_epi32(15);
  __m512 lower = _mm512_set1_ps(0.5f), upper = _mm512_set1_ps(0.25f);
  OPAQUE(mask); OPAQUE(lower); OPAQUE(upper);
  for (int64_t i = 0; i < steps; ++i) {
    const float* part = a + (i % A_STEPS) * A_STEP;
    OPAQUE_ALL(words);
    UNROLL for (int k = 0; k < 32; ++k) {
      __m512i low = shifted_512(words[k / 8], k % 8 * 4), high = shifted_512(words[4], k - 4);
      multiply_512(sums, k, part, _mm512_permutex2var_ps(lower, select_512(mask, low, high), upper));
    }
  }
  keep_512(sums);
}

/* 6 bits in planes of 4 and 2: two shifts, a selection, a mask, a conversion. */
LOOP(V512) void planes6_512(int64_t steps, const float* a) {
  SUMS_512;
  __m512i words[3] = {_mm512_set1_epi32(0x12345678), _mm512_set1_epi32(0x3456789a), _mm512_set1_epi32(0x56789abc)};
  __m512i mask = _mm512_set1_epi32(15), all = _mm512_set1_epi32(63);
  OPAQUE(mask); OPAQUE(all);
  for (int64_t i = 0; i < steps; ++i) {
    const float* part = a + (i % A_STEPS) * A_STEP;
    OPAQUE_ALL(words);
    UNROLL for (int k = 0; k < 16; ++k) {
      __m512i low = shifted_512(words[k / 8], k % 8 * 4), high = shifted_512(words[2], k * 2 - 4);
      __m512i code = _mm512_and_si512(select_512(mask, low, high), all);
      multiply_512(sums, k, part, _mm512_cvtepi32_ps(code));
    }
  }
  keep_512(sums);
}

/* 7 bits in planes of 4, 2 and 1: three shifts, two selections, a mask, a conversion. */
LOOP(V512) void planes7_512(int64_t steps, const float* a) {
  SUMS_512;
  __m512i words[7];
  UNROLL for (int i = 0; i < 7; ++i) words[i] = _mm512_set1_epi32(0x12345678 + i);
  __m512i mask = _mm512_set1_epi32(15), more = _mm512_set1_epi32(63), all = _mm512_set1_epi32(127);
  OPAQUE(mask); OPAQUE(more); OPAQUE(all);
  for (int64_t i = 0; i < steps; ++i) {
    const float* part = a + (i % A_STEPS) * A_STEP;
    OPAQUE_ALL(words);
    UNROLL for (int k = 0; k < 32; ++k) {
      __m512i low = shifted_512(words[k / 8], k % 8 * 4), middle = shifted_512(words[4 + k / 16], k % 16 * 2 - 4);
      __m512i code = select_512(more, select_512(mask, low, middle), shifted_512(words[6], k - 6));
      multiply_512(sums, k, part, _mm512_cvtepi32_ps(_mm512_and_si512(code, all)));
    }
  }
  keep_512(sums);
}

/* 8 bits, sixteen bytes at a time; `WEIGHT(bytes)` makes floats of them. */
#define BYTES_512(name)                                                                    \
  LOOP(V512 ",avx512vl") void name##_512(int64_t steps, const float* a) {                  \
    SUMS_512;                                                                              \
    __m128i words[8];                                                                      \
    UNROLL for (int i = 0; i < 8; ++i) words[i] = _mm_set1_epi32(0x12345678 + i);          \
    __m256i mask = _mm256_set1_epi16((short)0xBFFF);                                       \
    OPAQUE(mask);                                                                          \
    for (int64_t i = 0; i < steps; ++i) {                                                  \
      const float* part = a + (i % A_STEPS) * A_STEP;                                      \
      OPAQUE_ALL(words);                                                                   \
      UNROLL for (int k = 0; k < 8; ++k) multiply_512(sums, k, part, WEIGHT(words[k], mask)); \
    }                                                                                      \
    keep_512(sums);                                                                        \
  }
#define WEIGHT(bytes, mask) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
BYTES_512(uint8)
#undef WEIGHT
#define WEIGHT(bytes, mask) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
BYTES_512(int8)
#undef WEIGHT
/* The upper half of a float16. */
#define WEIGHT(bytes, mask) _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8))
BYTES_512(float8_e5m2)
#undef WEIGHT
/* Sign and exponent moved to where float16 has them, 2^8 for the scale to take; NaN would cost more. */
#define WEIGHT(bytes, mask) \
  _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), mask))
BYTES_512(float8_e4m3)
#undef WEIGHT

/* int8 activations: the codes of four consecutive k, one a byte, as unsigned numbers, for a dot product of bytes. `words` holds
 * those of the widest plane, then of the next; a word has the codes of 32 / width k of a lane. */
INLINE(V512) __m512i quad_512(const __m512i* words, int bits, int k, __m512i low_mask, __m512i more, __m512i all) {
  int width = bits == 3 ? 2 : bits > 4 && bits < 8 ? 4 : bits;
  int num_words = bits == 3 || bits == 6 ? 2 : 4; /* of the widest plane, where there are others */
  __m512i code = shifted_512(words[k * width / 8], k * width % 8);
  if (bits == 8) return code;
  if (bits == 3 || bits == 5) code = select_512(low_mask, code, shifted_512(words[num_words], k - width));
  if (bits > 5) code = select_512(low_mask, code, shifted_512(words[num_words + k / 4], k % 4 * 2 - 4));
  if (bits == 7) code = select_512(more, code, shifted_512(words[num_words + 2], k - 6));
  return _mm512_and_si512(code, all);
}

/* With `slices` the activations are sums of so many bytes, each of which is multiplied by itself. */
#define DOTS_512(bits, slices, num_words, quads)                                                              \
  LOOP(V512 ",avx512vnni") void dots##bits##x##slices##_512(int64_t steps, const float* a) {                  \
    enum { DOT_SUMS = slices == 1 ? SUMS : 4 * slices };                                                      \
    __m512i sums[DOT_SUMS], words[num_words], all = _mm512_set1_epi8((char)((1 << bits) - 1));                \
    __m512i low_mask = _mm512_set1_epi8(bits == 3 ? 3 : 15), more = _mm512_set1_epi8(63);                     \
    UNROLL for (int i = 0; i < DOT_SUMS; ++i) sums[i] = _mm512_setzero_si512();                               \
    UNROLL for (int i = 0; i < num_words; ++i) words[i] = _mm512_set1_epi32(0x12345678 + i);                  \
    OPAQUE(all); OPAQUE(low_mask); OPAQUE(more);                                                              \
    for (int64_t i = 0; i < steps; ++i) {                                                                     \
      const int32_t* part = (const int32_t*)a + (i % A_STEPS) * A_STEP;                                       \
      OPAQUE_ALL(words);                                                                                      \
      UNROLL for (int k = 0; k < quads; ++k) {                                                                \
        __m512i code = quad_512(words, bits, k, low_mask, more, all);                                         \
        UNROLL for (int slice = 0; slice < slices; ++slice) {                                                 \
          int product = k * slices + slice;                                                                   \
          __m512i* sum = sums + product % DOT_SUMS;                                                           \
          *sum = _mm512_dpbusd_epi32(*sum, code, _mm512_set1_epi32(part[product]));                           \
        }                                                                                                     \
      }                                                                                                       \
    }                                                                                                         \
    UNROLL for (int i = 0; i < DOT_SUMS; ++i) OPAQUE(sums[i]);                                                \
  }
#define DOTS(slices)        \
  DOTS_512(1, slices, 1, 8) \
  DOTS_512(2, slices, 2, 8) \
  DOTS_512(3, slices, 3, 8) \
  DOTS_512(4, slices, 4, 8) \
  DOTS_512(5, slices, 5, 8) \
  DOTS_512(6, slices, 3, 4) \
  DOTS_512(7, slices, 7, 8) \
  DOTS_512(8, slices, 8, 8)
DOTS(1)
DOTS(3)

/* bfloat16 activations: a lookup in 16 bits, for two products a lane. */
LOOP(V512 ",avx512bf16") void pairs4_512(int64_t steps, const float* a) {
  SUMS_512;
  __m512i words[2] = {_mm512_set1_epi32(0x12345678), _mm512_set1_epi32(0x3456789a)}, table = _mm512_set1_epi16(0x3f00);
  OPAQUE(table);
  for (int64_t i = 0; i < steps; ++i) {
    const float* part = a + (i % A_STEPS) * A_STEP;
    OPAQUE_ALL(words);
    UNROLL for (int k = 0; k < 8; ++k) {
      __m512i index = k % 4 ? _mm512_srli_epi16(words[k / 4], k % 4 * 4) : words[k / 4];
      sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)_mm512_permutexvar_epi16(index, table), (__m512bh)_mm512_set1_ps(part[k]));
    }
  }
  keep_512(sums);
}

#undef OPAQUE
#define OPAQUE(x) __asm__ volatile("" : "+x"(x))
#define V256 "avx2,fma"

/* AVX2 has eight lanes, and a lookup of three bits: 1 and 2 bits are looked up, 4 and 8 converted. */
#define LOOP_256(name, bits, WEIGHT)                                                          \
  LOOP(V256) void name##_256(int64_t steps, const float* a) {                                 \
    __m256 sums[SUMS];                                                                        \
    __m256i words[2], constant = _mm256_set1_epi32((1 << bits) - 1);                          \
    UNROLL for (int i = 0; i < SUMS; ++i) sums[i] = _mm256_setzero_ps();                      \
    UNROLL for (int i = 0; i < 2; ++i) words[i] = _mm256_set1_epi32(0x12345678 + i);          \
    OPAQUE(constant);                                                                         \
    for (int64_t i = 0; i < steps; ++i) {                                                     \
      const float* part = a + (i % A_STEPS) * A_STEP;                                         \
      OPAQUE_ALL(words);                                                                      \
      UNROLL for (int k = 0; k < 2 * 32 / bits; ++k) {                                        \
        __m256i code = _mm256_srli_epi32(words[k * bits / 32], k * bits % 32);                \
        __m256 weight = WEIGHT(code, constant);                                               \
        sums[k % SUMS] = _mm256_fmadd_ps(weight, _mm256_set1_ps(part[k % A_STEP]), sums[k % SUMS]); \
      }                                                                                       \
    }                                                                                         \
    UNROLL for (int i = 0; i < SUMS; ++i) OPAQUE(sums[i]);                                    \
  }
#define LOOK_UP(code, constant) _mm256_permutevar8x32_ps(_mm256_castsi256_ps(constant), code)
#define CONVERT(code, constant) _mm256_cvtepi32_ps(_mm256_and_si256(code, constant))
LOOP_256(table1, 1, LOOK_UP)
LOOP_256(table2, 2, LOOK_UP)
LOOP_256(arithmetic4, 4, CONVERT)
LOOP_256(arithmetic8, 8, CONVERT)

typedef void (*Loop)(int64_t, const float*);

/* What a CPU must have for a loop. gcc and clang take only literals in __builtin_cpu_supports. */
enum { AVX2, AVX512, VNNI, BF16 };

static int has(int needs) {
  switch (needs) {
    case AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case AVX512: return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    case VNNI: return __builtin_cpu_supports("avx512vnni");
    default: return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
  }
}

/* In the order of preference; `bytes` is what a step decodes. */
static const struct {
  const char* kind;
  int needs, bytes;
  Loop loop;
} LOOPS[] = {
    {"table1", AVX512, 64, table1_512},
    {"table2", AVX512, 64, table2_512},
    {"table4", AVX512, 64, table4_512},
    {"codebook4", AVX512, 64, table4_512},
    {"planes3", AVX512, 3 * 64, planes3_512},
    {"planes5", AVX512, 5 * 64, planes5_512},
    {"planes6", AVX512, 3 * 64, planes6_512},
    {"planes7", AVX512, 7 * 64, planes7_512},
    {"uint8", AVX512, 8 * 16, uint8_512},
    {"int8", AVX512, 8 * 16, int8_512},
    {"float8_e4m3", AVX512, 8 * 16, float8_e4m3_512},
    {"float8_e5m2", AVX512, 8 * 16, float8_e5m2_512},
    {"dots1", VNNI, 1 * 64, dots1x1_512},
    {"dots2", VNNI, 2 * 64, dots2x1_512},
    {"dots3", VNNI, 3 * 64, dots3x1_512},
    {"dots4", VNNI, 4 * 64, dots4x1_512},
    {"dots5", VNNI, 5 * 64, dots5x1_512},
    {"dots6", VNNI, 3 * 64, dots6x1_512},
    {"dots7", VNNI, 7 * 64, dots7x1_512},
    {"dots8", VNNI, 8 * 64, dots8x1_512},
    {"dots1x3", VNNI, 1 * 64, dots1x3_512},
    {"dots2x3", VNNI, 2 * 64, dots2x3_512},
    {"dots3x3", VNNI, 3 * 64, dots3x3_512},
    {"dots4x3", VNNI, 4 * 64, dots4x3_512},
    {"dots5x3", VNNI, 5 * 64, dots5x3_512},
    {"dots6x3", VNNI, 3 * 64, dots6x3_512},
    {"dots7x3", VNNI, 7 * 64, dots7x3_512},
    {"dots8x3", VNNI, 8 * 64, dots8x3_512},
    {"pairs4", BF16, 2 * 64, pairs4_512},
    {"table1", AVX2, 2 * 32, table1_256},
    {"table2", AVX2, 2 * 32, table2_256},
    {"table4", AVX2, 2 * 32, arithmetic4_256},
    {"uint8", AVX2, 2 * 32, arithmetic8_256},
    {"int8", AVX2, 2 * 32, arithmetic8_256},
};

/* Let `threads` threads decode `steps` steps of a kind each; return the bytes of weights of all, or -1 where this CPU, or this
 * file, has no loop for the kind. `wide` allows AVX-512. */
int64_t bitblas_decode(const char* kind, int64_t steps, int threads, int wide) {
  static const float a[A_STEPS * A_STEP] = {0.5f, 0.25f};
  for (unsigned i = 0; i < sizeof(LOOPS) / sizeof(*LOOPS); ++i)
    if (!strcmp(LOOPS[i].kind, kind) && (wide || LOOPS[i].needs == AVX2) && has(LOOPS[i].needs)) {
#pragma omp parallel num_threads(threads)
      LOOPS[i].loop(steps, a);
      return steps * threads * LOOPS[i].bytes;
    }
  return -1;
}
#else
int64_t bitblas_decode(const char* kind, int64_t steps, int threads, int wide) {
  (void)kind, (void)steps, (void)threads, (void)wide;
  return -1;
}
#endif
