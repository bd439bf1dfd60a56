"""Load an artifact's library, choose the kernel for a number of rows, launch it. Needs no TVM."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tvm_ffi

from .plan import MatmulPlan

if TYPE_CHECKING:
    import tvm

#: Kernels index with 32 bits: no matrix that they walk by rows may have this many elements.
MAX_ELEMENTS = (1 << 31) - (1 << 24)
#: Rows of a slab are a multiple of this, so that only the last one has a tail.
_SLAB_MULTIPLE = 64


class Kernels:
    """The kernels of one operator, ready to be called.

    Parameters
    ----------
    module : object
        A loaded tvm_ffi module, or a TVM executable.
    buckets : sequence of (int, str)
        (bucket, function name), ascending.
    slab : int
        Rows that one launch computes at most.
    """

    def __init__(self, module: object, buckets: Sequence[tuple[int, str]], slab: int) -> None:
        self.module = module
        self._slab = slab
        self._last = len(buckets) - 1
        self._limits = [m for m, _ in buckets]
        found = {name: module[name] for _, name in buckets}  # type: ignore[index]
        self._functions: list[Callable[..., None]] = [found[name] for _, name in buckets]

    def launch(self, m: int, operands: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Compute `out` (m, N) from A (m, K), the first of `operands`; all contiguous, and checked before.

        m takes the nearest bucket that is not smaller, beyond the largest that one; more rows than a slab
        are computed slab by slab.
        """
        if m <= self._slab:
            self._functions[min(bisect_left(self._limits, m), self._last)](*operands, out)
            return
        a, *rest = operands
        for first in range(0, m, self._slab):
            last = min(first + self._slab, m)
            self.launch(last - first, [a[first:last], *rest], out[first:last])


def load_kernels(library: Path, plan: MatmulPlan) -> Kernels:
    """Load the CPU library that was built from `plan`.

    Raises
    ------
    UnsupportedError
        This machine cannot run code for the plan's target.
    """
    plan.target.check_runnable()
    return _kernels(tvm_ffi.load_module(str(library)), plan)


def wrap_executable(executable: tvm.runtime.Executable, plan: MatmulPlan) -> Kernels:
    """Use kernels that TVM has just compiled in memory."""
    plan.target.check_runnable()
    return _kernels(executable.jit(), plan)


def _kernels(module: object, plan: MatmulPlan) -> Kernels:
    indexable = MAX_ELEMENTS // max(plan.config.N, plan.config.K) // _SLAB_MULTIPLE * _SLAB_MULTIPLE
    slabs = [kernel.tiling.slab_m for kernel in plan.kernels if kernel.tiling.slab_m]
    return Kernels(module, plan.buckets, min([max(1, indexable), *slabs]))
