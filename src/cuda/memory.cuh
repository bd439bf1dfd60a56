// How operands reach registers and shared memory.
#pragma once

// Weights: read once, so that they leave the first-level cache to the activations. 16, 8 or 4 bytes, aligned to that.
BITBLAS_DEVICE void bitblas_stream_16(unsigned* out, const void* from) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "l"(from));
}

BITBLAS_DEVICE void bitblas_stream_8(unsigned* out, const void* from) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "l"(from));
}

BITBLAS_DEVICE void bitblas_stream_4(unsigned* out, const void* from) {
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(out[0]) : "l"(from));
}

// Activations, which all warps read.
BITBLAS_DEVICE void bitblas_load_16(unsigned* out, const void* from) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "l"(from));
}

BITBLAS_DEVICE void bitblas_load_8(unsigned* out, const void* from) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "l"(from));
}

BITBLAS_DEVICE unsigned bitblas_shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

BITBLAS_DEVICE void bitblas_load_shared_16(unsigned* out, const void* from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(bitblas_shared_address(from)));
}

BITBLAS_DEVICE void bitblas_load_shared_4(unsigned* out, const void* from) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[0]) : "r"(bitblas_shared_address(from)));
}

BITBLAS_DEVICE void bitblas_load_shared_8(unsigned* out, const void* from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(bitblas_shared_address(from)));
}

// 16 bytes to shared memory, of which the first num_bytes are read and the rest is 0; there after bitblas_wait_copies and a
// barrier. Before capability 8.0 the thread does it itself, at once.
BITBLAS_DEVICE void bitblas_copy_async(void* to, const void* from, int num_bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(bitblas_shared_address(to)), "l"(from), "r"(num_bytes)
               : "memory");
#else
  unsigned words[4] = {0, 0, 0, 0};
  if (num_bytes) bitblas_load_16(words, from);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(bitblas_shared_address(to)), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#endif
}

// … where num_bytes may be any even number up to 16.
BITBLAS_DEVICE void bitblas_copy_part(void* to, const void* from, int num_bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  bitblas_copy_async(to, from, num_bytes);
#else
  unsigned short* shared = static_cast<unsigned short*>(to);
  for (int half = 0; half < 8; ++half)
    shared[half] = 2 * half < num_bytes ? static_cast<const unsigned short*>(from)[half] : 0;
#endif
}

// Weights to shared memory, likewise: 16, 8 or 4 bytes, aligned to that.
#define BITBLAS_COPY_BY_REGISTERS(size)      \
  unsigned words[4];                         \
  bitblas_stream_##size(words, from);        \
  unsigned* shared = static_cast<unsigned*>(to); \
  for (int word = 0; word < size / 4; ++word) shared[word] = words[word];

BITBLAS_DEVICE void bitblas_copy_words_16(void* to, const void* from) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               :
               : "r"(bitblas_shared_address(to)), "l"(from)
               : "memory");
#else
  BITBLAS_COPY_BY_REGISTERS(16)
#endif
}

BITBLAS_DEVICE void bitblas_copy_words_8(void* to, const void* from) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
               :
               : "r"(bitblas_shared_address(to)), "l"(from)
               : "memory");
#else
  BITBLAS_COPY_BY_REGISTERS(8)
#endif
}

BITBLAS_DEVICE void bitblas_copy_words_4(void* to, const void* from) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :
               : "r"(bitblas_shared_address(to)), "l"(from)
               : "memory");
#else
  BITBLAS_COPY_BY_REGISTERS(4)
#endif
}

#undef BITBLAS_COPY_BY_REGISTERS

BITBLAS_DEVICE void bitblas_commit_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait for all but the last `pending` groups of copies.
template <int pending>
BITBLAS_DEVICE void bitblas_wait_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Four matrices of 8 x 8 halves; lane l names the address of row l % 8 of matrix l / 8. A thread gets two neighbours of a row:
// row lane / 4, columns 2 * (lane % 4) and the next.
BITBLAS_DEVICE void bitblas_load_matrices(unsigned* out, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(bitblas_shared_address(row)));
}

// … two neighbours of a column: column lane / 4, rows 2 * (lane % 4) and the next.
BITBLAS_DEVICE void bitblas_load_matrices_trans(unsigned* out, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(bitblas_shared_address(row)));
}

// 16 bytes, aligned to that.
BITBLAS_DEVICE void bitblas_store_16(void* to, const unsigned* words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Four sums in a row, aligned to 16 bytes, which other blocks may have written.
template <typename T>
struct alignas(16) BitblasQuad {
  T values[4];
};

template <typename T>
BITBLAS_DEVICE void bitblas_load_quad(T* out, const T* from) {
  BitblasQuad<T> quad = *reinterpret_cast<const BitblasQuad<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = quad.values[i];
}

template <typename T>
BITBLAS_DEVICE void bitblas_store_quad(T* to, const T* values) {
  BitblasQuad<T> quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.values[i] = values[i];
  *reinterpret_cast<BitblasQuad<T>*>(to) = quad;
}

// Count one arrival at a tile, after all that the block has written can be seen; returns how many came before.
BITBLAS_DEVICE int bitblas_arrive(int* counter) {
  __threadfence();
  return atomicAdd(counter, 1);
}

// See what all blocks have written that had arrived.
BITBLAS_DEVICE void bitblas_see_arrived() {
  __threadfence();
}
