"""Rules for CUDA that multiply number by number, without tensor cores: every format, shape and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...config import MatmulConfig
from ...layout import PackedLayout
from ..rule import Problem, ScheduleRule, Tiling, largest_divisor

if TYPE_CHECKING:
    from tvm import tirx

WARP = 32

#: Rows up to which lanes share out k.
GEMV_ROWS = 8

#: Rows that a thread takes at most, so that all fits the registers; and where it quantizes them.
_THREAD_ROWS, _QUANTIZED_ROWS = 4, 2

#: A chunk that is shorter than this, beside a group that is longer, is worth a last chunk that is not full.
_SHORTEST_CHUNK = 8

#: Bits of the weights that one load takes at most.
_LOAD_BITS = 128

#: Blocks of threads that keep a multiprocessor busy.
_BLOCKS_PER_SM = 2


@dataclass(frozen=True)
class ThreadTiling(Tiling):
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
        """See `Tiling`."""
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
        unit = word_unit(layout.bits)
        unit = unit if group % unit == 0 and unit <= self.block_k else 1
        found = unit * largest_divisor(group // unit, self.block_k // unit)
        if found >= min(_SHORTEST_CHUNK, group) or group < config.K or self.dot:
            return found
        return -(-group // -(-group // self.block_k) // _SHORTEST_CHUNK) * _SHORTEST_CHUNK


def word_unit(bits: int) -> int:
    """Fewest consecutive k of a row-wise bit stream that are whole words of 32 bits."""
    return 32 // math.gcd(32, bits)


def dot_of(problem: Problem) -> str:
    """How products are summed: as bytes, where they are integers and groups are whole words of codes."""
    config, unit = problem.config, word_unit(problem.layout.bits)
    group = config.group if config.is_grouped else config.K
    return "s8s8" if config.integer_products and group % unit == 0 else ""


class ThreadGemvRule(ScheduleRule[ThreadTiling]):
    """Few rows: the lanes of a warp share out k, and each weight is decoded in registers, once for all rows."""

    name = "cuda_threads_gemv"
    target_kind = "cuda"
    layouts = ("packed",)

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        if problem.m > GEMV_ROWS:
            return f"is for at most {GEMV_ROWS} rows"
        return super().decline(problem)

    def tilings(self, problem: Problem) -> list[ThreadTiling]:
        """See `ScheduleRule`."""
        bits = problem.layout.bits
        longest = 64 if problem.m == 1 else WARP
        block_k = min(longest, max(16, _LOAD_BITS // bits if _LOAD_BITS % bits == 0 else WARP))
        most = _QUANTIZED_ROWS if problem.config.dynamic_quantization else _THREAD_ROWS
        rows = -(-problem.m // -(-problem.m // most))
        found = []
        for thread_n, warps, lanes in self._shapes(problem):
            probe = ThreadTiling(rows, thread_n * warps, block_k, rows, thread_n, dot=dot_of(problem))
            chunks = -(-problem.config.K // probe.chunk(problem.config, problem.layout))
            while lanes > chunks:
                lanes //= 2
            tiling = replace(probe, lanes=lanes)
            if tiling not in found:
                found.append(tiling)
        return found

    def _shapes(self, problem: Problem) -> list[tuple[int, int, int]]:
        """(columns of a thread, threads over columns, lanes), the best first: blocks enough for all multiprocessors."""
        card = problem.target.card
        wanted = _BLOCKS_PER_SM * (card.num_sms if card else 1)
        shapes = [(2, 4, WARP), (4, 4, WARP), (1, 8, WARP), (2, 8, WARP), (1, 4, WARP)]
        if not problem.config.dynamic_quantization:  # whose maxima are found by warps
            shapes += [(1, 2, 2 * WARP), (1, 1, 4 * WARP)]
        enough = [shape for shape in shapes if wanted * shape[0] * shape[1] <= problem.config.N]
        return enough + [shape for shape in reversed(shapes) if shape not in enough]

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: ThreadTiling) -> tirx.PrimFunc:
        """See `ScheduleRule`."""
        from .threads_nest import schedule_lanes

        return schedule_lanes(func, problem, tiling).mod["main"]


class ThreadRule(ScheduleRule[ThreadTiling]):
    """Any number of rows: tiles of both operands are decoded into shared memory."""

    name = "cuda_threads"
    target_kind = "cuda"
    layouts = ("packed",)

    #: (rows, columns of a block, rows, columns of a thread), the largest first.
    shapes = ((128, 64, 8, 4), (64, 64, 4, 4), (32, 64, 4, 4), (32, 32, 2, 4), (16, 32, 2, 2))

    def tilings(self, problem: Problem) -> list[ThreadTiling]:
        """See `ScheduleRule`."""
        card = problem.target.card
        wanted = _BLOCKS_PER_SM * (card.num_sms if card else 1)

        def blocks(shape: tuple[int, int, int, int]) -> int:
            return -(-problem.m // shape[0]) * -(-problem.config.N // shape[1])

        enough = [shape for shape in self.shapes if blocks(shape) >= wanted and shape[0] < 2 * problem.m]
        order = enough + [shape for shape in reversed(self.shapes) if shape not in enough]
        dot = dot_of(problem)
        block_k = 4 * WARP if dot else WARP
        return [ThreadTiling(m, n, block_k, thread_m, thread_n, dot=dot) for m, n, thread_m, thread_n in order]

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: ThreadTiling) -> tirx.PrimFunc:
        """See `ScheduleRule`."""
        from .threads_nest import schedule_tiles

        return schedule_tiles(func, problem, tiling).mod["main"]
