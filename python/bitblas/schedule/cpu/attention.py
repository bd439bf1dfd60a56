"""Rules for attention on CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..rule import AttentionProblem, AttentionRule
from .attention_tiling import LaneAttentionTiling
from .floats import FLOAT_UNITS
from .pairs import PAIR_UNITS
from .units import Unit

if TYPE_CHECKING:
    from tvm import tirx


class LaneAttentionRule(AttentionRule[LaneAttentionTiling]):
    """Queries in the lanes, keys and values as scalars that are spread over them, by the float unit of a machine."""

    dot: ClassVar[str] = ""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.name = f"attention_{unit.name}"

    def decline(self, problem: AttentionProblem) -> str | None:
        """See `Rule`."""
        return super().decline(problem) or self.unit.lacking(problem.target)

    def tilings(self, problem: AttentionProblem) -> list[LaneAttentionTiling]:
        """See `Rule`."""
        return [self._tiling(problem, 4, 6, 4), self._tiling(problem, 2, 12, 8)]

    def _tiling(self, problem: AttentionProblem, vectors: int, keys: int, values: int) -> LaneAttentionTiling:
        lanes = self.unit.vector_lanes or problem.target.vector_bits // 32
        return LaneAttentionTiling(128, 96, lanes, vectors, keys, values, self.dot)

    def apply(self, func: tirx.PrimFunc, problem: AttentionProblem, tiling: LaneAttentionTiling) -> tirx.PrimFunc:
        """See `Rule`."""
        from .attention_program import LaneAttention

        return LaneAttention(problem.config, tiling).func(str(func.attrs["global_symbol"]))


class PairAttentionRule(LaneAttentionRule):
    """The same in bfloat16, two products at a time; weights are rounded to bfloat16."""

    dot = "bf16"

    def decline(self, problem: AttentionProblem) -> str | None:
        """See `Rule`."""
        config = problem.config
        if any(dtype != "bfloat16" for dtype in (config.Q_dtype, config.K_dtype, config.V_dtype)):
            return f"multiplies bfloat16, not {config.Q_dtype}, {config.K_dtype} and {config.V_dtype}"
        return super().decline(problem)


CPU_ATTENTION_RULES: tuple[LaneAttentionRule, ...] = (
    *(PairAttentionRule(unit) for unit in PAIR_UNITS),
    *(LaneAttentionRule(unit) for unit in FLOAT_UNITS),
)
