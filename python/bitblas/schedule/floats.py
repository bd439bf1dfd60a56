"""Rules that multiply in float32, one product a lane, by the vector unit of each instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..formats import DataFormat
from ..target import Target
from .rule import Problem, Tiling, UnitRule
from .tilings import decode_in_registers, decode_to_panel, small_shapes, sum_shapes, tall_shapes

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


class FloatRule(UnitRule):
    """Codes become float32, in registers or in a panel, and are multiplied one a lane."""

    def __init__(self, unit: FloatUnit, few_rows: bool) -> None:
        super().__init__(unit.name, few_rows)
        self.unit = unit

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        return super().decline(problem) or self.unit.decline(problem.target)

    def tilings(self, problem: Problem) -> list[Tiling]:
        """See `ScheduleRule`."""
        most, shapes = sum_shapes(problem.target, self.unit.lanes(problem.target))
        if self.few_rows:
            return decode_in_registers(problem, small_shapes(most, problem.m))
        return decode_to_panel(problem, tall_shapes(most, shapes, problem.m))

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: Tiling) -> Schedule:
        """See `ScheduleRule`."""
        from .intrinsics import look_up
        from .lanes import Intrinsics, schedule_lanes

        fmt = problem.config.format
        decode = look_up(self.unit.lookup, fmt.name) if self.unit.looks_up(fmt) else None
        return schedule_lanes(func, problem, tiling, Intrinsics(decode))
