// Bank conflicts of shared memory, by line of the text: what a card would need beyond one cycle for a warp's access.
//
// The k-th time that a lane comes to an access is put together with the k-th time of the others. 32 banks of 4 bytes; accesses of
// 8 bytes take two passes of 16 lanes, of 16 bytes four of 8; words that several lanes share cost nothing.
#include "runtime.h"

#include <algorithm>
#include <deque>
#include <map>
#include <unordered_map>

namespace emulator {

namespace {

struct Lanes {
  unsigned mask;
  uint32_t address[warp_lanes];
};
struct Site {
  size_t bytes;
  long passes, extra_cycles;
  uint32_t times[max_threads];              // a thread has been here in this block
  std::deque<Lanes> open[max_warps];        // times that some lanes have not reached
  uint32_t first_open[max_warps];
};

std::unordered_map<uint32_t, Site> sites;
const void* library;

int cycles_of(const Lanes& lanes, int first, int count, size_t bytes) {
  uint32_t words[warp_lanes];
  int known = 0, used[32] = {}, most = 0;
  for (int lane = first; lane < first + count; ++lane) {
    if ((lanes.mask >> lane & 1) == 0) continue;
    for (uint32_t word = lanes.address[lane] / 4; word <= (lanes.address[lane] + uint32_t(bytes) - 1) / 4; ++word) {
      bool is_new = true;
      for (int i = 0; i < known && is_new; ++i) is_new = words[i] != word;
      if (!is_new || known == warp_lanes) continue;
      words[known++] = word;
      if (++used[word % 32] > most) most = used[word % 32];
    }
  }
  return most;
}

void count(Site& site, const Lanes& lanes) {
  const int at_once = site.bytes <= 4 ? 32 : site.bytes <= 8 ? 16 : 8;
  for (int first = 0; first < warp_lanes; first += at_once) {
    const int cycles = cycles_of(lanes, first, at_once, site.bytes);
    if (cycles == 0) continue;
    ++site.passes;
    site.extra_cycles += cycles - 1;
    state.statistics.shared_passes += 1;
    state.statistics.shared_conflicts += cycles - 1;
  }
}

}  // namespace

void begin_grid_of_banks(const void* of_library) {
  if (library != of_library) sites.clear();
  library = of_library;
  for (auto& [place, site] : sites) {  // an error may have ended the last grid
    std::fill_n(site.times, max_threads, 0);
    std::fill_n(site.first_open, max_warps, 0);
    for (auto& open : site.open) open.clear();
  }
}

void end_block_of_banks() {
  for (auto& [place, site] : sites) {
    for (int warp = 0; warp < state.warp_count; ++warp) {
      for (const Lanes& lanes : site.open[warp]) count(site, lanes);
      site.open[warp].clear();
      site.first_open[warp] = 0;
    }
    for (int thread = 0; thread < state.thread_count; ++thread) site.times[thread] = 0;
  }
}

void count_banks(uint32_t place, int thread, uint32_t address, size_t bytes) {
  if (bytes > 16) return;
  Site& site = sites[place];
  site.bytes = bytes;
  const int warp = thread / warp_lanes, lane = thread % warp_lanes;
  const uint32_t index = site.times[thread]++ - site.first_open[warp];
  auto& open = site.open[warp];
  while (open.size() <= index) open.push_back({});
  open[index].mask |= 1u << lane;
  open[index].address[lane] = address;
  while (!open.empty() && open.front().mask == state.warps[warp].existing) {
    count(site, open.front());
    open.pop_front();
    ++site.first_open[warp];
  }
}

struct LineConflicts {
  int line;
  long passes, extra_cycles;
};

// Fills `lines` with up to `capacity` lines of the library that ran last, and returns how many there are.
extern "C" EMULATOR_API int emulator_conflicts(LineConflicts* lines, int capacity) {
  std::map<int, LineConflicts> by_line;
  for (auto& [place, site] : sites) {
    const std::string name = place_name(place);
    const size_t digits = name.find_first_of("0123456789");
    const int line = digits == std::string::npos ? 0 : std::stoi(name.substr(digits));
    LineConflicts& one = by_line[line];
    one.line = line;
    one.passes += site.passes;
    one.extra_cycles += site.extra_cycles;
  }
  int count = 0;
  for (auto& [line, one] : by_line)
    if (count < capacity) lines[count++] = one;
  return int(by_line.size());
}

extern "C" EMULATOR_API void emulator_reset_statistics() {
  state.statistics = {};
  sites.clear();
}

}  // namespace emulator
