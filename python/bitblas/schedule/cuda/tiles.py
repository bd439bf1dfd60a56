"""How kernels for tensor cores are tiled, and the order in which they are offered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ...config import MatmulConfig
from ...formats import FORMATS
from ...layout import FRAGMENT_K, FRAGMENT_N, LANES, WARP, PackedLayout
from ..rule import MatmulTiling

#: Rows of activations that one product takes.
FRAGMENT_M = 8
#: Threads of a multiprocessor that wait for weights at once, where nothing else is to be done.
_WAITING_THREADS = 512
#: Bytes of shared memory that a cycle serves: all of its banks.
_BANKS_BYTES = 128


@dataclass(frozen=True)
class FragmentTiling(MatmulTiling):
    """How a kernel for tensor cores walks its loops.

    A block of threads computes `block_m` rows by `block_n` columns; `block_k` is what one of its steps over k takes.

    Attributes
    ----------
    warps_n, warps_k : int
        Warps that share out the columns; and that share out the steps, and add their sums at the end.
    stages : int
        Steps whose activations lie in shared memory or are on their way there; 0 where each warp reads its own from global
        memory. At least 3 where activations are quantized, a step before they are multiplied.
    split_k : int
        Blocks that share out the steps of one tile; the last to finish adds their sums.
    slab_m : int
        Rows that one launch computes at most, so that the sums of parts stay few; 0 means all.
    """

    warps_n: int = 1
    warps_k: int = 1
    stages: int = 0
    split_k: int = 1
    slab_m: int = 0

    kind: ClassVar[str] = "fragments"

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps_n * self.warps_k

    @property
    def blocks_at_once(self) -> int:
        """Blocks that a multiprocessor should be able to run at once: the fewer the more registers a thread may take."""
        return 1 if self.stages else max(1, _WAITING_THREADS // (self.num_threads * self.n_tiles))

    @property
    def m_tiles(self) -> int:
        """Products side by side along the rows of A."""
        return self.block_m // FRAGMENT_M

    @property
    def n_tiles(self) -> int:
        """Products side by side along the columns, of one warp."""
        return self.block_n // (FRAGMENT_N * self.warps_n)

    def fold(self, config: MatmulConfig) -> int:
        """Consecutive k that are summed before a group's scale takes over."""
        return math.gcd(config.group, self.block_k) if config.num_groups > 1 else self.block_k

    def row_bytes(self, config: MatmulConfig) -> int:
        """Bytes from a row of activations to the next in shared memory.

        Eight threads of a load of 16 bytes read two rows, and sixteen of a load of 8 bytes four: those must meet all banks.
        """
        element = element_bytes(config)
        return self.block_k * element + (32 * element - self.block_k * element) % _BANKS_BYTES

    def copied_row_bytes(self, config: MatmulConfig) -> int:
        """The same, of activations as they come: without a gap where they are quantized, each by the thread that copied it."""
        return self.block_k * source_bytes(config) if config.dynamic_quantization else self.row_bytes(config)

    def activation_bytes(self, config: MatmulConfig) -> int:
        """Shared memory of the activations of one stage."""
        return self.block_m * self.copied_row_bytes(config)

    def quantized_bytes(self, config: MatmulConfig) -> int:
        """Shared memory of a step's activations after they were quantized, of a warp where each has its own."""
        return self.block_m * self.row_bytes(config) if config.dynamic_quantization else 0

    def quantized_steps(self) -> int:
        """Steps whose quantized activations lie in shared memory: the one that is multiplied and the next, or each warp's."""
        return 2 if self.stages else self.warps_k

    def row_facts_bytes(self, config: MatmulConfig) -> int:
        """Shared memory of what is known of rows that are quantized: scales, their inverses, what each warp has found."""
        return 4 * self.block_m * (2 + self.num_threads // WARP) if config.dynamic_quantization else 0

    def stage_bytes(self, config: MatmulConfig) -> int:
        """Shared memory of one stage: activations, and then the words of all threads."""
        return self.activation_bytes(config) + self.block_n * self.block_k * config.format.bits // 8

    def operand_bytes(self, config: MatmulConfig) -> int:
        """Shared memory of a block's operands, and later, in the same place, of its sums."""
        sums = self.warps_k * self.block_m * (self.block_n + SUM_PADDING) * 4
        operands = self.stages * self.stage_bytes(config) + self.quantized_steps() * self.quantized_bytes(config)
        return max(sums, operands)

    def shared_bytes(self, config: MatmulConfig) -> int:
        """Shared memory of a block."""
        return self.operand_bytes(config) + self.row_facts_bytes(config)

    def blocks(self, config: MatmulConfig, layout: PackedLayout) -> dict[str, Any]:
        """See `MatmulTiling`."""
        return {"row_multiple": 1, "lane_multiple": self.block_n // LANES, "chunk": config.group}

    def workspace(self, config: MatmulConfig, m: int) -> tuple[int, int]:
        """See `MatmulTiling`."""
        if self.split_k == 1:
            return 0, 0
        tiles = -(-m // self.block_m) * -(-config.N // self.block_n)
        return tiles * self.split_k * self.block_m * self.block_n, tiles

    @property
    def most_rows(self) -> int:
        """See `MatmulTiling`."""
        return self.slab_m


#: Elements by which rows of sums in shared memory are set apart.
SUM_PADDING = 4


def element_bytes(config: MatmulConfig) -> int:
    """Bytes of an activation as it is multiplied, or widened to be."""
    return 1 if config.dynamic_quantization else source_bytes(config)


def source_bytes(config: MatmulConfig) -> int:
    """Bytes of an activation as it comes."""
    return FORMATS[config.activation_dtype].bits // 8


def divisor_steps(config: MatmulConfig, wanted: int) -> int:
    """k of a step: at most `wanted`, a multiple of 64 that divides K."""
    return FRAGMENT_K * math.gcd(config.K // FRAGMENT_K, wanted // FRAGMENT_K)
