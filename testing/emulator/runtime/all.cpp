// The runtime as one translation unit, which compiles in a third of the time.
#include "banks.cpp"
#include "fibers.cpp"
#include "launch.cpp"
#include "matrix.cpp"
#include "memory.cpp"
#include "warp.cpp"
