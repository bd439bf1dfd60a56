"""Load an artifact's library, choose the kernel for a number of rows, launch it. Needs no TVM."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .target import Target

if TYPE_CHECKING:
    import tvm

#: Kernels index with 32 bits: no matrix that they walk by rows may have this many elements.
MAX_ELEMENTS = 1 << 31


class Kernels:
    """The kernels of one operator, ready to be called.

    Parameters
    ----------
    module : object
        A loaded tvm_ffi module, or a TVM executable.
    buckets : sequence of (int, str)
        (bucket, function name), ascending.
    """

    def __init__(self, module: object, buckets: Sequence[tuple[int, str]]) -> None:
        self.module = module
        self._limits = [m for m, _ in buckets]
        found = {name: module[name] for _, name in buckets}  # type: ignore[index]
        self._functions: list[Callable[..., None]] = [found[name] for _, name in buckets]

    def select(self, m: int) -> Callable[..., None]:
        """The kernel for `m` rows: of the nearest bucket that is not smaller, beyond the largest of that one."""
        return self._functions[min(bisect_left(self._limits, m), len(self._limits) - 1)]

    def launch(self, a: torch.Tensor, operands: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Compute `out` (m, N) from `a` (m, K), both contiguous, in slabs where 32-bit indices would not do."""
        m = a.shape[0]
        slab = MAX_ELEMENTS // max(a.shape[1], out.shape[1]) - 64
        if m <= slab:
            self.select(m)(a, *operands, out)
            return
        for first in range(0, m, slab):
            rows = min(slab, m - first)
            self.select(rows)(a[first : first + rows], *operands, out[first : first + rows])


def load_kernels(library: Path, target: Target, buckets: Sequence[tuple[int, str]]) -> Kernels:
    """Load a CPU library.

    Raises
    ------
    UnsupportedError
        This machine cannot run code for `target`.
    """
    target.check_runnable()
    import tvm_ffi

    return Kernels(tvm_ffi.load_module(str(library)), buckets)


def wrap_executable(executable: tvm.runtime.Executable, target: Target, buckets: Sequence[tuple[int, str]]) -> Kernels:
    """Use kernels that TVM has just compiled in memory."""
    target.check_runnable()
    return Kernels(executable.jit() if hasattr(executable, "jit") else executable, buckets)
