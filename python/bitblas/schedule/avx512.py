"""Rules for AVX-512: codes of up to 4 bits are looked up by one permutation of a register."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..layout import LANES
from .rule import Problem, ScheduleRule, Tiling

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir import Schedule

#: Multiply-accumulates below which starting threads costs more than they save.
SERIAL_WORK = 1 << 16

#: Rows up to which one tile of rows holds them all, so that weights are decoded exactly once.
SMALL_M = 4


#: k that are decoded into a panel at a time: 128 · 64 columns of float32 fit an L1 cache of 48 KB beside the activations.
PANEL_K = 128

#: Rows of one launch: their activations, 256 · 4096 of float32, stay in caches beyond the first.
SLAB_M = 256


class _Avx512Rule(ScheduleRule):
    def decline(self, problem: Problem) -> str | None:
        if "avx512f" not in problem.target.features:
            return f"needs avx512f, which {problem.target} lacks"
        return None

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: Tiling) -> Schedule:
        from .intrinsics import avx512_table
        from .lanes import schedule_lanes

        fmt = problem.config.format
        return schedule_lanes(func, problem, tiling, avx512_table(fmt.name) if fmt.bits <= 4 else None)


class Avx512SmallM(_Avx512Rule):
    """Up to four rows: all rows at once, many columns, so that as many loads as possible are on their way."""

    name = "avx512_small_m"

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        reason = super().decline(problem)
        if reason is None and problem.m > SMALL_M:
            reason = f"is for at most {SMALL_M} rows, not {problem.m}"
        return reason

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        widths = {1: (8, 4, 2), 2: (6, 4, 2), 3: (4, 2, 6), 4: (4, 2, 1)}[problem.m]
        return _tilings(problem, [(problem.m, width) for width in widths])


class Avx512Gemm(_Avx512Rule):
    """Any number of rows, in register tiles."""

    name = "avx512_gemm"

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        if problem.m <= SMALL_M:
            return _tilings(problem, [(problem.m, 2), (problem.m, 4), (problem.m, 1)])
        shapes = [(8, 2), (12, 2), (6, 4), (4, 4), (4, 6)]
        return [
            replace(tiling, chunk_k=PANEL_K, panel=True, slab_m=SLAB_M // tiling.block_m * tiling.block_m)
            for tiling in _tilings(problem, shapes)
        ]


def _tilings(problem: Problem, shapes: list[tuple[int, int]]) -> list[Tiling]:
    """Register tiles of rows × blocks of sixteen columns; a tile is never wider than the output."""
    parallel = problem.work > SERIAL_WORK
    found = []
    for rows, blocks in shapes:
        tiling = Tiling(rows, min(blocks, problem.lane_blocks) * LANES, 8, parallel=parallel)
        if tiling not in found:
            found.append(tiling)
    return found
