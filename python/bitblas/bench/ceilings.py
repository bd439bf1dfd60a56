"""What binds a kernel: small C loops that read, multiply or decode and do nothing else, to be timed in turns with it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..build import find_compiler
from ..errors import BuildError
from ..ops import Matmul
from ..schedule import LaneTiling
from ..sources import source_dir
from .timing import Candidate, Verdict

#: What multiplies: float32, bytes in int32 (VNNI), bfloat16 in float32.
UNITS = ("fma", "int8", "bf16")
#: How long one call of a loop takes, about: long beside the start of its threads, short beside a turn.
CALL_SECONDS = 2e-3
_FIRST_STEPS = 1000
#: Rows from which the weights' way from memory does not bind any kernel.
_MANY_ROWS = 64
_SOURCES = ("peak.c", "decode.c")


@dataclass(frozen=True)
class Ceiling:
    """A loop that does one thing as fast as this machine can.

    Attributes
    ----------
    name : str
        ``"bandwidth"``, a unit (``"fma"``, ``"int8"``, ``"bf16"``), or ``"decode …"`` and the kind of loop.
    run : callable
        Does it once.
    work : int
        How much that is: bytes read, multiply-accumulates done, bytes of weights decoded and multiplied.
    """

    name: str
    run: Callable[[], object]
    work: int

    def candidate(self) -> Candidate:
        """To be timed in turns with kernels; its result needs no check."""
        return Candidate(self.name, lambda index: self.run(), lambda result: Verdict(0.0, True), "")

    def rate(self, calls: int) -> float:
        """The best of some calls, per second."""
        best = 0.0
        for _ in range(calls):
            began = time.perf_counter()
            self.run()
            best = max(best, self.work / (time.perf_counter() - began))
        return best


class Probes:
    """The loops, built on the spot with a C compiler.

    Raises
    ------
    BuildError
        There is no C compiler, or it failed.
    """

    def __init__(self) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise BuildError("there is no C compiler (cc, gcc or clang); install one, such as Debian's gcc")
        with tempfile.TemporaryDirectory(prefix="bitblas-peak-") as directory:
            self._library = _compile(compiler, Path(directory) / "peak.so")
        self._buffer = torch.empty(0, dtype=torch.int64)
        self._known: dict[tuple[str, int, bool], Ceiling | None] = {}

    def bandwidth(self, size: int, threads: int) -> Ceiling:
        """Reading `size` bytes of memory."""
        read, fill = self._library["bitblas_read"], self._library["bitblas_fill"]
        fill.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        read.argtypes, read.restype = [*fill.argtypes, ctypes.c_void_p], ctypes.c_int64
        if self._buffer.numel() * 8 != size:
            self._buffer = torch.empty(size // 8, dtype=torch.int64)
            fill(self._buffer.data_ptr(), self._buffer.numel(), threads)
        words, checksum = self._buffer, ctypes.c_uint64()

        def run() -> int:
            return read(words.data_ptr(), words.numel(), threads, ctypes.addressof(checksum))

        return Ceiling("bandwidth", run, run())

    def unit(self, name: str, threads: int) -> Ceiling | None:
        """The multiply-accumulates of a unit; None where this CPU has none of it."""
        loop = self._library[f"bitblas_peak_{name}"]
        loop.argtypes, loop.restype = [ctypes.c_int64, ctypes.c_int], ctypes.c_int64
        return self._kept(name, threads, False, lambda steps: loop(steps, threads))

    def decode(self, kind: str, threads: int, wide: bool = True) -> Ceiling | None:
        """Weights in registers that are decoded and multiplied with one row; None where there is no such loop.

        Parameters
        ----------
        kind : str
            See `decode_kind`.
        threads : int
            How many.
        wide : bool
            Whether AVX-512 may be used.
        """
        loop = self._library["bitblas_decode"]
        loop.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        loop.restype = ctypes.c_int64
        return self._kept(f"decode {kind}", threads, wide, lambda steps: loop(kind.encode(), steps, threads, int(wide)))

    def _kept(self, name: str, threads: int, wide: bool, loop: Callable[[int], int]) -> Ceiling | None:
        key = (name, threads, wide)
        if key not in self._known:
            self._known[key] = None if loop(1) < 0 else _calibrated(name, loop)
        return self._known[key]

    def of(self, op: Matmul, m: int, read_bytes: int, threads: int) -> list[Ceiling]:
        """What may bind the kernel that an operator runs for m rows, reading, decoding, multiplying; and float32 products.

        The last are what float activations are held against even where another unit multiplies them.
        """
        found: list[Ceiling | None] = [self.bandwidth(read_bytes, threads)] if m < _MANY_ROWS else []
        kind, unit = decode_kind(op, m), unit_of(op, m)
        if m == 1 and kind:
            found.append(self.decode(kind, threads, "avx512bw" in op.target.features))
        found.append(self.unit(unit, threads))
        if unit != "fma" and not op.config.integer_products:
            found.append(self.unit("fma", threads))
        return [ceiling for ceiling in found if ceiling is not None]


def _calibrated(name: str, loop: Callable[[int], int]) -> Ceiling:
    """A ceiling whose call takes about `CALL_SECONDS`."""
    steps, taken = _FIRST_STEPS, 0.0
    while taken < CALL_SECONDS / 2:
        steps *= 2
        runs = []
        for _ in range(3):
            began = time.perf_counter()
            loop(steps)
            runs.append(time.perf_counter() - began)
        taken = min(runs)
    return Ceiling(name, lambda: loop(steps), loop(steps))


def _compile(compiler: str, output: Path) -> ctypes.CDLL:
    sources = [str(source_dir() / "cpu" / name) for name in _SOURCES]
    command = [compiler, "-shared", "-fPIC", "-O3", "-fopenmp", "-o", str(output), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"the C compiler could not build {' and '.join(_SOURCES)}", " ".join(command), done.stderr)
    return ctypes.CDLL(str(output))


def _tiling(op: Matmul, m: int) -> LaneTiling:
    """Of the kernel that runs for m rows."""
    buckets = op.plan.buckets
    name = next((name for most, name in buckets if m <= most), buckets[-1][1])
    tiling = next(kernel.tiling for kernel in op.plan.kernels if kernel.name == name)
    assert isinstance(tiling, LaneTiling)
    return tiling


def unit_of(op: Matmul, m: int) -> str:
    """Which unit multiplies for m rows: ``"int8"``, ``"bf16"`` or ``"fma"``."""
    dot = _tiling(op, m).dot
    return "bf16" if dot == "bf16" else "int8" if dot else "fma"


def products_of(op: Matmul, m: int) -> int:
    """How many products of its unit make one multiply-accumulate for m rows: of each slice of a float activation one."""
    return _tiling(op, m).slices or 1


def decode_kind(op: Matmul, m: int) -> str:
    """By which kind of loop in `src/cpu/decode.c` the weights are decoded for one row; empty where there is none."""
    fmt, unit, products = op.config.format, unit_of(op, m), products_of(op, m)
    if fmt.is_native:
        return ""
    if unit == "bf16":
        return f"pairs{fmt.bits}"
    if unit == "int8":
        return f"dots{fmt.bits}" + (f"x{products}" if products > 1 else "")
    if fmt.codebook:
        return f"codebook{fmt.bits}"
    if fmt.bits == 8:
        return fmt.name
    return f"table{fmt.bits}" if fmt.bits in (1, 2, 4) else f"planes{fmt.bits}"
