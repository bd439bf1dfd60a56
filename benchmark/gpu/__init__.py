"""Benchmarks of bitblas on a graphics card beside cuBLAS and other libraries' kernels for low-bit weights."""
