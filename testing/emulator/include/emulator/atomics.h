// Atomic operations. Blocks run one after the other and fibers switch only at barriers and warp operations, so that a plain
// read and write is atomic; the memory checker is told that it was meant to be.
#pragma once
#include <emulator/core.h>

// `NAME(p, value)` replaces *p by EXPRESSION, made of `old` and `value`, and returns `old`.
#define EMULATOR_ATOMIC(NAME, T, EXPRESSION)                      \
  EMULATOR_PLAIN inline T NAME(T* p, T value) {                   \
    emulator::touch(p, sizeof(T), emulator::Access::atomic);      \
    const T old = *p;                                             \
    *p = EXPRESSION;                                              \
    return old;                                                   \
  }
#define EMULATOR_ATOMIC_INTEGER(T)                       \
  EMULATOR_ATOMIC(atomicMin, T, value < old ? value : old) \
  EMULATOR_ATOMIC(atomicMax, T, old < value ? value : old) \
  EMULATOR_ATOMIC(atomicAnd, T, old& value)              \
  EMULATOR_ATOMIC(atomicOr, T, old | value)              \
  EMULATOR_ATOMIC(atomicXor, T, old ^ value)             \
  EMULATOR_PLAIN inline T atomicCAS(T* p, T expected, T value) { \
    emulator::touch(p, sizeof(T), emulator::Access::atomic);     \
    const T old = *p;                                            \
    if (old == expected) *p = value;                             \
    return old;                                                  \
  }
EMULATOR_ATOMIC_INTEGER(int)
EMULATOR_ATOMIC_INTEGER(unsigned)
EMULATOR_ATOMIC_INTEGER(unsigned long long)
EMULATOR_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(value)))
EMULATOR_ATOMIC(atomicAdd, unsigned, old + value)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicAdd, double, old + value)
EMULATOR_ATOMIC(atomicSub, int, int(unsigned(old) - unsigned(value)))
EMULATOR_ATOMIC(atomicSub, unsigned, old - value)
EMULATOR_ATOMIC(atomicExch, int, value)
EMULATOR_ATOMIC(atomicExch, unsigned, value)
EMULATOR_ATOMIC(atomicExch, unsigned long long, value)
EMULATOR_ATOMIC(atomicExch, float, value)
EMULATOR_ATOMIC(atomicInc, unsigned, old >= value ? 0u : old + 1u)
EMULATOR_ATOMIC(atomicDec, unsigned, old == 0u || old > value ? value : old - 1u)
#undef EMULATOR_ATOMIC_INTEGER
