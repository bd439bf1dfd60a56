// CUDA's short vector types, with the alignments of CUDA, so that misaligned vector accesses are seen.
#pragma once
#include <cstdint>

#define EMULATOR_VECTORS(T, N, A2, A4)                                                              \
  struct N##1 {                                                                                     \
    T x;                                                                                            \
  };                                                                                                \
  struct alignas(A2) N##2 {                                                                         \
    T x, y;                                                                                         \
  };                                                                                                \
  struct N##3 {                                                                                     \
    T x, y, z;                                                                                      \
  };                                                                                                \
  struct alignas(A4) N##4 {                                                                         \
    T x, y, z, w;                                                                                   \
  };                                                                                                \
  inline N##1 make_##N##1(T x) { return {x}; }                                                      \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                              \
  inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }                                      \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(long, long, 16, 16)
EMULATOR_VECTORS(unsigned long, ulong, 16, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
#undef EMULATOR_VECTORS
