"""Rules that multiply in float32, one product a lane, by the vector unit of each instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...formats import DataFormat
from ..rule import Problem
from .tilings import DECODE_AGAIN_ROWS, decode_in_registers, decode_to_panel, split_over_k
from .units import LaneTiling, Unit, UnitRule

if TYPE_CHECKING:
    from tvm import tirx


@dataclass(frozen=True)
class FloatUnit(Unit):
    """A vector unit that multiplies float32.

    Attributes
    ----------
    lookup : str
        Its row in `bitblas.schedule.lookups.LOOKUPS`: how it finds a value in a table; empty where it has no way.
    lookup_bits : int
        Widest integer codes that are looked up and not computed; codebooks always are.
    """

    lookup: str = ""
    lookup_bits: int = 0

    def looks_up(self, fmt: DataFormat) -> bool:
        """Whether codes of a format are looked up in a table."""
        return bool(self.lookup) and (bool(fmt.codebook) or fmt.bits <= self.lookup_bits)


#: The order is the policy: the first that a target has is taken.
FLOAT_UNITS: tuple[FloatUnit, ...] = (
    FloatUnit("avx512", "avx512f", 16, "vpermps_512", lookup_bits=4),
    FloatUnit("avx2", "avx2", 8, "vpermps_256", lookup_bits=3),
    FloatUnit("neon", "neon", 4, "tbl"),
    FloatUnit("generic", "", 0),
)


class FloatRule(UnitRule):
    """Codes become float32, in registers or in a panel, and are multiplied one a lane."""

    unit: FloatUnit

    def tilings(self, problem: Problem) -> list[LaneTiling]:
        """See `ScheduleRule`."""
        num_sums = self.unit.num_sums(problem.target)
        again, once = decode_in_registers(problem, num_sums), decode_to_panel(problem, num_sums)
        easy = problem.m <= DECODE_AGAIN_ROWS or self._decodes_easily(problem)
        return split_over_k(problem, again + once if easy else once + again)

    def _decodes_easily(self, problem: Problem) -> bool:
        """Whether a code takes so few instructions that decoding it for each tile of rows beats a panel."""
        fmt = problem.config.format
        if problem.layout.name == "packed":
            return False
        return self.unit.looks_up(fmt) and len(problem.layout.planes) == 1

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: LaneTiling) -> tirx.PrimFunc:
        """See `ScheduleRule`."""
        from .lanes import Intrinsics, schedule_lanes
        from .lookups import look_up

        fmt = problem.config.format
        decode = look_up(self.unit.lookup, fmt.name) if self.unit.looks_up(fmt) else None
        return schedule_lanes(func, problem, tiling, Intrinsics(decode)).mod["main"]
