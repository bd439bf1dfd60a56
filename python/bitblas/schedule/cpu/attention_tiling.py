"""How a CPU kernel of an attention walks its loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import FlashAttenConfig
from ..rule import AttentionTiling


@dataclass(frozen=True)
class LaneAttentionTiling(AttentionTiling):
    """How a CPU kernel walks its loops: rows stand in the lanes.

    Attributes
    ----------
    lanes : int
        Lanes of a register.
    vectors : int
        Registers side by side whose rows are computed together; `lanes` times `vectors` divides `block_m`.
    keys, values : int
        Keys, and elements of a head of V, whose sums with these rows stay in registers; `keys` divides `block_n` and is even.
    dot : str
        How products are summed: ``""`` in float32, one at a time; ``"bf16"`` two at a time, both bfloat16.
    """

    lanes: int
    vectors: int
    keys: int
    values: int
    dot: str = ""

    kind: ClassVar[str] = "attention_lanes"

    def held_bytes(self, config: FlashAttenConfig) -> int:
        """Bytes that a thread holds: its queries and sums, a block of keys and values, and their scores."""
        words = -(-config.dim // 2) if self.dot else config.dim
        values = self.block_n // 2 if self.dot else self.block_n
        panels = (words + config.dim_v) * self.block_m + self.block_n * words + values * config.dim_v
        scores = (self.block_n + (values if self.dot else 0)) * self.lanes * self.vectors
        squares = 2 * self.lanes * self.lanes
        # of each row: a maximum, a total, a limit, and two int64 that say where it is
        return 4 * (panels + scores + squares + 7 * self.block_m)


@dataclass(frozen=True)
class RowAttentionTiling(AttentionTiling):
    """How a CPU kernel of one row walks its loops: elements of a head stand in the lanes.

    Attributes
    ----------
    lanes : int
        Lanes of a register.
    keys : int
        Keys, a divisor of `lanes`, whose products with the row stay in registers.
    values : int
        Registers of a head of V whose sums stay in registers.
    ahead : int
        How many keys ahead of their use keys are asked for, where they lie along the lanes.
    """

    lanes: int
    keys: int
    values: int
    ahead: int

    kind: ClassVar[str] = "attention_row"

    def held_bytes(self, config: FlashAttenConfig) -> int:
        """Bytes that a thread holds; results of the tasks of a row are beside them."""
        square = self.lanes * self.lanes
        # a total and a factor for each lane, a maximum, and four numbers
        return 4 * (config.dim + self.block_n + square + config.dim_v + 2 * self.lanes + 5)
