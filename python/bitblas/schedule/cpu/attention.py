"""Rules for attention on CPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ..rule import AttentionProblem, AttentionRule, largest_divisor
from .attention_row import RowAttentionRule
from .attention_tiling import LaneAttentionTiling
from .floats import FLOAT_UNITS
from .pairs import PAIR_UNITS
from .units import Unit

if TYPE_CHECKING:
    from tvm import tirx


#: Rows of a task, registers of rows that are computed together, and keys at a time, the default first, by the most rows that
#: a kernel is specialised for.
_SIZES: dict[int, tuple[tuple[int, int, int], ...]] = {
    16: ((16, 1, 96), (16, 1, 48)),
    256: ((64, 2, 96), (128, 2, 96), (64, 4, 96), (64, 1, 96)),
    1024: ((256, 2, 96), (256, 4, 96), (256, 2, 192), (512, 2, 96), (128, 2, 96)),
}
#: What a thread holds at most: the second-level caches of servers have 1 MB and more, and there is other traffic.
_HELD_BYTES = 640 << 10
#: A multiple of all numbers of keys whose sums stay in registers.
_FEWEST_KEYS = 48


def _divisor(size: int, limit: int) -> int:
    """How many elements are summed at once: a divisor of their number, where one is near the limit."""
    found = largest_divisor(size, limit)
    return found if 3 * found >= 2 * limit else min(size, limit)


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
        sizes = list(_SIZES[next((most for most in _SIZES if problem.m <= most), max(_SIZES))])
        sizes += [other for others in _SIZES.values() for other in others]
        found = (self._tiling(problem, *size) for size in dict.fromkeys(sizes))
        return list(dict.fromkeys(found))

    def _tiling(self, problem: AttentionProblem, rows: int, vectors: int, keys: int) -> LaneAttentionTiling:
        """About so many rows and keys, fewer where a head is so long that a cache would not hold them."""
        config, target = problem.config, problem.target
        lanes = self.unit.vector_lanes or target.vector_bits // 32
        most_sums = target.num_vector_registers * 3 // (4 * vectors)
        tiling = LaneAttentionTiling(
            max(lanes * vectors, rows),
            keys,
            lanes,
            vectors,
            next(size for size in (16, 12, 6, 2) if size <= most_sums),
            _divisor(config.dim_v, min(most_sums, 16)),
            self.dot,
        )
        while tiling.held_bytes(config) > _HELD_BYTES and (rows > lanes * vectors or keys > _FEWEST_KEYS):
            # a block of keys is read anew for each block of rows, so that these go last
            if keys > _FEWEST_KEYS and keys * 4 > rows:
                keys //= 2
            else:
                rows //= 2
            tiling = replace(tiling, block_m=max(lanes * vectors, rows), block_n=keys)
        return tiling

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


CPU_ATTENTION_RULES: tuple[LaneAttentionRule | RowAttentionRule, ...] = (
    *(RowAttentionRule(unit) for unit in FLOAT_UNITS),
    *(PairAttentionRule(unit) for unit in PAIR_UNITS),
    *(LaneAttentionRule(unit) for unit in FLOAT_UNITS),
)
