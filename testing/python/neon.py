"""Kernels for ARM, run by qemu on any machine: a program that calls them, linked without a library, and its calls in a file."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from bitblas import build
from bitblas.sources import source_dir

CC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
DRIVER = Path(__file__).parents[1] / "native" / "call_kernel.c"
#: A target that has sdot, and two that have not.
N1, A72, GENERIC = "neoverse-n1", "cortex-a72", "llvm -mtriple=aarch64-linux-gnu"
#: The driver's kernels, by number.
KERNELS = (*(f"matmul_{i}" for i in range(4)), *(f"attention_{i}" for i in range(4)))

#: DLPack's type codes of what is no IEEE float.
_TYPE_CODES = {torch.int8: 0, torch.int32: 0, torch.bfloat16: 4}


def run_tool(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def compile_driver(folder):
    """The driver and the parallel loops, compiled; skips what would run where it cannot."""
    from tvm_ffi.libinfo import include_paths

    missing = [tool for tool in (CC, QEMU) if shutil.which(tool) is None]
    if CC not in missing and not Path(run_tool(CC, "-print-file-name=libc.a").strip()).is_absolute():
        missing.append(f"libc.a of {CC}")
    if missing:
        install = "apt install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
        pytest.skip(f"NEON KERNELS WERE NOT RUN, for want of {', '.join(missing)}. On Debian and Ubuntu: {install}")
    found = []
    includes = [f"-I{path}" for path in include_paths()]
    for source, flags in ((DRIVER, ["-Wall", "-Wextra", "-Werror"]), (source_dir() / "cpu" / "parallel.c", [])):
        found.append(str(folder / f"{source.stem}.o"))
        run_tool(CC, "-std=gnu11", "-O2", "-fopenmp", *flags, *includes, "-c", str(source), "-o", found[-1])
    return found


def link(plan, objects, program):
    """Make a program of a plan's kernels, which needs no library where it runs."""

    def fcompile(output, kernels, **_options):
        run_tool(CC, "-static", "-fopenmp", "-o", output, *objects, *kernels, "-lm")

    build.compile_plan(plan)[0].export_library(str(program), fcompile=fcompile)


def run(program, target, calls):
    """The outputs of calls, each a kernel's name, its operands, and a tensor of the output's shape and dtype, one for all."""
    written, outputs = program.with_suffix(".calls"), program.with_suffix(".outputs")
    written.write_bytes(b"".join(_serialized(*call) for call in calls))
    cpu = "cortex-a53" if target.mcpu == "generic" else target.mcpu  # which refuses what it does not have
    run_tool(QEMU, "-cpu", cpu, "-E", "OMP_NUM_THREADS=2", str(program), str(written), str(outputs))
    outs = [out for _, _, out in calls]
    values = torch.frombuffer(bytearray(outputs.read_bytes()), dtype=outs[0].dtype)
    parts = values.split([out.numel() for out in outs])  # which raises where the lengths do not add up
    return [part.view(out.shape) for part, out in zip(parts, outs, strict=True)]


def _serialized(name, operands, out):
    """One call, as the driver reads it."""
    parts = [struct.pack("<2q", KERNELS.index(name), len(operands) + 1)]
    for tensor in (*operands, out):
        code, bits = _TYPE_CODES.get(tensor.dtype, 2), tensor.dtype.itemsize * 8
        parts.append(struct.pack(f"<{3 + tensor.dim()}q", code, bits, tensor.dim(), *tensor.shape))
        if tensor is not out:
            parts.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(parts)
