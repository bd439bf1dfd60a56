"""How kernels without tensor cores walk their loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...config import MatmulConfig
from ...layout import PackedLayout, stream_period
from ..rule import MatmulTiling, largest_divisor

#: A chunk that is shorter than this, beside a group that is longer, is worth a last chunk that is not full.
_SHORTEST_CHUNK = 8


@dataclass(frozen=True)
class ThreadTiling(MatmulTiling):
    """How threads share out a matmul.

    A block of threads computes block_m x block_n numbers, a thread thread_m x thread_n of them.

    Attributes
    ----------
    block_k : int
        Most consecutive k that are summed before a group's scale, or the sum of all chunks, takes over. At most 512, so that
        float32 sums of int8 products are exact.
    thread_m, thread_n : int
        Divisors of block_m and block_n.
    lanes : int
        Threads that share out the chunks of k, a power of two of at most 1024; 1 where operands are shared instead.
    dot : str
        ``"s8s8"`` where products of int8 and of integer weights are summed by `__dp4a`, in int32; else they are float32.
    """

    thread_m: int = 1
    thread_n: int = 1
    lanes: int = 1
    dot: str = ""

    kind: ClassVar[str] = "threads"

    @property
    def threads_m(self) -> int:
        """Threads of a block over rows."""
        return self.block_m // self.thread_m

    @property
    def threads_n(self) -> int:
        """Threads of a block over columns."""
        return self.block_n // self.thread_n

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.threads_m * self.threads_n * self.lanes

    def blocks(self, config: MatmulConfig, layout: PackedLayout) -> dict[str, Any]:
        """See `MatmulTiling`."""
        return {
            "row_multiple": self.block_m,
            "lane_multiple": self.block_n,
            "chunk": self.chunk(config, layout),
            "chunk_multiple": self.lanes,
            "dot": self.dot,
            "threads": True,
        }

    def chunk(self, config: MatmulConfig, layout: PackedLayout) -> int:
        """How many consecutive k are summed at once: a divisor of the group, or of a multiple of K where there is one group.

        Of whole words, where a group has them.
        """
        group = config.group if config.is_grouped else config.K
        unit = stream_period(layout.bits)
        unit = unit if group % unit == 0 and unit <= self.block_k else 1
        found = unit * largest_divisor(group // unit, self.block_k // unit)
        if found >= min(_SHORTEST_CHUNK, group) or group < config.K or self.dot:
            return found
        return -(-group // -(-group // self.block_k) // _SHORTEST_CHUNK) * _SHORTEST_CHUNK
