// Memory: the arena of shared memory, poisoned for each block, a checker of every access, and copies that are late.
//
// Kernels are compiled with -fsanitize=thread, whose calls (`__tsan_read4` ...) end here instead of in its library.
#include "runtime.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace emulator {

// ---- shared memory --------------------------------------------------------------------------------------------------

// As on a card, the lowest KiB is not the block's: an address of zero is an error.
constexpr size_t static_begin = 1 << 10, static_limit = 48 << 10, dynamic_begin = 64 << 10, arena_bytes = 512 << 10;
constexpr size_t static_gap = 128;  // between static arrays, so that an index beyond one does not meet the next

static char* make_arena() {
  void* memory = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}
static char* const arena = make_arena();

char* shared_arena() { return arena; }
void* dynamic_shared() { return arena + dynamic_begin; }

struct Array {
  const void* site;
  size_t begin, bytes;
};
static std::vector<Array> arrays;  // static ones first seen in this grid
static size_t static_end, dynamic_end, static_bytes;

// What has happened to a byte since the block began. A stamp: the epoch, the thread, how.
struct Cell {
  uint32_t write, read, earlier_read;  // the last reader, and the last other than it
  uint32_t write_place, read_place, earlier_read_place;
};
constexpr uint32_t thread_mask = 1023, is_atomic = 1 << 10, is_pending = 1 << 11;
constexpr int epoch_shift = 12;
static Cell* const cells = static_cast<Cell*>(
    mmap(nullptr, arena_bytes * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));

static void poison(size_t begin, size_t end) {
  // Halves 0x7f81 to 0x7fff: NaN as float16, as bfloat16 and, in pairs, as float32; large and changing as integers.
  for (size_t i = begin; i + 1 < end + 1; i += 2) {
    const uint16_t value = uint16_t(0x7f81 + next_random() % 0x7f);
    memcpy(arena + i, &value, 2);
  }
  memset(cells + begin, 0, (end - begin) * sizeof(Cell));
}

void* static_shared(const void* site, size_t bytes, size_t alignment) {
  for (const Array& array : arrays)
    if (array.site == site) return arena + array.begin;
  const size_t begin = (static_end + static_gap + alignment - 1) / alignment * alignment;
  static_bytes += bytes;
  if (static_bytes > static_limit) fail("%zu bytes of static shared memory, more than %zu", static_bytes, static_limit);
  if (begin + bytes > dynamic_begin) fail("too many static shared arrays for the emulator");
  static_end = begin + bytes;
  arrays.push_back({site, begin, bytes});
  poison(begin, begin + (bytes + 1) / 2 * 2);
  return arena + begin;
}

size_t static_shared_bytes() { return static_bytes; }

uint32_t shared_address(const void* pointer) {
  const size_t offset = static_cast<const char*>(pointer) - arena;
  if (offset >= arena_bytes) fail("__cvta_generic_to_shared of a pointer that is not into shared memory");
  return uint32_t(offset);
}

// ---- global memory --------------------------------------------------------------------------------------------------

struct Range {
  uintptr_t begin, end;
  std::string name;
};
static std::vector<Range> ranges;  // empty: global memory is not checked
static uintptr_t library_begin, library_end;

extern "C" EMULATOR_API void emulator_allow(uintptr_t begin, size_t bytes, const char* name) {
  ranges.push_back({begin, begin + bytes, name});
}
extern "C" EMULATOR_API void emulator_allow_all() { ranges.clear(); }

[[noreturn]] static void out_of_bounds(uintptr_t address, size_t bytes, Access access, uint32_t place) {
  const Range* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Range& range : ranges) {
    const uintptr_t away = address < range.begin ? range.begin - address : address - range.end;
    if (away < distance) nearest = &range, distance = away;
  }
  fail("global memory: %zu bytes %s%s out of bounds, at offset %ld of %s, which has %ld bytes", bytes,
       access == Access::read ? "read" : "written", place_name(place).c_str(), long(address - nearest->begin),
       nearest->name.c_str(), long(nearest->end - nearest->begin));
}

