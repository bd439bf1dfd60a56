"""Rules for AVX-512: codes of up to 4 bits are looked up by one permutation of a register."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rule import Problem, ScheduleRule, Tiling
from .tilings import SMALL_M, decode_in_registers, decode_to_panel

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir import Schedule


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
        return decode_in_registers(problem, [(problem.m, width) for width in widths])


class Avx512Gemm(_Avx512Rule):
    """Any number of rows: up to 24 of the 32 registers hold sums, and weights are decoded once."""

    name = "avx512_gemm"

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        shapes = [(8, 3), (6, 4), (12, 2), (4, 6), (8, 2), (5, 5), (4, 4)]
        if problem.m < 8:
            shapes.insert(0, (problem.m, min(6, 24 // problem.m)))
        return decode_to_panel(problem, shapes)
