// The state of the emulator: one grid at a time, its blocks one after the other, a block's threads as fibers.
#pragma once
#include <emulator/core.h>
#include <emulator/ptx.h>

#include <string>
#include <vector>

namespace emulator {

constexpr int max_threads = 1024, max_warps = 32, warp_lanes = 32, max_barriers = 16;
constexpr size_t stack_bytes = 128 << 10;

struct Thread {
  void* stack_pointer;
  char *stack_begin, *stack_end;
  uint3 index;
  int number, warp, lane;
  bool exited;
  long accesses;   // since it last gave way
  uint32_t place;  // of its last checked access, for messages
  const char* waits_for;  // for messages; null while it can run
  int waits_line;
};

// A warp-wide operation some lanes have arrived at. `run` is called once, by the last lane, with the lanes' arguments.
struct Gathering {
  const char* name;
  unsigned mask, arrived;
  int line;
  void* arguments[warp_lanes];
};
using Run = void (*)(Gathering&);

struct Warp {
  unsigned existing, exited;
  std::vector<Gathering> pending;
  // Vector clock, by warp: what this warp knows to be over of every other, and of its own up to the last barrier.
  uint32_t known[max_warps];
  uint32_t epoch;
};

struct Barrier {
  int arrived_warps, expected_warps;
  unsigned who_arrived;  // a bit for each warp
  std::vector<int> waiting;  // warps
  uint32_t joined[max_warps];
  int line;
};

struct Statistics {
  long launches, blocks, threads, barriers, warp_operations, shared_accesses, global_accesses, async_copies, switches;
  long shared_passes, shared_conflicts;  // of warps to the banks of shared memory, and the extra cycles that conflicts cost
};

struct State {
  bool is_running;
  Thread* current;
  uint3 block_index;
  dim3 block_size, grid_size;
  int arch;
  int thread_count, warp_count, exited_count;
  Thread threads[max_threads];
  Warp warps[max_warps];
  Barrier barriers[max_barriers];
  std::vector<int> ready;
  uint64_t random;
  std::string error;
  bool has_failed;
  Statistics statistics;
};
extern State state;

// fibers.cpp
uint64_t next_random();
void run_block(void (*call)(void*), void* arguments);  // returns when all threads are done or one failed
void wait_for(const char* what, int line);             // the current thread blocks
void make_ready(int thread);
void allocate_stacks(int count);
void free_stacks();

// warp.cpp
void gather(const char* name, unsigned mask, int line, void* argument, Run run, bool needs_all, bool resume = true);
void begin_block_of_warps();
void thread_exited(Thread& thread);
bool is_ordered(int other_thread, uint32_t epoch);  // before what the current thread does now

// memory.cpp
void begin_grid_memory(const Launch& launch);
void begin_block_memory();
void check_access(const void* pointer, size_t bytes, Access access, int thread, uint32_t place);
// Where in the text an access is: a line if `is_line` is set, else an offset into the library's code.
constexpr uint32_t is_line = 1u << 31;
std::string place_name(uint32_t place);
std::string static_shared_error();
size_t static_shared_bytes();
void drop_copies(int thread);

// banks.cpp
void begin_grid_of_banks(const void* library);
void end_block_of_banks();
void count_banks(uint32_t place, int thread, uint32_t address, size_t bytes);

}  // namespace emulator