static void check_global(uintptr_t address, size_t bytes, Access access, uint32_t place) {
  ++state.statistics.global_accesses;
  if (ranges.empty()) return;
  static size_t last = 0;
  if (last < ranges.size() && address >= ranges[last].begin && address + bytes <= ranges[last].end) return;
  for (size_t i = 0; i < ranges.size(); ++i)
    if (address >= ranges[i].begin && address + bytes <= ranges[i].end) {
      last = i;
      return;
    }
  if (address >= library_begin && address + bytes <= library_end) return;
  out_of_bounds(address, bytes, access, place);
}

// ---- races ----------------------------------------------------------------------------------------------------------

static std::string name_of(size_t offset) {
  char text[96];
  if (offset >= dynamic_begin) {
    snprintf(text, sizeof text, "byte %zu of dynamic shared memory", offset - dynamic_begin);
    return text;
  }
  for (const Array& array : arrays)
    if (offset + static_gap > array.begin && offset < array.begin + array.bytes + static_gap / 2) {
      snprintf(text, sizeof text, "byte %ld of a static shared array of %zu bytes", long(offset) - long(array.begin), array.bytes);
      return text;
    }
  snprintf(text, sizeof text, "shared address %#zx", offset);
  return text;
}

static bool is_unordered(uint32_t stamp, int thread) {
  const int other = int(stamp & thread_mask);
  if (stamp == 0 || other == thread) return false;
  return stamp >> epoch_shift > state.warps[thread / warp_lanes].known[other / warp_lanes];
}

struct Event {
  const char* what;
  int thread;
  uint32_t place;
};

[[noreturn]] static void race(size_t offset, Event now, Event before) {
  fail("shared memory race: %s is %s by thread %d%s and was %s by thread %d%s with no barrier in between", name_of(offset).c_str(),
       now.what, now.thread, place_name(now.place).c_str(), before.what, before.thread, place_name(before.place).c_str());
}

static bool is_allocated(size_t offset, size_t bytes) {
  if (offset >= dynamic_begin) return offset + bytes <= dynamic_end;
  for (const Array& array : arrays)
    if (offset >= array.begin && offset + bytes <= array.begin + array.bytes) return true;
  return false;
}

static void check_byte(size_t offset, Access access, Event now, uint32_t stamp) {
  Cell& cell = cells[offset];
  const auto by = [](uint32_t other) { return int(other & thread_mask); };
  if (cell.write & is_pending)
    fail("cp.async: %s is %s by thread %d%s before thread %d has waited for the copy to it%s", name_of(offset).c_str(), now.what,
         now.thread, place_name(now.place).c_str(), by(cell.write), place_name(cell.write_place).c_str());
  const bool both_atomic = access == Access::atomic && (cell.write & is_atomic);
  if (!both_atomic && is_unordered(cell.write, now.thread)) race(offset, now, {"written", by(cell.write), cell.write_place});
  if (access == Access::read) {
    if (by(cell.read) != now.thread) cell.earlier_read = cell.read, cell.earlier_read_place = cell.read_place;
    cell.read = stamp;
    cell.read_place = now.place;
  } else {
    if (is_unordered(cell.read, now.thread)) race(offset, now, {"read", by(cell.read), cell.read_place});
    if (is_unordered(cell.earlier_read, now.thread))
      race(offset, now, {"read", by(cell.earlier_read), cell.earlier_read_place});
    cell.write = stamp;
    cell.write_place = now.place;
  }
}

static void check_shared(size_t offset, size_t bytes, Access access, int thread, uint32_t place, uint32_t flags = 0) {
  ++state.statistics.shared_accesses;
  const char* what = access == Access::read ? "read" : "written";
  if (!is_allocated(offset, bytes))
    fail("shared memory: %zu bytes %s%s out of bounds at %s (%zu bytes are allocated)", bytes, what, place_name(place).c_str(),
         name_of(offset).c_str(), offset >= dynamic_begin ? dynamic_end - dynamic_begin : static_bytes);
  uint32_t stamp = state.warps[thread / warp_lanes].epoch << epoch_shift | uint32_t(thread) | flags;
  if (access == Access::atomic) stamp |= is_atomic;
  for (size_t i = offset; i < offset + bytes; ++i) check_byte(i, access, {what, thread, place}, stamp);
}

