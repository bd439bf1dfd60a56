"""How attention on cards is tiled: for tensor cores, and number by number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import FlashAttenConfig
from ...layout import WARP
from ..rule import AttentionTiling

#: Rows, keys or elements of a head that one product of tensor cores takes.
FRAGMENT = 16
#: Elements of 16 bits that are copied at once.
CHUNK = 8
#: Elements by which rows of float32 sums in shared memory are set apart, so that those of a warp meet all banks.
TOTAL_PADDING = 8
#: Facts of a block that are kept in shared memory while registers are scarce: in units of int32; the last ones are two int64.
NUM_FACTS = 8
#: Registers of results, scores and rows of Q up to which a thread has enough for the rest.
_ROOMY_REGISTERS = 180


def in_fragments(elements: int) -> int:
    """Elements of a head, with those that fill up its last fragment."""
    return -(-elements // FRAGMENT) * FRAGMENT


def row_bytes(elements: int) -> int:
    """Bytes from a row of 16-bit elements to the next in shared memory.

    An odd number of chunks of 16 bytes: eight rows of a load of matrices then meet all banks.
    """
    return 16 * (-(-elements // CHUNK) | 1)


@dataclass(frozen=True)
class FragmentAttentionTiling(AttentionTiling):
    """How a kernel for tensor cores walks its loops.

    A block of threads computes `block_m` rows of one head of keys, `block_n` keys at a time.

    Attributes
    ----------
    warps_m, warps_n : int
        Warps that share out the rows, and that share out the keys of a tile and join their sums at the end.
    stages : int
        1: the values of a tile are on their way while its scores are computed, and the next keys while values are multiplied.
        2: the next keys and values are on their way while a tile is multiplied.
    keeps_q : bool
        Whether rows of Q stay in registers; else they are read from shared memory for each tile.
    blocks_at_once : int
        Blocks that a multiprocessor should be able to run at once: the fewer the more registers a thread may take.
    """

    warps_m: int = 4
    warps_n: int = 1
    stages: int = 1
    keeps_q: bool = False
    blocks_at_once: int = 1

    kind: ClassVar[str] = "attention_fragments"

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps_m * self.warps_n

    @property
    def m_tiles(self) -> int:
        """Fragments of rows of a warp."""
        return self.block_m // (FRAGMENT * self.warps_m)

    @property
    def warp_keys(self) -> int:
        """Keys of a tile that a warp multiplies."""
        return self.block_n // self.warps_n

    def q_bytes(self, config: FlashAttenConfig) -> int:
        """Shared memory of the rows of Q."""
        return self.block_m * row_bytes(in_fragments(config.dim))

    def k_bytes(self, config: FlashAttenConfig) -> int:
        """Shared memory of a tile of K, which lies as it does in memory."""
        if config.layout == "ntn":
            return in_fragments(config.dim) * row_bytes(self.block_n)
        return self.block_n * row_bytes(in_fragments(config.dim))

    def v_bytes(self, config: FlashAttenConfig) -> int:
        """Shared memory of a tile of V."""
        return self.block_n * row_bytes(in_fragments(config.dim_v))

    def stage_bytes(self, config: FlashAttenConfig) -> int:
        """Shared memory of a tile of K, and then of V."""
        return self.k_bytes(config) + self.v_bytes(config)

    def q_place(self, config: FlashAttenConfig) -> int:
        """Where the rows of Q lie: behind the stages, or where the first values will be, if they go to registers."""
        return self.k_bytes(config) if self.keeps_q else self.stages * self.stage_bytes(config)

    def total_pitch(self, config: FlashAttenConfig) -> int:
        """float32 elements from a row of the result to the next in shared memory."""
        return in_fragments(config.dim_v) + TOTAL_PADDING

    def stores_rounded(self, config: FlashAttenConfig) -> bool:
        """Whether results are rounded before they pass through shared memory: where no warps have to join theirs."""
        return self.warps_n == 1 and config.Out_dtype != "float32"

    def facts_place(self, config: FlashAttenConfig) -> int:
        """Where facts of the block lie, and then the keys that rows see: behind operands, or results and facts of rows."""
        operands = max(self.stages * self.stage_bytes(config), self.q_place(config) + self.q_bytes(config))
        results = 4 * self.warps_n * self.block_m * (self.total_pitch(config) + 2)
        if self.stores_rounded(config):
            results = self.block_m * row_bytes(in_fragments(config.dim_v))
        return max(operands, results)

    def parks_rows(self, config: FlashAttenConfig) -> bool:
        """Whether maxima and sums of rows lie in shared memory while scores are computed, for want of registers."""
        return self.m_tiles == 2 and self.registers(config) > _ROOMY_REGISTERS

    def parking_place(self, config: FlashAttenConfig) -> int:
        """Where they lie: behind facts, the four maxima of each thread, and then its four sums."""
        return self.facts_place(config) + 4 * (NUM_FACTS + (self.block_m if config.is_causal else 0))

    def shared_bytes(self, config: FlashAttenConfig) -> int:
        """Shared memory of a block."""
        return self.parking_place(config) + (32 * self.num_threads if self.parks_rows(config) else 0)

    def registers(self, config: FlashAttenConfig) -> int:
        """Registers that a thread needs for results, scores and rows of Q: most of them."""
        q = in_fragments(config.dim) // 4 if self.keeps_q else 4
        return self.m_tiles * (in_fragments(config.dim_v) // 2 + self.warp_keys // 2 + q)


#: Threads of a block that computes number by number, scores of a tile of each of them, and elements of a head at a time.
THREADS, THREAD_SCORES, THREAD_CHUNK = 128, 16, 16
#: Elements by which keys of a tile in shared memory are set apart.
_PADDING = 4
#: Rows and columns of a result that a thread has side by side.
QUAD = 4


@dataclass(frozen=True)
class ThreadAttentionTiling(AttentionTiling):
    """How a kernel that computes number by number walks its loops: scores of `block_m` rows and `block_n` keys at a time."""

    kind: ClassVar[str] = "attention_threads"

    @classmethod
    def of(cls, rows: int) -> ThreadAttentionTiling:
        """The tiling for so many rows: each thread has as many scores."""
        return cls(rows, THREADS * THREAD_SCORES // rows)

    def places(self, config: FlashAttenConfig) -> tuple[int, int, int, int]:
        """float32 elements of shared memory before the chunk of K, the weights, the facts of rows, and in all; first is Q."""
        q = -(-config.dim // THREAD_CHUNK) * THREAD_CHUNK * self.block_m
        k = THREAD_CHUNK * self.k_pitch
        return (
            q,
            q + k,
            q + k + self.block_n * self.weight_pitch,
            q + k + self.block_n * self.weight_pitch + self.block_m,
        )

    @property
    def k_pitch(self) -> int:
        """Elements from an element of the keys' heads to the next."""
        return self.block_n + _PADDING

    @property
    def weight_pitch(self) -> int:
        """Elements from the weights of a key to those of the next."""
        return self.block_m + _PADDING

    def shared_bytes(self, config: FlashAttenConfig) -> int:
        """Shared memory of a block."""
        return 4 * self.places(config)[-1]

    def column_threads(self, config: FlashAttenConfig) -> int:
        """Threads that share out the elements of a row of the result; the others share out rows, four or more each."""
        wanted = 1 << (-(-config.dim_v // QUAD) - 1).bit_length()
        return min(THREADS, max(wanted, THREADS * QUAD // self.block_m))
