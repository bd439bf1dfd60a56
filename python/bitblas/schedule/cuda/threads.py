"""Rules for CUDA that multiply number by number, without tensor cores: every format, shape and dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...layout import stream_period
from ..rule import Problem, ScheduleRule
from .threads_tiling import ThreadTiling

if TYPE_CHECKING:
    from tvm import tirx

WARP = 32

#: Rows up to which lanes share out k.
GEMV_ROWS = 8

#: Rows that a thread takes at most, so that all fits the registers; and where it quantizes them.
_THREAD_ROWS, _QUANTIZED_ROWS = 4, 2

#: Bits of the weights that one load takes at most.
_LOAD_BITS = 128

#: Blocks of threads that keep a multiprocessor busy.
_BLOCKS_PER_SM = 2


def dot_of(problem: Problem) -> str:
    """How products are summed: as bytes, where they are integers and groups are whole words of codes."""
    config, unit = problem.config, stream_period(problem.layout.bits)
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
        bits, dot = problem.layout.bits, dot_of(problem)
        # what a load brings, but not so little that scales cost more than products, nor so much that it fills the registers
        shortest, longest = WARP if dot else WARP // 2, 2 * WARP if problem.m == 1 else WARP
        block_k = min(longest, max(shortest, _LOAD_BITS // bits if _LOAD_BITS % bits == 0 else WARP))
        most = _QUANTIZED_ROWS if problem.config.dynamic_quantization else _THREAD_ROWS
        if problem.config.dynamic_quantization and WARP % bits:  # codes that cross words, and quotients, fill registers
            most = 1
        rows = -(-problem.m // -(-problem.m // most))
        found = []
        for thread_n, warps, lanes in self._shapes(problem):
            probe = ThreadTiling(rows, thread_n * warps, block_k, rows, thread_n, dot=dot)
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
