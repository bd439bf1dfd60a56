"""The rule for bfloat16 activations times integers, by the instruction that adds two products of bfloat16 at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...formats import DataFormat
from ..rule import Problem
from .tilings import DECODE_AGAIN_ROWS, decode_in_registers, decode_to_panel, four_blocks_first, split_over_k
from .units import LaneTiling, Unit, UnitRule

if TYPE_CHECKING:
    from tvm import tirx

#: Widest codes of which a table of 32 entries decodes two at a time.
_LOOKUP_BITS = 5

#: k that are decoded into a panel at a time: 256 · 64 columns of two bytes are 32 KB.
_PANEL_K = 256

#: Rows from which on it beats slices, whose codes are easier to decode: int3 with one row took 387 us, in slices 233.
_FEWEST_ROWS = 3

#: Blocks of sums that its latency asks for: of 16 rows 4 x 4 took 1518 us where 8 x 1 took 1936, and 4 x 3 1699.
_LEAST_SUMS = 16


@dataclass(frozen=True)
class PairUnit(Unit):
    """An instruction that adds two products of bfloat16."""

    def looks_up(self, fmt: DataFormat) -> bool:
        """Whether codes of a format are looked up in a table."""
        return fmt.bits <= _LOOKUP_BITS


PAIR_UNITS: tuple[PairUnit, ...] = (PairUnit("avx512_bf16", "avx512bf16", 16),)


class PairRule(UnitRule):
    """Codes become pairs of bfloat16, exactly, in registers or in a panel, and are multiplied two at a time."""

    layouts = ("dots",)

    unit: PairUnit

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        reason = super().decline(problem)
        if reason is None and (problem.config.A_dtype != "bfloat16" or problem.config.integer_products):
            reason = f"multiplies bfloat16 activations as such, not those of {problem.config}"
        fewest = _FEWEST_ROWS if self.unit.looks_up(problem.config.format) else DECODE_AGAIN_ROWS + 1
        if reason is None and problem.m < fewest:
            reason = f"decodes {problem.config.W_dtype} too slowly for {problem.m} rows"
        return reason

    def tilings(self, problem: Problem) -> list[LaneTiling]:
        """See `ScheduleRule`."""
        num_sums = self.unit.num_sums(problem.target)
        again = decode_in_registers(problem, num_sums, least_sums=_LEAST_SUMS)
        once = four_blocks_first(decode_to_panel(problem, num_sums, panel_k=_PANEL_K))
        found = again + once if problem.m <= DECODE_AGAIN_ROWS else once + again
        return split_over_k(problem, [replace(tiling, dot="bf16") for tiling in found])

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: LaneTiling) -> tirx.PrimFunc:
        """See `ScheduleRule`."""
        from .lanes import Intrinsics, schedule_lanes
        from .lookups import look_up_pairs
        from .products import BF16_LIBRARY, dot_pairs, pair_activations

        fmt = problem.config.format
        decode = look_up_pairs(fmt.name) if self.unit.looks_up(fmt) else None
        intrinsics = Intrinsics(decode, pair_activations(), lambda depth: dot_pairs(), library=BF16_LIBRARY)
        return schedule_lanes(func, problem, tiling, intrinsics).mod["main"]
