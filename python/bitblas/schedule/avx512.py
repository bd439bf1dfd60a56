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


#: How far ahead weights are asked for where each is used once, the best first: at 1024 a 4-bit kernel of 4096 x 4096 took
#: 392 us where without it took 426.
PREFETCH_BYTES = (1024, 0, 2048)

#: k that are decoded into a panel at a time: 128 · 64 columns of float32 fit an L1 cache of 48 KB beside the activations.
PANEL_K = 128

#: Rows of one launch, which bounds the float32 copy of their activations to 512 · K.
SLAB_M = 512


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
        tilings = _tilings(problem, [(problem.m, width) for width in widths])
        return [replace(tiling, prefetch=ahead) for ahead in PREFETCH_BYTES for tiling in tilings]


class Avx512Gemm(_Avx512Rule):
    """Any number of rows, in register tiles."""

    name = "avx512_gemm"

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        if problem.m <= SMALL_M:
            return _tilings(problem, [(problem.m, 2), (problem.m, 4), (problem.m, 1)])
        shapes = [(8, 3), (6, 4), (12, 2), (4, 6), (8, 2), (5, 5), (4, 4)]
        if problem.m < 8:
            shapes.insert(0, (problem.m, 24 // problem.m))
        shapes.sort(key=lambda shape: _padded_work(problem, *shape))
        return [
            replace(tiling, block_k=4, chunk_k=PANEL_K, panel=True, slab_m=SLAB_M // tiling.block_m * tiling.block_m)
            for tiling in _tilings(problem, shapes)
        ]


def _padded_work(problem: Problem, rows: int, blocks: int) -> float:
    """What is computed for whole tiles, in twentieths of what is asked: less than that makes no difference."""
    padded_m = -(-problem.m // rows) * rows / problem.m
    padded_n = -(-problem.lane_blocks // blocks) * blocks / problem.lane_blocks
    return int(padded_m * padded_n * 20)


def _tilings(problem: Problem, shapes: list[tuple[int, int]]) -> list[Tiling]:
    """Register tiles of rows × blocks of sixteen columns; a tile is never wider than the output."""
    parallel = problem.work > SERIAL_WORK
    found = []
    for rows, blocks in shapes:
        tiling = Tiling(rows, min(blocks, problem.lane_blocks) * LANES, 8, parallel=parallel)
        if tiling not in found:
            found.append(tiling)
    return found
