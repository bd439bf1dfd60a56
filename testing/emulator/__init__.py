"""Runs the text of a CUDA operator on the CPU: build it, load it, call it on CPU tensors. See README.md."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tvm_ffi
from filelock import FileLock
from tvm_ffi import libinfo

from .translate import UNKNOWN, TranslationError, translate

__all__ = [
    "BuildError",
    "OrderError",
    "Statistics",
    "TranslationError",
    "bank_conflicts",
    "build",
    "load",
    "reset_statistics",
    "run",
    "set_seed",
    "statistics",
    "translate",
]

_HERE = Path(__file__).parent
_COMPILER = os.environ.get("CXX", "g++")
_COMMON = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden", "-march=native")
_RUNTIME = ("-O2", "-Wall", "-Wno-array-bounds")
_KERNEL = (
    "-Og",  # compiles in two thirds of the time of -O1, and half as fast: as good for a tile or two
    "-w",
    "-g1",  # lines, for messages
    "-fsanitize=thread",  # a call before each access, which the runtime answers: libtsan is not linked
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds,shift-exponent",
    "-fno-sanitize-recover=all",
    "-ftrivial-auto-var-init=pattern",  # local variables start as garbage
    "-fno-threadsafe-statics",
    "-fstack-clash-protection",  # a stack that is full meets its guard page
)


class BuildError(Exception):
    """The compiler refused a text."""


class OrderError(Exception):
    """Results depend on the order in which threads ran."""


# ---- building --------------------------------------------------------------------------------------------------------------


def _execute(*command: str) -> None:
    result = subprocess.run([_COMPILER, *command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{_COMPILER} {' '.join(command)}\n{result.stderr[:6000]}")


def _make(flags: Sequence[str], source: Path, libraries: Sequence[str], target: Path) -> None:
    """
    Compile, then link; the result is written aside and renamed.

    In two steps, because the compiler would link the library of a sanitizer that it is told of.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, library = str(Path(folder, "made.o")), Path(folder, target.name)
        _execute(*_COMMON, *flags, "-c", str(source), "-o", made)
        _execute("-shared", made, *libraries, "-o", str(library))
        library.replace(target)


