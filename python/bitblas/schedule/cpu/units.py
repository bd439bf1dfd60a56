"""What computes in a CPU, how its kernels walk their loops, and the rule that each unit of it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...config import MatmulConfig
from ...formats import DataFormat
from ...layout import LANES, UNIT, PackedLayout
from ...target import Target
from ..rule import LINE_BYTES, MatmulTiling, Problem, ScheduleRule, largest_divisor

#: Sums of int8 products stay exact in float32 up to this many terms: 512 · 128 · 255 < 2^24.
EXACT_INT8_TERMS = 512

#: … and those of dot products in int32: 65536 · 128 · 255 < 2^31.
EXACT_DOT_TERMS = 1 << 16

#: Elements by which rows of a copy of A are set apart at most: two cache lines, of elements of one byte.
MAX_SKEW = 2 * LINE_BYTES

#: A divisor of a group that is smaller than this makes no good chunk: then the whole group is one.
_SHORTEST_CHUNK = 32


@dataclass(frozen=True)
class LaneTiling(MatmulTiling):
    """How a CPU kernel walks its loops.

    Attributes
    ----------
    block_m, block_n : int
        Rows and columns whose sums stay in registers; block_n is a multiple of 16.
    block_k : int
        Consecutive k that are unrolled.
    chunk_k : int
        Most k that are summed before a group's scale, or the sum of all chunks, takes over; 0 means a whole group.
    panel : bool
        Whether weights are decoded once for all rows, a chunk at a time into a panel, instead of in registers for each tile
        of rows.
    slab_m : int
        Rows that one launch computes at most, so that their activations stay in a cache; 0 means all.
    prefetch : int
        How many bytes ahead of their use weights are asked for; 0 leaves it to the hardware.
    parallel : bool
        Whether the kernel uses torch's threads.
    dot : str
        How products are summed: ``""`` in float32, one at a time; ``"u8s8"`` in
        int32, four at a time, codes unsigned and activations signed; ``"s8s8"`` likewise, both signed; ``"bf16"`` in float32,
        two at a time, both bfloat16. All but the first read the layout "dots".
    slices : int
        Into how many int8 an activation of more bits is cut for a `dot`; 0 for int8 activations.
    split_k : int
        Parts of K that are summed by themselves, by different threads: a divisor of the number of chunks.
    """

    chunk_k: int = 0
    panel: bool = False
    slab_m: int = 0
    prefetch: int = 0
    parallel: bool = True
    dot: str = ""
    slices: int = 0
    split_k: int = 1

    def blocks(self, config: MatmulConfig, layout: PackedLayout) -> dict[str, Any]:
        """See `MatmulTiling`."""
        return {
            "row_multiple": self.block_m,
            "lane_multiple": self.block_n // LANES,
            "chunk": self.chunk(config, layout),
            "dot": self.dot,
            "slices": self.slices,
            "split_k": self.split_k,
        }

    def row_elements(self, config: MatmulConfig, layout: PackedLayout) -> int:
        """See `MatmulTiling`: rows of the output, or of the copy of A."""
        chunk = self.chunk(config, layout)
        return max(config.N, (self.slices or 1) * (-(-config.K // chunk) * chunk + MAX_SKEW))

    @property
    def most_rows(self) -> int:
        """See `MatmulTiling`."""
        return self.slab_m

    def chunk(self, config: MatmulConfig, layout: PackedLayout) -> int:
        """How many consecutive k are summed at once: a divisor of the group, or of a multiple of K where there is one group."""
        group = config.group if config.is_grouped else config.K
        unit = layout.unit if self.dot else 1
        terms = EXACT_DOT_TERMS if self.dot else EXACT_INT8_TERMS if config.integer_products else group
        limit = min(self.chunk_k or group, terms)
        found = unit * largest_divisor(group // unit, max(1, limit // unit))
        if found >= min(_SHORTEST_CHUNK, group):
            return found
        if config.integer_products and group == config.K:  # a single group may end with a part of a chunk
            step = max(UNIT, unit)
            return -(-group // -(-group // limit) // step) * step
        return found if terms < group else group  # exactness comes before speed


@dataclass(frozen=True)
class Unit:
    """What computes in a machine.

    Attributes
    ----------
    name : str
        What rules are called after.
    feature : str
        The instruction set that it needs; empty for any.
    vector_lanes : int
        Lanes of 32 bits in its registers; 0 means those of the target.
    """

    name: str
    feature: str
    vector_lanes: int

    def decline(self, fmt: DataFormat, target: Target) -> str | None:
        """Say why it does not serve weights of a format on a target; None where it does."""
        return self.lacking(target)

    def lacking(self, target: Target) -> str | None:
        """Say which instruction set a target lacks; None where it has that."""
        if self.feature and self.feature not in target.features:
            return f"needs {self.feature}, which {target} lacks"
        return None

    def num_sums(self, target: Target) -> int:
        """Blocks of sixteen sums that three quarters of the registers hold."""
        lanes = self.vector_lanes or target.vector_bits // 32
        return target.num_vector_registers * lanes * 3 // (4 * LANES)


class UnitRule(ScheduleRule[LaneTiling]):
    """The rule for a unit of a machine, whose name it has."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.name = unit.name

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        return super().decline(problem) or self.unit.decline(problem.config.format, problem.target)
