"""The rule for any LLVM target: the same loops, with vectors that LLVM splits to the width of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..layout import LANES
from .avx512 import SERIAL_WORK
from .rule import Problem, ScheduleRule, Tiling

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir import Schedule


class GenericLlvm(ScheduleRule):
    """Arithmetic decode, no intrinsic of any machine."""

    name = "generic_llvm"

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        return None if problem.target.kind == "llvm" else f"is for llvm targets, not {problem.target}"

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        target = problem.target
        accumulators = max(1, target.num_vector_registers * target.vector_bits // (LANES * 32) * 3 // 4)
        parallel = problem.work > SERIAL_WORK
        found = []
        for rows in (min(problem.m, accumulators), 2, 1):
            blocks = min(max(1, accumulators // rows), problem.lane_blocks, 4)
            tiling = Tiling(rows, blocks * LANES, 8, parallel=parallel)
            if rows <= problem.m and tiling not in found:
                found.append(tiling)
        return found

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: Tiling) -> Schedule:
        """See `ScheduleRule`."""
        from .lanes import schedule_lanes

        return schedule_lanes(func, problem, tiling, None)
