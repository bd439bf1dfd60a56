// Barriers, shuffles and votes. Each takes the line of its call, so that a message can name it.
#pragma once
#include <emulator/core.h>

#define EMULATOR_LINE int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_LINE) { emulator::barrier(0, 0, true, emulator::Reduce::none, 0, line); }
inline int __syncthreads_or(int predicate, EMULATOR_LINE) {
  return emulator::barrier(0, 0, true, emulator::Reduce::any_set, predicate, line);
}
inline int __syncthreads_and(int predicate, EMULATOR_LINE) {
  return emulator::barrier(0, 0, true, emulator::Reduce::all_set, predicate, line);
}
inline int __syncthreads_count(int predicate, EMULATOR_LINE) {
  return emulator::barrier(0, 0, true, emulator::Reduce::count, predicate, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_LINE) { emulator::warp_barrier(mask, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline unsigned __activemask() { return emulator::active_mask(); }
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_LINE) {
  return emulator::ballot(mask, predicate != 0, line);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_LINE) {
  return emulator::ballot(mask, predicate != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_LINE) {
  return emulator::ballot(mask, predicate == 0, line) == 0;
}

namespace emulator {
template <typename T>
inline T shuffled(Shuffle mode, unsigned mask, T value, int operand, int width, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("line %d: a shuffle of width %d", line, width);
  uint32_t words[2] = {0, 0};
  memcpy(words, &value, sizeof(T));
  const int clamp = (32 - width) << 8 | (mode == Shuffle::up ? 0 : 31);
  shuffle(mode, mask, words, (sizeof(T) + 3) / 4, operand, clamp, line);
  memcpy(&value, words, sizeof(T));
  return value;
}
}  // namespace emulator

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_LINE) {
  return emulator::shuffled(emulator::Shuffle::index, mask, value, source, width, line);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_LINE) {
  return emulator::shuffled(emulator::Shuffle::up, mask, value, int(delta), width, line);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_LINE) {
  return emulator::shuffled(emulator::Shuffle::down, mask, value, int(delta), width, line);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_LINE) {
  return emulator::shuffled(emulator::Shuffle::butterfly, mask, value, lanes, width, line);
}

#define EMULATOR_REDUCE(NAME, T, FOLD)                                                   \
  inline T NAME(unsigned mask, T value, EMULATOR_LINE) {                                 \
    return T(emulator::warp_fold(emulator::Fold::FOLD, mask, int64_t(value), line));     \
  }
EMULATOR_REDUCE(__reduce_add_sync, int, add)
EMULATOR_REDUCE(__reduce_min_sync, int, min)
EMULATOR_REDUCE(__reduce_max_sync, int, max)
EMULATOR_REDUCE(__reduce_add_sync, unsigned, add)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, min)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, max)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, bit_and)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, bit_or)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef EMULATOR_REDUCE

inline size_t __cvta_generic_to_shared(const void* pointer) { return emulator::shared_address(pointer); }
inline void* __cvta_shared_to_generic(size_t address) { return emulator::shared_arena() + address; }
inline size_t __cvta_generic_to_global(const void* pointer) { return size_t(pointer); }
inline void* __cvta_global_to_generic(size_t address) { return (void*)address; }
