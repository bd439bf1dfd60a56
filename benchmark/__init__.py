"""Benchmarks of bitblas beside other libraries; `bitblas.bench` does the measuring."""