void check_access(const void* pointer, size_t bytes, Access access, int thread, uint32_t place) {
  const size_t offset = static_cast<const char*>(pointer) - arena;
  if (offset < arena_bytes) return check_shared(offset, bytes, access, thread, place);
  check_global(uintptr_t(pointer), bytes, access, place);
}

constexpr long patience = 50'000'000;  // accesses of one thread without giving way: it spins

static inline void on_access(const void* pointer, size_t bytes, Access access, const void* from) {
  Thread* self = state.current;
  if (self == nullptr) return;  // the launcher
  if (size_t(static_cast<const char*>(pointer) - self->stack_begin) < stack_bytes) return;
  const uint32_t place = uint32_t(uintptr_t(from) - 1 - library_begin);
  if (++self->accesses > patience)
    fail("no progress: a thread spins%s (blocks run one after the other)", place_name(place).c_str());
  check_access(pointer, bytes, access, self->number, place);
  const size_t offset = static_cast<const char*>(pointer) - arena;
  if (offset < arena_bytes) count_banks(place, self->number, uint32_t(offset), bytes);
}

// The line of a place, by way of the library's debug information; empty if that fails.
std::string place_name(uint32_t place) {
  if (place & is_line) return " in line " + std::to_string(place & ~is_line);
  Dl_info library;
  if (dladdr(reinterpret_cast<void*>(library_begin), &library) == 0) return "";
  char command[512], line[512];
  snprintf(command, sizeof command, "addr2line -i -e '%s' %#x 2>/dev/null", library.dli_fname, place);
  FILE* output = popen(command, "r");
  if (output == nullptr) return "";
  std::string result;
  while (fgets(line, sizeof line, output) != nullptr) {  // the innermost inlined function first
    const char* number = strstr(line, ".cu:");
    if (number != nullptr && atoi(number + 4) > 0 && result.empty()) result = " in line " + std::to_string(atoi(number + 4));
  }
  pclose(output);
  return result;
}

void touch(const void* pointer, size_t bytes, Access access) {
  if (uintptr_t(pointer) % bytes != 0) fail("an atomic operation on %zu bytes at a misaligned address", bytes);
  on_access(pointer, bytes, access, __builtin_return_address(0));
}

// ---- late copies ----------------------------------------------------------------------------------------------------

struct Copy {
  uint32_t shared;
  const void* global;
  int bytes, source_bytes;
};
struct Copies {
  std::vector<Copy> copies;
  std::vector<size_t> group_ends;  // of committed groups, as counts of `copies`
};
static Copies copies_of[max_threads];

void drop_copies(int thread) {
  copies_of[thread].copies.clear();
  copies_of[thread].group_ends.clear();
}

void cp_async(uint32_t shared, const void* global, int bytes, int source_bytes, int line) {
  const int thread = state.current->number;
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("line %d: cp.async of %d bytes", line, bytes);
  if (shared % bytes != 0) fail("line %d: cp.async of %d bytes to the misaligned shared address %#x", line, bytes, shared);
  if (source_bytes < 0 || source_bytes > bytes) fail("line %d: cp.async of %d bytes from %d", line, bytes, source_bytes);
  if (source_bytes > 0 && uintptr_t(global) % bytes != 0)
    fail("line %d: cp.async of %d bytes from a misaligned address", line, bytes);
  if (size_t(static_cast<const char*>(global) - arena) < arena_bytes) fail("line %d: cp.async from shared memory", line);
  if (source_bytes > 0) check_global(uintptr_t(global), source_bytes, Access::read, is_line | line);
  check_shared(shared, bytes, Access::write, thread, is_line | line, is_pending);
  count_banks(is_line | line, thread, shared, bytes);
  copies_of[thread].copies.push_back({shared, global, bytes, source_bytes});
  ++state.statistics.async_copies;
}

void cp_async_commit() {
  Copies& own = copies_of[state.current->number];
  own.group_ends.push_back(own.copies.size());
}

