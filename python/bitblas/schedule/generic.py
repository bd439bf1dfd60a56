"""The rule for any LLVM target: the same loops, with vectors that LLVM splits to the width of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..layout import LANES
from .rule import Problem, ScheduleRule, Tiling
from .tilings import SMALL_M, decode_in_registers, decode_to_panel

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir import Schedule


class GenericLlvm(ScheduleRule):
    """Decodes by arithmetic, with no intrinsic of any machine; three quarters of the registers hold sums."""

    name = "generic_llvm"

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        return None if problem.target.kind == "llvm" else f"is for llvm targets, not {problem.target}"

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        target, m = problem.target, problem.m
        registers_per_block = LANES * 32 // target.vector_bits
        sums = max(1, target.num_vector_registers * 3 // 4 // registers_per_block)
        if m <= SMALL_M:
            return decode_in_registers(problem, [(m, width) for width in (max(1, sums // m), 2, 1)])
        rows = min(m, sums)
        return decode_to_panel(problem, [(rows, max(1, sums // rows)), (max(1, sums // 2), 2), (max(1, sums // 2), 1)])

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: Tiling) -> Schedule:
        """See `ScheduleRule`."""
        from .lanes import schedule_lanes

        return schedule_lanes(func, problem, tiling, None)
