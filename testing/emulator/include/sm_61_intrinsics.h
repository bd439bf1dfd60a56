// Everything of it (__dp4a and the like) is in emulator/math.h.
#pragma once
#include <cuda_runtime.h>
