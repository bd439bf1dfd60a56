// Warp-wide operations and barriers, and which memory accesses they put in order.
#include "runtime.h"

#include <string.h>

namespace emulator {

struct BarrierArgument {
  int number, threads, predicate;
  bool wait;
  Reduce reduce;
  int result;
};
static int reduced_any[max_barriers], reduced_all[max_barriers], reduced_count[max_barriers];
static std::vector<BarrierArgument*> barrier_waiting[max_barriers];

// ---- order ----------------------------------------------------------------------------------------------------------
//
// An access is stamped with its thread and the epoch of the thread's warp. A warp's epoch ends when all its threads have passed
// a barrier or a __syncwarp; barriers tell the warps that take part which epochs of each other are over.

bool is_ordered(int other_thread, uint32_t epoch) {
  const Thread& self = *state.current;
  return other_thread == self.number || epoch <= state.warps[self.warp].known[other_thread / warp_lanes];
}

static void end_epoch(Warp& warp, int number) {
  warp.known[number] = warp.epoch;
  ++warp.epoch;
}

void begin_block_of_warps() {
  state.warp_count = (state.thread_count + warp_lanes - 1) / warp_lanes;
  for (int w = 0; w < state.warp_count; ++w) {
    Warp& warp = state.warps[w];
    const int lanes = state.thread_count - w * warp_lanes;
    warp.existing = lanes >= warp_lanes ? 0xffffffffu : (1u << lanes) - 1;
    warp.exited = 0;
    warp.pending.clear();
    memset(warp.known, 0, sizeof warp.known);
    warp.epoch = 1;
  }
  for (auto& waiting : barrier_waiting) waiting.clear();
  for (Barrier& barrier : state.barriers) {
    barrier.arrived_warps = 0;
    barrier.who_arrived = 0;
    barrier.waiting.clear();
    memset(barrier.joined, 0, sizeof barrier.joined);
  }
}

// ---- gathering ------------------------------------------------------------------------------------------------------

static const char* describe(unsigned lanes) {
  static char text[64];
  int first = 0;
  while ((lanes >> first & 1) == 0) ++first;
  snprintf(text, sizeof text, "lane %d (%d lanes in all)", first, __builtin_popcount(lanes));
  return text;
}

// Waits until every lane of `mask` is here, with the same operation, mask and line; the last one calls `run`. `resume` false:
// `run` makes the lanes ready itself.
void gather(const char* name, unsigned mask, int line, void* argument, Run run, bool needs_all, bool resume) {
  Thread& self = *state.current;
  Warp& warp = state.warps[self.warp];
  const unsigned bit = 1u << self.lane;
  if (needs_all && (mask & warp.existing) != 0xffffffffu)
    fail("line %d: %s needs 32 lanes, warp %d has %d", line, name, self.warp, __builtin_popcount(warp.existing));
  mask &= warp.existing;
  if ((mask & bit) == 0) fail("line %d: %s by lane %d, which its mask %#x does not name", line, name, self.lane, mask);
  if ((mask & warp.exited) != 0)
    fail("line %d: %s waits for %s of warp %d, which has exited", line, name, describe(mask & warp.exited), self.warp);
  Gathering* gathering = nullptr;
  for (Gathering& other : warp.pending) {
    if (other.mask == mask && other.line == line && strcmp(other.name, name) == 0) gathering = &other;
    else if ((other.mask & mask) != 0)
      fail("divergence in warp %d: lane %d is at %s of line %d (mask %#x), %s at %s of line %d (mask %#x)", self.warp, self.lane,
           name, line, mask, describe(other.arrived), other.name, other.line, other.mask);
  }
  if (gathering == nullptr) {
    warp.pending.push_back({name, mask, 0, line, {}});
    gathering = &warp.pending.back();
  }
  gathering->arrived |= bit;
  gathering->arguments[self.lane] = argument;
  if (gathering->arrived != mask) return wait_for(name, line);
  Gathering complete = *gathering;
  warp.pending.erase(warp.pending.begin() + (gathering - warp.pending.data()));
  ++state.statistics.warp_operations;
  run(complete);
  if (resume) {
    const int first = self.warp * warp_lanes;
    for (int lane = 0; lane < warp_lanes; ++lane)
      if ((mask >> lane & 1) && lane != self.lane) make_ready(first + lane);
    let_others_run();
  } else {
    wait_for(name, line);
  }
}

void thread_exited(Thread& thread) {
  Warp& warp = state.warps[thread.warp];
  for (const Gathering& other : warp.pending)
    if (other.mask >> thread.lane & 1)
      fail("line %d: %s of warp %d waits for lane %d, which has exited", other.line, other.name, thread.warp, thread.lane);
  for (int i = 0; i < max_barriers; ++i) {
    const Barrier& barrier = state.barriers[i];
    if (barrier.arrived_warps != 0 && barrier.expected_warps == state.warp_count && !(barrier.who_arrived >> thread.warp & 1))
      fail("line %d: deadlock: barrier %d waits for thread %d, which has exited", barrier.line, i, thread.number);
  }
  warp.exited |= 1u << thread.lane;
  thread.exited = true;
  ++state.exited_count;
  drop_copies(thread.number);
}

// ---- barriers -------------------------------------------------------------------------------------------------------

static void complete_barrier(int number) {
  Barrier& barrier = state.barriers[number];
  for (int w : barrier.waiting) {
    Warp& warp = state.warps[w];
    for (int other = 0; other < state.warp_count; ++other)
      if (warp.known[other] < barrier.joined[other]) warp.known[other] = barrier.joined[other];
    for (int lane = 0; lane < warp_lanes; ++lane)
      if ((warp.existing & ~warp.exited) >> lane & 1) make_ready(w * warp_lanes + lane);
  }
  for (BarrierArgument* argument : barrier_waiting[number])
    argument->result = argument->reduce == Reduce::any_set   ? reduced_any[number]
                       : argument->reduce == Reduce::all_set ? reduced_all[number]
                                                             : reduced_count[number];
  barrier_waiting[number].clear();
  barrier.waiting.clear();
  barrier.arrived_warps = 0;
  barrier.who_arrived = 0;
  memset(barrier.joined, 0, sizeof barrier.joined);
  ++state.statistics.barriers;
}

static void warp_at_barrier(Gathering& gathering) {
  const Thread& self = *state.current;
  Warp& warp = state.warps[self.warp];
  const auto& first = *static_cast<BarrierArgument*>(gathering.arguments[self.lane]);
  const int number = first.number;
  Barrier& barrier = state.barriers[number];
  for (int lane = 0; lane < warp_lanes; ++lane) {
    if ((gathering.mask >> lane & 1) == 0) continue;
    auto* argument = static_cast<BarrierArgument*>(gathering.arguments[lane]);
    if (argument->number != number || argument->threads != first.threads)
      fail("line %d: lanes of warp %d are at different barriers", gathering.line, self.warp);
    if (barrier.arrived_warps == 0 && barrier_waiting[number].empty())
      reduced_any[number] = 0, reduced_all[number] = 1, reduced_count[number] = 0;
    reduced_any[number] |= argument->predicate != 0;
    reduced_all[number] &= argument->predicate != 0;
    reduced_count[number] += argument->predicate != 0;
    if (argument->wait) barrier_waiting[number].push_back(argument);
  }
  const int expected = first.threads == 0 ? state.warp_count : first.threads / warp_lanes;
  if (barrier.arrived_warps != 0 && barrier.expected_warps != expected)
    fail("line %d: barrier %d expects %d warps, and %d at line %d", gathering.line, number, expected, barrier.expected_warps,
         barrier.line);
  barrier.who_arrived |= 1u << self.warp;
  for (int w = 0; expected == state.warp_count && w < state.warp_count; ++w)
    if (state.warps[w].exited != 0 && !(barrier.who_arrived >> w & 1))
      fail("line %d: deadlock: barrier %d waits for %s of warp %d, which has exited", gathering.line, number,
           describe(state.warps[w].exited), w);
  barrier.expected_warps = expected;
  barrier.line = gathering.line;
  end_epoch(warp, self.warp);
  for (int other = 0; other < state.warp_count; ++other)
    if (barrier.joined[other] < warp.known[other]) barrier.joined[other] = warp.known[other];
  if (first.wait) barrier.waiting.push_back(self.warp);
  if (++barrier.arrived_warps > expected) fail("line %d: more than %d warps at barrier %d", gathering.line, expected, number);
  if (barrier.arrived_warps == expected) complete_barrier(number);
  if (!first.wait)
    for (int lane = 0; lane < warp_lanes; ++lane)
      if (gathering.mask >> lane & 1) make_ready(self.warp * warp_lanes + lane);
}

int barrier(int number, int threads, bool wait, Reduce reduce, int predicate, int line) {
  const Thread& self = *state.current;
  const unsigned lanes = state.warps[self.warp].existing;
  if (number < 0 || number >= max_barriers) fail("line %d: there is no barrier %d", line, number);
  if (threads % warp_lanes != 0 || threads < 0 || (threads + 31) / 32 > state.warp_count)
    fail("line %d: barrier %d of %d threads in a block of %d", line, number, threads, state.thread_count);
  BarrierArgument argument{number, threads, predicate, wait, reduce, 0};
  gather("barrier", lanes, line, &argument, warp_at_barrier, false, false);
  return argument.result;
}

void bar_arrive(int number, int threads, int line) { barrier(number, threads, false, Reduce::none, 0, line); }

void warp_barrier(unsigned mask, int line) {
  gather("__syncwarp", mask, line, nullptr, [](Gathering& gathering) {
    Warp& warp = state.warps[state.current->warp];
    if (gathering.mask == (warp.existing & ~warp.exited)) end_epoch(warp, state.current->warp);
  }, false);
}

// ---- shuffles and votes ---------------------------------------------------------------------------------------------

struct ShuffleArgument {
  Shuffle mode;
  uint32_t* value;
  int words, operand, clamp;
  uint32_t sent[4];
  bool is_inside;
};

// shfl.sync of the PTX manual: `clamp` has the segment mask in bits 8 to 12.
static int source_lane(const ShuffleArgument& a, int lane, bool* is_inside) {
  const int b = a.operand & 31, c = a.clamp & 31, segment = a.clamp >> 8 & 31;
  const int greatest = (lane & segment) | (c & ~segment), least = lane & segment;
  int source = 0;
  switch (a.mode) {
    case Shuffle::up: source = lane - b, *is_inside = source >= greatest; break;
    case Shuffle::down: source = lane + b, *is_inside = source <= greatest; break;
    case Shuffle::butterfly: source = lane ^ b, *is_inside = source <= greatest; break;
    case Shuffle::index: source = least | (b & ~segment), *is_inside = source <= greatest; break;
  }
  return *is_inside ? source : lane;
}

static void run_shuffle(Gathering& gathering) {
  for (int lane = 0; lane < warp_lanes; ++lane) {
    if ((gathering.mask >> lane & 1) == 0) continue;
    auto& to = *static_cast<ShuffleArgument*>(gathering.arguments[lane]);
    const int source = source_lane(to, lane, &to.is_inside);
    for (int i = 0; i < to.words; ++i)
      to.value[i] = gathering.mask >> source & 1 ? static_cast<ShuffleArgument*>(gathering.arguments[source])->sent[i]
                                                 : 0x7fc5a5a5u;  // from a lane that does not take part: undefined
  }
}

bool shuffle(Shuffle mode, unsigned mask, uint32_t* value, int words, int operand, int clamp, int line) {
  static const char* const names[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
  ShuffleArgument argument{mode, value, words, operand, clamp, {}, false};
  memcpy(argument.sent, value, 4 * words);
  gather(names[int(mode)], mask, line, &argument, run_shuffle, false);
  return argument.is_inside;
}

struct VoteArgument {
  bool predicate;
  unsigned result;
};

unsigned ballot(unsigned mask, bool predicate, int line) {
  VoteArgument argument{predicate, 0};
  gather("vote", mask, line, &argument, [](Gathering& gathering) {
    unsigned votes = 0;
    for (int lane = 0; lane < warp_lanes; ++lane)
      if (gathering.mask >> lane & 1) votes |= unsigned(static_cast<VoteArgument*>(gathering.arguments[lane])->predicate) << lane;
    for (int lane = 0; lane < warp_lanes; ++lane)
      if (gathering.mask >> lane & 1) static_cast<VoteArgument*>(gathering.arguments[lane])->result = votes;
  }, false);
  return argument.result;
}

unsigned active_mask() {
  const Warp& warp = state.warps[state.current->warp];
  return warp.existing & ~warp.exited;
}

struct FoldArgument {
  Fold fold;
  int64_t value;
};

static int64_t folded(Fold fold, int64_t a, int64_t b) {
  switch (fold) {
    case Fold::add: return a + b;
    case Fold::min: return a < b ? a : b;
    case Fold::max: return a > b ? a : b;
    case Fold::bit_and: return a & b;
    case Fold::bit_or: return a | b;
    case Fold::bit_xor: return a ^ b;
  }
  return 0;
}

int64_t warp_fold(Fold fold, unsigned mask, int64_t value, int line) {
  FoldArgument argument{fold, value};
  gather("redux", mask, line, &argument, [](Gathering& gathering) {
    int64_t sum = 0;
    bool is_first = true;
    for (int lane = 0; lane < warp_lanes; ++lane) {
      if ((gathering.mask >> lane & 1) == 0) continue;
      const auto& one = *static_cast<FoldArgument*>(gathering.arguments[lane]);
      sum = is_first ? one.value : folded(one.fold, sum, one.value);
      is_first = false;
    }
    for (int lane = 0; lane < warp_lanes; ++lane)
      if (gathering.mask >> lane & 1) static_cast<FoldArgument*>(gathering.arguments[lane])->value = sum;
  }, false);
  return argument.value;
}

}  // namespace emulator
