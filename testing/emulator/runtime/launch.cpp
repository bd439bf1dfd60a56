// A launch: its limits, its blocks in random order, and what Python asks and sets.
#include "runtime.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdio.h>

namespace emulator {

constexpr int invalid_value = 1, invalid_configuration = 9, launch_failure = 719;
constexpr long default_shared_limit = 48 << 10;

static uint64_t seed = 0;
static std::map<const void*, long> shared_limits;  // of kernels that asked for more

// Bytes of shared memory a block may have. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
static long shared_limit(int arch) {
  switch (arch / 10) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: return 99 << 10;
    default: return arch >= 900 ? 227 << 10 : 48 << 10;
  }
}

void set_arch(int arch) { state.arch = arch; }

int set_dynamic_shared_limit(const void* kernel, long bytes, int arch) {
  if (bytes < 0 || bytes > shared_limit(arch)) {
    state.error = "cudaFuncSetAttribute: " + std::to_string(bytes) + " bytes of dynamic shared memory, " +
                  std::to_string(shared_limit(arch)) + " are allowed on sm_" + std::to_string(arch / 10);
    return invalid_value;
  }
  shared_limits[kernel] = bytes;
  return 0;
}

const char* last_error_text() { return state.error.c_str(); }

static std::string misfit(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  char text[160] = "";
  const auto limit = shared_limits.find(launch.kernel);
  const long allowed = limit == shared_limits.end() ? default_shared_limit : std::max(limit->second, default_shared_limit);
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.z > 64 || uint64_t(block.x) * block.y * block.z > max_threads)
    snprintf(text, sizeof text, "a block of (%u, %u, %u) threads", block.x, block.y, block.z);
  else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    snprintf(text, sizeof text, "a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  else if (long(launch.dynamic_shared) > allowed)
    snprintf(text, sizeof text, "%zu bytes of dynamic shared memory, %ld are allowed", launch.dynamic_shared, allowed);
  return text;
}

static void set_thread_indices(dim3 block) {
  int number = 0;
  for (unsigned z = 0; z < block.z; ++z)
    for (unsigned y = 0; y < block.y; ++y)
      for (unsigned x = 0; x < block.x; ++x, ++number) {
        Thread& thread = state.threads[number];
        thread.index = {x, y, z};
        thread.number = number;
        thread.warp = number / warp_lanes;
        thread.lane = number % warp_lanes;
      }
  state.thread_count = number;
}

int refuse(const char* reason) {
  state.error = reason;
  return invalid_value;
}

int run_grid(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  state.error = misfit(launch);
  if (!state.error.empty()) {
    state.error = "invalid launch: " + state.error;
    return invalid_configuration;
  }
  state.has_failed = false;
  state.random = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  state.block_size = launch.block;
  state.grid_size = launch.grid;
  set_thread_indices(launch.block);
  allocate_stacks(state.thread_count);
  begin_grid_memory(launch);
  begin_grid_of_banks(launch.library_begin);
  std::vector<uint64_t> order(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint64_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  ++state.statistics.launches;
  for (const uint64_t i : order) {
    state.block_index = {unsigned(i % launch.grid.x), unsigned(i / launch.grid.x % launch.grid.y),
                         unsigned(i / launch.grid.x / launch.grid.y)};
    ++state.statistics.blocks;
    state.statistics.threads += state.thread_count;
    begin_block_of_warps();
    begin_block_memory();
    run_block(launch.call, launch.arguments);
    end_block_of_banks();
    if (state.has_failed) return launch_failure;
    if (long(launch.dynamic_shared + static_shared_bytes()) > shared_limit(state.arch)) {
      state.error = "invalid launch: more shared memory than a block may have";
      return invalid_configuration;
    }
  }
  return 0;
}

extern "C" EMULATOR_API void emulator_set_seed(uint64_t value) { seed = value; }
extern "C" EMULATOR_API void emulator_statistics(Statistics* target) { *target = state.statistics; }

}  // namespace emulator
