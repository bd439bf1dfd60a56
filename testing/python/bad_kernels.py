"""Libraries whose kernel does something else than to compute."""

import subprocess

from bitblas.build import find_compiler

#: What TVM calls an exported function, and how one reports success.
_FUNCTION = """
void _exit(int);
int __tvm_ffi_matmul_0(void* self, const void* args, int num_args, void* result) {{ {}; return 0; }}
"""
BODIES = {
    "crashes": "__builtin_trap()",
    "segfaults": "*(volatile int*)8 = 1",
    "hangs": 'for (;;) __asm__ volatile("")',
    "lies": "",
    "exits": "_exit(3)",
}


def library(directory, what):
    """A library in a directory."""
    source, target = directory / f"{what}.c", directory / f"{what}.so"
    source.write_text(_FUNCTION.format(BODIES[what]))
    subprocess.run([*find_compiler().split(), "-shared", "-fPIC", "-o", target, source], check=True)
    return target


#: The same for a card: the body of a kernel that is launched once, by one thread.
_CARD_FUNCTION = """
#include <cuda_runtime.h>
__global__ void work() {{ {}; }}
extern "C" int __tvm_ffi_matmul_0(void* self, const void* args, int num_args, void* result) {{ {}; return 0; }}
"""
CARD_BODIES = {
    "strays": "*(volatile int*)8 = 1",
    "hangs": 'for (;;) asm volatile("" ::: "memory")',
    "lies": None,
}


def card_library(directory, what):
    """A library for cards in a directory, made by nvcc."""
    source, target = directory / f"{what}.cu", directory / f"{what}.so"
    body = CARD_BODIES[what]
    source.write_text(_CARD_FUNCTION.format(body or "", "work<<<1, 1>>>()" if body else ""))
    subprocess.run(["nvcc", "-shared", "-Xcompiler", "-fPIC", "-arch=native", "-o", target, source], check=True)
    return target
