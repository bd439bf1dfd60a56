// Texts include it whether they use it or not; nvcuda::wmma is not emulated.
#pragma once
#include <cuda_fp16.h>
