/* What this machine can do, measured: multiply-accumulates with everything in registers, and reading of memory. Built as a
 * library of its own by `bitblas.bench`; no part of an operator. A function returns -1 where the CPU lacks the instruction. */
#include <omp.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS(feature) __builtin_cpu_supports(feature)
#define TARGET(features) __attribute__((target(features), noinline))
#else
#define TARGET(features) __attribute__((noinline))
#endif

/* Twelve independent chains hide the latency; with two operands they fit into sixteen registers. `STEP(acc)` is the
 * instruction; the empty assembly keeps each result in a register, so that no step can be dropped or joined with another. */
#define CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
enum { NUM_CHAINS = 12 };

#define DECLARE(i) register_t_ acc##i = zero;
#define ADVANCE(i) acc##i = STEP(acc##i); __asm__ volatile("" : REGISTER(acc##i));
#define COUNTED_LOOP                              \
  CHAINS(DECLARE)                                 \
  for (int64_t i = 0; i < steps; ++i) {           \
    CHAINS(ADVANCE)                               \
  }

#if defined(__x86_64__)
#define REGISTER(acc) "+v"(acc)

TARGET("avx512f") static void fma_512(int64_t steps) {
  typedef __m512 register_t_;
  register_t_ zero = _mm512_setzero_ps(), x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(0.25f);
#define STEP(acc) _mm512_fmadd_ps(x, y, acc)
  COUNTED_LOOP
#undef STEP
}

TARGET("avx2,fma") static void fma_256(int64_t steps) {
  typedef __m256 register_t_;
  register_t_ zero = _mm256_setzero_ps(), x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(0.25f);
#define STEP(acc) _mm256_fmadd_ps(x, y, acc)
  COUNTED_LOOP
#undef STEP
}

TARGET("avx512f,avx512vnni") static void vnni_512(int64_t steps) {
  typedef __m512i register_t_;
  register_t_ zero = _mm512_setzero_si512(), x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(1);
#define STEP(acc) _mm512_dpbusd_epi32(acc, x, y)
  COUNTED_LOOP
#undef STEP
}

TARGET("avx512f,avx512bf16") static void bf16_512(int64_t steps) {
  typedef __m512 register_t_;
  register_t_ zero = _mm512_setzero_ps();
  __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f)), y = x;
#define STEP(acc) _mm512_dpbf16_ps(acc, x, y)
  COUNTED_LOOP
#undef STEP
}

#undef REGISTER
#define REGISTER(acc) "+x"(acc)
#elif defined(__aarch64__)
#define REGISTER(acc) "+w"(acc)
#endif

#if defined(__x86_64__) || defined(__aarch64__)
typedef float vector_128 __attribute__((vector_size(16)));

TARGET("sse2") static void fma_128(int64_t steps) { /* one fused instruction on Arm, a product and a sum on an old x86 */
  typedef vector_128 register_t_;
  register_t_ zero = {0}, x = {0.5f, 0.5f, 0.5f, 0.5f}, y = {0.25f, 0.25f, 0.25f, 0.25f};
  __asm__ volatile("" : REGISTER(x), REGISTER(y));
#define STEP(acc) (acc + x * y)
  COUNTED_LOOP
#undef STEP
}
#endif

typedef void (*Loop)(int64_t);

static double timed(Loop loop, int64_t steps, int threads, int macs) {
  double began = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  loop(steps);
  return (double)threads * steps * NUM_CHAINS * macs / (omp_get_wtime() - began);
}

/* Multiply-accumulates per second of all `threads` together; every kind of loop runs about `steps` · 12 instructions. */
double bitblas_peak_fma(int64_t steps, int threads) {
#if defined(__x86_64__)
  if (HAS("avx512f")) return timed(fma_512, steps, threads, 16);
  if (HAS("avx2") && HAS("fma")) return timed(fma_256, steps, threads, 8);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  return timed(fma_128, steps, threads, 4);
#else
  (void)steps, (void)threads;
  return -1;
#endif
}

double bitblas_peak_int8(int64_t steps, int threads) {
#if defined(__x86_64__)
  if (HAS("avx512vnni")) return timed(vnni_512, steps, threads, 64);
#endif
  (void)steps, (void)threads;
  return -1;
}

double bitblas_peak_bf16(int64_t steps, int threads) {
#if defined(__x86_64__)
  if (HAS("avx512bf16")) return timed(bf16_512, steps, threads, 32);
#endif
  (void)steps, (void)threads;
  return -1;
}

/* Bytes per second at which `threads` read `words` 64-bit words once, each thread its own consecutive part, after having
 * written them: memory comes to be where it is first touched. `checksum` is there to be used. */
double bitblas_read_bandwidth(uint64_t* data, int64_t words, int threads, int fill, uint64_t* checksum) {
  uint64_t sum = 0;
  if (fill) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; ++i) data[i] = (uint64_t)i * 0x9E3779B97F4A7C15u;
  }
  double began = omp_get_wtime();
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : sum)
  for (int64_t block = 0; block < words / 64; ++block) {
    const uint64_t* part = data + block * 64;
    uint64_t lanes[8] = {0};
    for (int i = 0; i < 64; i += 8)
      for (int lane = 0; lane < 8; ++lane) lanes[lane] ^= part[i + lane];
    sum ^= lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3] ^ lanes[4] ^ lanes[5] ^ lanes[6] ^ lanes[7];
  }
  double seconds = omp_get_wtime() - began;
  *checksum = sum;
  return (double)words * 8 / seconds;
}
