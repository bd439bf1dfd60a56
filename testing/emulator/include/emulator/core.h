// What a kernel text and the runtime share: the qualifiers of CUDA, thread indices, and the doors into the runtime.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <emulator/vectors.h>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline  // only as far as it pays: texts that are inlined wholly take many times as long to compile
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define CUDART_VERSION 13000
#define EMULATOR_API __attribute__((visibility("default")))
#define EMULATOR_TINY inline __attribute__((always_inline))
#define EMULATOR_PLAIN __attribute__((no_sanitize("thread"), no_sanitize("undefined")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

// Ends the launch with an error; does not return. Used for every fault of a kernel.
EMULATOR_API void fail(const char* format, ...) __attribute__((noreturn, format(printf, 1, 2)));

// Constant while a kernel function runs in one fiber, and asked for only there: hence `const`.
EMULATOR_API uint3 thread_index() __attribute__((const));
EMULATOR_API uint3 block_index() __attribute__((const));
EMULATOR_API uint3 block_size() __attribute__((const));
EMULATOR_API uint3 grid_size() __attribute__((const));
EMULATOR_API unsigned lane_index() __attribute__((const));

// Shared memory. An address of the shared space is an offset into one arena, which never moves.
EMULATOR_API char* shared_arena() __attribute__((const));
EMULATOR_API void* dynamic_shared() __attribute__((const));
// The static array declared at `site`; one place for all threads of a block. `site` is unique in its library.
EMULATOR_API void* static_shared(const void* site, size_t bytes, size_t alignment);
EMULATOR_API uint32_t shared_address(const void* pointer);

// Barriers and warp-wide operations. `line` is that of the text, for messages and to see lanes that diverged.
enum class Reduce { none, any_set, all_set, count };
EMULATOR_API int barrier(int number, int threads, bool wait, Reduce reduce, int predicate, int line);
EMULATOR_API void warp_barrier(unsigned mask, int line);
enum class Shuffle { index, up, down, butterfly };
// Replaces `value` (`words` 32-bit words); returns whether the source lane lay within the segment.
EMULATOR_API bool shuffle(Shuffle mode, unsigned mask, uint32_t* value, int words, int operand, int clamp, int line);
EMULATOR_API unsigned ballot(unsigned mask, bool predicate, int line);
EMULATOR_API unsigned active_mask();
enum class Fold { add, min, max, bit_and, bit_or, bit_xor };
EMULATOR_API int64_t warp_fold(Fold fold, unsigned mask, int64_t value, int line);
// Calls that make no progress by themselves (a spinning thread) end in an error.
EMULATOR_API void let_others_run();

// Tells the memory checker of an access that the compiler does not instrument.
enum class Access { read, write, atomic };
EMULATOR_API void touch(const void* pointer, size_t bytes, Access access);

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared;
  const void* kernel;
  const void* library_begin;  // the memory of the kernel's own constants and globals
  const void* library_end;
  void (*call)(void* arguments);
  void* arguments;
};
// Runs a grid. Returns 0, or the number of a CUDA error that `last_error_text` describes.
EMULATOR_API int run_grid(const Launch& launch);
EMULATOR_API int refuse(const char* reason);
EMULATOR_API const char* last_error_text();
EMULATOR_API int set_dynamic_shared_limit(const void* kernel, long bytes, int arch);
EMULATOR_API void set_arch(int arch);

}  // namespace emulator

#define warpSize 32
