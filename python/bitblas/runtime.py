"""Load an artifact's library, choose the kernel for a number of rows, launch it. Needs no TVM."""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tvm_ffi

from .config import MatmulConfig
from .cuda.compile import load_cubin
from .cuda.dense import DenseMatmul
from .cuda.workspaces import workspaces
from .plan import AnyPlan, AttentionPlan, KernelPlan
from .schedule import MatmulTiling
from .schedule.cuda.dense import DenseTiling, is_dense

if TYPE_CHECKING:
    import tvm

#: Rows below which a kernel is found by a look-up.
_FEW_ROWS = 33
#: Kernels index with 32 bits: no matrix that they walk by rows may have this many elements.
MAX_ELEMENTS = 1 << 31


class Kernels:
    """The kernels of one operator, ready to be called.

    Parameters
    ----------
    module : object
        A loaded tvm_ffi module, or a TVM executable.
    buckets : sequence of (int, str, int)
        (bucket, function name, rows that one launch of it computes at most), ascending.
    dress : callable, optional
        Given a function's name and the function of the module, returns what is called with the operands and the output.
    """

    def __init__(
        self,
        module: object,
        buckets: Sequence[tuple[int, str, int]],
        dress: Callable[[str, Callable[..., None]], Callable[..., None]] = lambda name, function: function,
    ) -> None:
        self.module = module
        self._limits = [m for m, _, _ in buckets]
        found = {name: dress(name, module[name]) for _, name, _ in buckets}  # type: ignore[index]
        self._last = len(buckets) - 1
        self._use([(found[name], slab) for _, name, slab in buckets])

    def _use(self, functions: list[tuple[Callable[..., None], int]]) -> None:
        """Take functions, each with its rows, by bucket; for few rows, whose calls are short, they are looked up by these."""
        self._functions = functions
        self._of_few = [self._find(m) for m in range(_FEW_ROWS)]

    def _find(self, m: int) -> tuple[Callable[..., None], int]:
        return self._functions[min(bisect_left(self._limits, m), self._last)]

    def keep_dense(self) -> Kernels:
        """The same kernels, of which those that decode all weights keep the result."""
        kept = copy(self)
        kept._use(
            [
                (function.keeping() if isinstance(function, DenseMatmul) else function, slab)
                for function, slab in self._functions
            ]
        )
        return kept

    def launch(self, m: int, operands: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Compute `out` from `operands`, all checked before: of a matmul (m, N), contiguous, from A (m, K), the first of them.

        m takes the nearest bucket that is not smaller, beyond the largest that one; more rows than a slab are computed in
        slabs of equal size.
        """
        function, slab = self._of_few[m] if m < _FEW_ROWS else self._find(m)
        if m <= slab:
            function(*operands, out)
            return
        a, *rest = operands
        step = -(-m // -(-m // slab))
        for first in range(0, m, step):
            function(a[first : first + step], *rest, out[first : first + step])


class _WithWorkspace:
    """A kernel that takes two more tensors after its output, to share sums in."""

    def __init__(self, function: Callable[..., None], tiling: MatmulTiling, config: MatmulConfig) -> None:
        self._function, self._tiling, self._config = function, tiling, config

    def __call__(self, a: torch.Tensor, *others: torch.Tensor) -> None:
        sizes = self._tiling.workspace(self._config, a.shape[0])
        self._function(a, *others, *workspaces.get(a.get_device(), *sizes))


def load_kernels(library: Path, plan: AnyPlan) -> Kernels:
    """Load the library that was built from `plan`, for a target that this machine can run; of CUDA kernels, on any machine.

    Kernels for cards are loaded to a device, by the CUDA runtime in the library, when they are first launched there. They run
    on torch's current stream of the device that the tensors are on: tvm_ffi asks torch for it when it takes the first tensor.
    """
    cubin = library.with_suffix(".cubin")  # where NVRTC has made the kernels
    if cubin.exists():
        return _kernels(load_cubin(cubin), plan)
    return _kernels(tvm_ffi.load_module(str(library)), plan)


def wrap_executable(executable: tvm.runtime.Executable, plan: AnyPlan) -> Kernels:
    """Use kernels that TVM has just compiled in memory, and runs on threads of its own."""
    _watch_forks()
    return _kernels(executable.jit(), plan)


def wrap_function(executable: tvm.runtime.Executable, name: str, m: int) -> Kernels:
    """Use one function that TVM has just compiled in memory, always called with `m` rows at once."""
    _watch_forks()
    return Kernels(executable.jit(), [(m, name, m)])


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_compute_alone)


def _compute_alone() -> None:
    """Let a forked child's thread do without TVM's threads, which it believes to have and would wait for for ever."""
    cpus = os.sched_getaffinity(0)
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, 1)
    os.sched_setaffinity(0, cpus)  # which TVM has changed


def tiling_of(kernel: KernelPlan) -> MatmulTiling:
    """The tiling of a kernel of a matmul."""
    assert isinstance(kernel.tiling, MatmulTiling)
    return kernel.tiling


def slab_rows(plan: AnyPlan, kernel: KernelPlan) -> int:
    """Rows that one launch of a kernel computes at most."""
    if isinstance(plan, AttentionPlan):  # which index with 64 bits
        return sys.maxsize
    tiling = tiling_of(kernel)
    indexable = max(1, MAX_ELEMENTS // tiling.row_elements(plan.config, plan.layout) - tiling.block_m)
    return min(tiling.most_rows or indexable, indexable)


def _kernels(module: object, plan: AnyPlan) -> Kernels:
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    slabs = {name: slab_rows(plan, kernel) for name, kernel in kernels.items()}
    if isinstance(plan, AttentionPlan):
        return Kernels(module, [(m, name, slabs[name]) for m, name in plan.buckets])

    def dress(name: str, function: Callable[..., None]) -> Callable[..., None]:
        tiling = tiling_of(kernels[name])
        if isinstance(tiling, DenseTiling):
            return DenseMatmul(None if is_dense(plan.config) else function, plan.config)
        return _WithWorkspace(function, tiling, plan.config) if any(tiling.workspace(plan.config, 1)) else function

    return Kernels(module, [(m, name, slabs[name]) for m, name in plan.buckets], dress)