@functools.cache
def _identity() -> str:
    """A hash of the emulator itself and its compiler."""
    digest = hashlib.sha256(repr((_COMMON, _RUNTIME, _KERNEL)).encode())
    digest.update(subprocess.run([_COMPILER, "-dumpfullversion"], capture_output=True, check=True).stdout)
    for path in sorted([*_HERE.rglob("*.h"), *_HERE.rglob("*.cpp"), *_HERE.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _runtime_path(directory: Path) -> Path:
    return directory / f"libcuda_emulator-{_identity()}.so"


def _build_runtime(directory: Path) -> Path:
    path = _runtime_path(directory)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            source = _HERE / "runtime" / "all.cpp"
            _make([*_RUNTIME, f"-I{_HERE / 'include'}"], source, [f"-Wl,-soname,{path.name}"], path)
    return path


def build(text: str, directory: Path, arch: str = "sm_80") -> Path:
    """
    Compile the text of an operator for the emulator.

    Parameters
    ----------
    text : str
        One translation unit: kernels and the launcher, as `export_cuda_host` writes it. A launcher by TVM has to be built with
        `tirx.disable_assert`, as it would ask for tensors on a GPU.
    directory : Path
        Where libraries are made and found again, by a hash of text, architecture and emulator. Several processes may share it.
    arch : str
        The value of `__CUDA_ARCH__`, as `sm_80`; also limits shared memory.

    Returns
    -------
    Path
        The library, for `load`.

    Raises
    ------
    TranslationError
        Inline assembly or a declaration that the emulator does not know.
    BuildError
        With the compiler's output.
    """
    directory = Path(directory)
    number = re.fullmatch(r"sm_(\d+)a?", arch)
    if number is None:
        raise ValueError(f"arch: {arch!r}; allowed are sm_75, sm_80, sm_90 and the like")
    key = hashlib.sha256(f"{_identity()}\0{arch}\0{text}".encode()).hexdigest()[:24]
    target = directory / f"{key}.so"
    if target.exists():
        return target
    runtime = _build_runtime(directory)
    source = directory / f"{key}.cpp"
    unknown: list[str] = []
    source.write_text(f'#include <cuda_runtime.h>\n#line 1 "{key}.cu"\n{translate(text, unknown)}')
    flags = [*_KERNEL, f"-I{_HERE / 'include'}", f"-I{libinfo.find_include_path()}", f"-D__CUDA_ARCH__={number[1]}0"]
    libraries = ["-Wl,--wrap=memcpy,--wrap=memset", str(runtime), libinfo.find_libtvm_ffi()]
    try:
        _make(flags, source, libraries, target)
    except BuildError as error:
        met = re.search(rf"{UNKNOWN}(\d+)", str(error)) if unknown else None
        if met is not None:
            raise TranslationError(unknown[int(met[1])]) from None
        raise
    return target


class _Loaded:
    """The runtime, once loaded into this process; it has the tensors of one call at a time."""

    library: ctypes.CDLL | None = None
    calls = threading.Lock()


def _runtime(directory: Path | None = None) -> ctypes.CDLL:
    if _Loaded.library is None:
        if directory is None:
            raise RuntimeError("nothing was loaded yet")
        path = _runtime_path(directory)
        try:  # one of another directory, if this process has it: all kernels use the first that was loaded
            library = ctypes.CDLL(path.name, mode=os.RTLD_NOLOAD)
        except OSError:
            library = ctypes.CDLL(str(path))
        library.emulator_set_seed.argtypes = [ctypes.c_uint64]
        library.emulator_allow.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p]
        _Loaded.library = library
    return _Loaded.library


def load(path: Path) -> tvm_ffi.Module:
    """
    Load a library made by `build`; its functions take CPU tensors.

    A fault of a kernel is raised by the call that launched it: the message has the fault, the thread and the block.
    """
    _runtime(Path(path).parent)
    return tvm_ffi.load_module(str(path))


# ---- running ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """
    What ran since the last `reset_statistics`.

    `shared_passes` are those of warps over the banks of shared memory: one for accesses of up to 4 bytes a lane, two for 8,
    four for 16; `shared_conflicts` are the cycles beyond one that they would take. Approximate: g++ may split or join
    accesses in another way than nvcc.
    """

    launches: int
    blocks: int
    threads: int
    barriers: int
    warp_operations: int
    shared_accesses: int
    global_accesses: int
    async_copies: int
    switches: int
    shared_passes: int
    shared_conflicts: int


def set_seed(seed: int) -> None:
    """Choose the order of threads and blocks, and the garbage in shared memory, for launches from now on; 0 at the start."""
    _runtime().emulator_set_seed(seed)


def statistics() -> Statistics:
    """Counts of all launches since the last `reset_statistics`."""
    counts = (ctypes.c_long * len(Statistics.__dataclass_fields__))()
    _runtime().emulator_statistics(counts)
    return Statistics(*counts)


class _LineConflicts(ctypes.Structure):
    _fields_ = (("line", ctypes.c_int), ("passes", ctypes.c_long), ("extra_cycles", ctypes.c_long))


def bank_conflicts() -> dict[int, tuple[int, int]]:
    """Passes over the banks of shared memory and extra cycles, by line of the text that ran last; see `Statistics`."""
    lines = (_LineConflicts * 4096)()
    count = _runtime().emulator_conflicts(lines, len(lines))
    return {one.line: (one.passes, one.extra_cycles) for one in lines[:count]}


def reset_statistics() -> None:
    """Start counting anew."""
    _runtime().emulator_reset_statistics()


def _call_checked(function: Any, arguments: Sequence[Any]) -> None:
    """Call with every access to global memory checked against the tensors given."""
    library = _runtime()
    library.emulator_allow(0, 0, b"nothing")
    for number, tensor in enumerate(arguments):
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            size = _span(tensor) * tensor.element_size()
            library.emulator_allow(tensor.data_ptr(), size, f"argument {number} {tuple(tensor.shape)}".encode())
    try:
        function(*arguments)
    finally:
        library.emulator_allow_all()


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the strides, and what lies in gaps."""
    if tensor.is_contiguous():
        return tensor.clone()
    return tensor.as_strided((_span(tensor),), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def run(function: Any, *arguments: Any, seeds: Sequence[int] = (0, 1), identical: bool = True) -> Statistics:
    """
    Call an emulated operator in several orders of its threads, with accesses beyond its tensors caught.

    Parameters
    ----------
    function : tvm_ffi.Function
        Of a module that `load` returned.
    *arguments : torch.Tensor or int
        Tensors on the CPU. Each order starts from copies of them, strides and gaps included; in the end those that are
        contiguous hold the results.
    seeds : sequence of int
        The orders.
    identical : bool
        Results have to be the same, bit by bit, in every order. False for kernels that add floats by atomics.

    Returns
    -------
    Statistics
        Of the last order.

    Raises
    ------
    OrderError
        Results differ between two orders.
    RuntimeError
        A fault of the kernel; its kind is `CUDAError`.
    """
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]
    first: list[Any] | None = None
    counts = statistics()
    for seed in seeds:
        copies = [_copied(argument) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        with _Loaded.calls:
            set_seed(seed)
            reset_statistics()
            _call_checked(function, copies)
            counts = statistics()
        if first is None:
            first = copies
        elif identical:
            for i in tensors:
                wrong = int((_bits(first[i]) != _bits(copies[i])).sum())
                if wrong:
                    raise OrderError(
                        f"argument {i} differs in {wrong} bytes between the orders of seeds {seeds[0]} and {seed}"
                    )
    if first is not None:
        for i in tensors:
            if arguments[i].is_contiguous():
                arguments[i].copy_(first[i])
    return counts
