"""Rules that multiply in float32, one product a lane, by the vector unit of each instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..formats import DataFormat
from ..target import Target
from .rule import Problem, ScheduleRule, Tiling
from .tilings import SMALL_M, decode_in_registers, decode_to_panel, small_shapes, sum_shapes, tall_shapes

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir import Schedule


@dataclass(frozen=True)
class FloatUnit:
    """A vector unit that multiplies float32.

    Attributes
    ----------
    name : str
        What rules are called after.
    feature : str
        The instruction set that it needs; empty for any.
    vector_lanes : int
        Lanes of float32 in its registers; 0 means those of the target.
    lookup : str
        Its row in `bitblas.schedule.intrinsics.LOOKUPS`: how it finds a value in a table; empty where it has no way.
    lookup_bits : int
        Widest integer codes that are looked up and not computed; codebooks always are.
    """

    name: str
    feature: str = ""
    vector_lanes: int = 0
    lookup: str = ""
    lookup_bits: int = 0

    def decline(self, target: Target) -> str | None:
        """Say why it is not there on a target; None where it is."""
        if self.feature and self.feature not in target.features:
            return f"needs {self.feature}, which {target} lacks"
        return None

    def looks_up(self, fmt: DataFormat) -> bool:
        """Whether codes of a format are looked up in a table."""
        return bool(self.lookup) and (bool(fmt.codebook) or fmt.bits <= self.lookup_bits)

    def lanes(self, target: Target) -> int:
        """Lanes of float32 in a register."""
        return self.vector_lanes or target.vector_bits // 32


#: The order is the policy: the first that a target has is taken.
FLOAT_UNITS: tuple[FloatUnit, ...] = (
    FloatUnit("avx512", "avx512f", 16, "vpermps_512", lookup_bits=4),
    FloatUnit("avx2", "avx2", 8, "vpermps_256", lookup_bits=3),
    FloatUnit("neon", "neon", 4, "tbl"),
    FloatUnit("generic"),
)


class _FloatRule(ScheduleRule):
    def __init__(self, unit: FloatUnit, suffix: str) -> None:
        self.unit, self.name = unit, f"{unit.name}_{suffix}"

    def decline(self, problem: Problem) -> str | None:
        return super().decline(problem) or self.unit.decline(problem.target)

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: Tiling) -> Schedule:
        from .intrinsics import look_up
        from .lanes import Intrinsics, schedule_lanes

        fmt = problem.config.format
        decode = look_up(self.unit.lookup, fmt.name) if self.unit.looks_up(fmt) else None
        return schedule_lanes(func, problem, tiling, Intrinsics(decode))


class FloatSmallM(_FloatRule):
    """Up to four rows: all rows at once, many columns, so that as many loads as possible are on their way."""

    def __init__(self, unit: FloatUnit) -> None:
        super().__init__(unit, "small_m")

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        reason = super().decline(problem)
        if reason is None and problem.m > SMALL_M:
            reason = f"is for at most {SMALL_M} rows, not {problem.m}"
        return reason

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        most = sum_shapes(problem.target, self.unit.lanes(problem.target))[0]
        return decode_in_registers(problem, small_shapes(most, problem.m))


class FloatGemm(_FloatRule):
    """Any number of rows: three quarters of the registers hold sums, and weights are decoded once."""

    def __init__(self, unit: FloatUnit) -> None:
        super().__init__(unit, "gemm")

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        return decode_to_panel(
            problem, tall_shapes(*sum_shapes(problem.target, self.unit.lanes(problem.target)), problem.m)
        )
