"""Rules for attentions of one row on CPUs: those of decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..rule import AttentionProblem, AttentionRule
from .attention_tiling import RowAttentionTiling
from .units import Unit

if TYPE_CHECKING:
    from tvm import tirx

#: Keys of a block, registers of values, and keys that are asked for ahead, the default first.
_SIZES = ((128, 8, 16), (128, 8, 32), (256, 8, 16), (64, 8, 16), (128, 8, 8))


class RowAttentionRule(AttentionRule[RowAttentionTiling]):
    """A head's elements in the lanes; keys and values are read once, in place, by as many tasks as there are blocks of them."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.name = f"attention_row_{unit.name}"

    def decline(self, problem: AttentionProblem) -> str | None:
        """See `Rule`."""
        if problem.m > 1:
            return "is for one row"
        if reason := super().decline(problem) or self.unit.lacking(problem.target):
            return reason
        lanes, config = self._lanes(problem), problem.config
        if max(config.dim, config.dim_v) < lanes:
            return f"is for heads of {lanes} elements and more, not of {config.dim} and {config.dim_v}"
        return None

    def _lanes(self, problem: AttentionProblem) -> int:
        return self.unit.vector_lanes or problem.target.vector_bits // 32

    def tilings(self, problem: AttentionProblem) -> list[RowAttentionTiling]:
        """See `Rule`."""
        lanes, sums = self._lanes(problem), problem.target.num_vector_registers // 2
        along = problem.config.layout == "nnn"
        found = (
            RowAttentionTiling(1, keys, lanes, min(lanes, sums), min(values, sums), ahead if along else 0)
            for keys, values, ahead in _SIZES
        )
        return list(dict.fromkeys(found))

    def apply(self, func: tirx.PrimFunc, problem: AttentionProblem, tiling: RowAttentionTiling) -> tirx.PrimFunc:
        """See `Rule`."""
        from .attention_row_program import RowAttention

        return RowAttention(problem.config, tiling).func(str(func.attrs["global_symbol"]))