void cp_async_wait(int groups_left) {
  const int thread = state.current->number;
  Copies& own = copies_of[thread];
  const size_t groups = own.group_ends.size();
  size_t done = 0, groups_done = 0;
  if (groups_left < 0) {
    done = own.copies.size();
    groups_done = groups;
  } else if (groups > size_t(groups_left)) {
    groups_done = groups - groups_left;
    done = own.group_ends[groups_done - 1];
  }
  const uint32_t stamp = state.warps[thread / warp_lanes].epoch << epoch_shift | uint32_t(thread);
  for (size_t i = 0; i < done; ++i) {
    const Copy& copy = own.copies[i];
    memset(arena + copy.shared, 0, copy.bytes);
    if (copy.source_bytes > 0) memcpy(arena + copy.shared, copy.global, copy.source_bytes);
    for (int byte = 0; byte < copy.bytes; ++byte) cells[copy.shared + byte].write = stamp;
  }
  own.copies.erase(own.copies.begin(), own.copies.begin() + done);
  own.group_ends.erase(own.group_ends.begin(), own.group_ends.begin() + groups_done);
  for (size_t& end : own.group_ends) end -= done;
}

// ---- a grid and its blocks ------------------------------------------------------------------------------------------

void begin_grid_memory(const Launch& launch) {
  arrays.clear();
  static_end = static_begin;
  static_bytes = 0;
  dynamic_end = dynamic_begin + launch.dynamic_shared;
  library_begin = uintptr_t(launch.library_begin);
  library_end = uintptr_t(launch.library_end);
}

void begin_block_memory() {
  for (const Array& array : arrays) poison(array.begin, array.begin + (array.bytes + 1) / 2 * 2);
  poison(dynamic_begin, (dynamic_end + 1) / 2 * 2);
  for (int i = 0; i < state.thread_count; ++i) drop_copies(i);
}

}  // namespace emulator

// ---- what the compiler calls ----------------------------------------------------------------------------------------

using emulator::Access;

#define HOOK extern "C" __attribute__((visibility("default"))) void
#define HOOKS(BYTES)                                                                                            \
  HOOK __tsan_read##BYTES(void* p) { emulator::on_access(p, BYTES, Access::read, __builtin_return_address(0)); }                             \
  HOOK __tsan_write##BYTES(void* p) { emulator::on_access(p, BYTES, Access::write, __builtin_return_address(0)); }                           \
  HOOK __tsan_unaligned_read##BYTES(void* p) { emulator::on_access(p, BYTES, Access::read, __builtin_return_address(0)); }                   \
  HOOK __tsan_unaligned_write##BYTES(void* p) { emulator::on_access(p, BYTES, Access::write, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* p, size_t bytes) { emulator::on_access(p, bytes, Access::read, __builtin_return_address(0)); }
HOOK __tsan_write_range(void* p, size_t bytes) { emulator::on_access(p, bytes, Access::write, __builtin_return_address(0)); }
// What the compiler makes of large copies; the linker sends it here (--wrap).
extern "C" __attribute__((visibility("default"))) void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  emulator::on_access(from, bytes, Access::read, __builtin_return_address(0));
  emulator::on_access(to, bytes, Access::write, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}
extern "C" __attribute__((visibility("default"))) void* __wrap_memset(void* to, int value, size_t bytes) {
  emulator::on_access(to, bytes, Access::write, __builtin_return_address(0));
  return memset(to, value, bytes);
}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_update(void**, void*) {}

// ---- what checks of undefined behaviour call: an error with the line instead of undefined behaviour -----------------

struct SourceLocation {
  const char* file;
  unsigned line, column;
};
struct CheckData {
  SourceLocation where;
};
HOOK __ubsan_handle_type_mismatch_v1_abort(CheckData* data, void* pointer) {
  emulator::fail("line %u: an access to %p, which is misaligned for its type (or null)", data->where.line, pointer);
}
HOOK __ubsan_handle_out_of_bounds_abort(CheckData* data, void* index) {
  emulator::fail("line %u: index %ld is out of bounds of its array", data->where.line, long(index));
}
HOOK __ubsan_handle_shift_out_of_bounds_abort(CheckData* data, void*, void* count) {
  emulator::fail("line %u: a shift by %ld", data->where.line, long(count));
}
