/* What this machine can do, measured: multiply-accumulates with everything in registers, and reading of memory. Built as a
 * library of its own by `bitblas.bench`, which times the calls; no part of an operator. A function returns how much it did, or
 * -1 where the CPU lacks the instruction. */
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

static int64_t run(Loop loop, int64_t steps, int threads, int macs) {
#pragma omp parallel num_threads(threads)
  loop(steps);
  return threads * steps * NUM_CHAINS * macs;
}

/* Multiply-accumulates of all `threads` together; every kind of loop runs `steps` · 12 instructions a thread. */
int64_t bitblas_peak_fma(int64_t steps, int threads) {
#if defined(__x86_64__)
  if (HAS("avx512f")) return run(fma_512, steps, threads, 16);
  if (HAS("avx2") && HAS("fma")) return run(fma_256, steps, threads, 8);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  return run(fma_128, steps, threads, 4);
#else
  (void)steps, (void)threads;
  return -1;
#endif
}

int64_t bitblas_peak_int8(int64_t steps, int threads) {
#if defined(__x86_64__)
  if (HAS("avx512vnni")) return run(vnni_512, steps, threads, 64);
#endif
  (void)steps, (void)threads;
  return -1;
}

int64_t bitblas_peak_bf16(int64_t steps, int threads) {
#if defined(__x86_64__)
  if (HAS("avx512bf16")) return run(bf16_512, steps, threads, 32);
#endif
  (void)steps, (void)threads;
  return -1;
}

/* Memory is read as `STREAMS` consecutive streams a thread, a cache line of each in turn: with one the prefetchers of a Zen 4
 * reached 33 GB/s, with two 38, with four and with eight 43. */
enum { STREAMS = 4, LINE_WORDS = 8 };

static int64_t stream_words(int64_t words, int threads) {
  return words / threads / STREAMS / LINE_WORDS * LINE_WORDS;
}

/* Write `words` 64-bit words, each thread those that it will read: memory comes to be where it is first touched. */
void bitblas_fill(uint64_t* data, int64_t words, int threads) {
  int64_t part = stream_words(words, threads) * STREAMS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread)
    for (int64_t i = thread * part; i < (thread + 1) * part; ++i) data[i] = (uint64_t)i * 0x9E3779B97F4A7C15u;
}

/* Read `words` 64-bit words once, each thread its own part; return the bytes. `checksum` is there to be used. */
int64_t bitblas_read(const uint64_t* data, int64_t words, int threads, uint64_t* checksum) {
  int64_t length = stream_words(words, threads);
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : sum)
  for (int thread = 0; thread < threads; ++thread) {
    const uint64_t* part = data + thread * length * STREAMS;
    uint64_t lanes[LINE_WORDS] = {0};
    for (int64_t i = 0; i < length; i += LINE_WORDS)
      for (int stream = 0; stream < STREAMS; ++stream)
        for (int lane = 0; lane < LINE_WORDS; ++lane) lanes[lane] ^= part[stream * length + i + lane];
    for (int lane = 0; lane < LINE_WORDS; ++lane) sum ^= lanes[lane];
  }
  *checksum = sum;
  return length * STREAMS * threads * (int64_t)sizeof(uint64_t);
}
