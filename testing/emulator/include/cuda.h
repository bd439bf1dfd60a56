// Stands in for the CUDA driver's header: generated texts include it and use nothing of it.
#pragma once
#include "cuda_runtime.h"
