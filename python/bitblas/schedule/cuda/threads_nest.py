"""The two loop nests of rules for threads: lanes that share out k, and tiles in shared memory."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from ...config import MatmulConfig
from ...expr.streams import WORD_BYTES, period_words
from ...formats import FORMATS
from ...layout import QUAD, stream_period
from ..rule import Problem
from .threads_tiling import ThreadTiling

#: Bytes that one load takes at most.
_LOAD_BYTES = 16

#: Shared memory for what activations are quantized with, beside the tiles: together less than 48 KB, which every card has.
_SCALE_BYTES = 16 << 10

#: A power of two of blocks that a grid may have in its second dimension.
_MOST_BLOCKS = 1 << 15

_LANES, _ROWS = "threadIdx.x", "threadIdx.y"


def schedule_lanes(func: tirx.PrimFunc, problem: Problem, tiling: ThreadTiling) -> Schedule:
    """Schedule a matmul of few rows.

    Before -> after::

        held, activation, words, decode, matmul, row_sum, accumulate, epilogue, each over everything
        ->
        block of threads:                                        (tile of rows, columns)
            codebook, what activations are quantized with        (shared)
            thread of columns:
                lane:
                    for chunk of k of the lane:                  (side by side with those of the other lanes)
                        words, decode, held, activation, matmul, row_sum, scale, zero      (all in registers)
                        accumulate                               (of the lane)
                accumulate                                       (over lanes, by shuffles)
                epilogue
    """
    nest = _LaneNest(func, problem, tiling)
    nest.apply()
    return nest.sch


def schedule_tiles(func: tirx.PrimFunc, problem: Problem, tiling: ThreadTiling) -> Schedule:
    """Schedule a matmul of any number of rows.

    Before -> after::

        held, activation, words, decode, matmul, row_sum, accumulate, epilogue, each over everything
        ->
        block of threads:                                        (tile of rows, columns)
            codebook, what activations are quantized with        (shared)
            for chunk of k:
                held, activation; words, decode                  (shared, each thread a part)
                thread of rows, columns:
                    for k: matmul;  row_sum;  accumulate         (in registers)
            thread of rows, columns: epilogue
    """
    nest = _TileNest(func, problem, tiling)
    nest.apply()
    return nest.sch


class _Nest:
    """What both have in common: the schedule in the making."""

    def __init__(self, func: tirx.PrimFunc, problem: Problem, tiling: ThreadTiling) -> None:
        self.sch = Schedule(func.with_attr({"tirx.noalias": True}))
        self.problem, self.tiling = problem, tiling
        self.config: MatmulConfig = problem.config
        self.chunk = tiling.chunk(self.config, problem.layout)
        #: k that one step of the loops over k stands for
        self.step = QUAD if tiling.dot else 1
        self.padded_k = -(-self.config.K // self.chunk) * self.chunk
        self.names = {
            str(self.sch.get(block).name_hint) for block in self.sch.get_child_blocks(self.sch.get_sblock("root"))
        }

    # -- steps that both take ----------------------------------------------------------------------------------------------

    def block_of(self, columns: LoopRV, rows: LoopRV) -> LoopRV:
        """Bind the loops over tiles, of which the one over rows is the inner; blocks that read the same weights follow each
        other. Returns the inner."""
        sch = self.sch
        far, near = sch.split(columns, [None, min(_MOST_BLOCKS, int(sch.get(columns).extent))])
        sch.annotate(far, "pragma_unroll_explicit", 0)
        for loop, name in ((far, "blockIdx.z"), (near, "blockIdx.y"), (rows, "blockIdx.x")):
            sch.bind(loop, name)
        return rows

    def inline(self, *names: str) -> None:
        """Inline the blocks that there are."""
        for name in names:
            if name in self.names:
                self.sch.compute_inline(self.sch.get_sblock(name))

    def place(self, name: str, loop: LoopRV, scope: str) -> SBlockRV:
        """Compute a block where it is needed, in a scope: what is shared, for all threads of a block."""
        block = self.sch.get_sblock(name)
        self.sch.set_scope(block, 0, scope)
        self.sch.compute_at(block, loop, preserve_unit_loops=True)
        return block

    def loops(self, block: SBlockRV, place: LoopRV) -> list[LoopRV]:
        """The loops of a block inside of a loop."""
        found = self.sch.get_loops(block)
        return found[[self.sch.get(loop) for loop in found].index(self.sch.get(place)) + 1 :]

    def unroll(self, block: SBlockRV, place: LoopRV) -> None:
        """Unroll the serial loops of a block inside of a loop."""
        for loop in self.loops(block, place):
            if self.sch.get(loop).kind == tirx.ForKind.SERIAL:
                self.sch.unroll(loop)

    def share(self, loops: list[LoopRV]) -> LoopRV:
        """Share out loops among all threads of a block; returns the thread's loop."""
        rows, lanes = self.thread_extents
        loop = self.sch.fuse(*loops) if len(loops) > 1 else loops[0]
        _, y, x = self.sch.split(loop, [None, rows, lanes])
        self.sch.bind(y, _ROWS)
        self.sch.bind(x, _LANES)
        return x

    def share_rows(self, row: LoopRV, other: LoopRV) -> LoopRV:
        """Share out a loop over rows and one in it; returns the thread's loop.

        What is left over must not be rows, of which there are as many as a call has: TVM could not bound a buffer's size.
        """
        sch = self.sch
        rows, lanes = self.thread_extents
        extents = [int(sch.get(loop).extent) for loop in (row, other)]
        if extents[0] * extents[1] % (rows * lanes) == 0:
            return self.share([row, other])
        if extents[1] == 1:
            return self.share([row])
        if extents[0] % rows:
            return self.share([other])
        _, y = sch.split(row, [None, rows])
        outer, x = sch.split(other, [None, lanes])
        sch.reorder(y, outer, x)
        sch.bind(y, _ROWS)
        sch.bind(x, _LANES)
        return x

    @property
    def thread_extents(self) -> tuple[int, int]:
        """Extents of threadIdx.y and threadIdx.x."""
        raise NotImplementedError

    def codebook(self, place: LoopRV) -> None:
        """The table of a format's values, in shared memory."""
        if "codebook" in self.names:
            self.share(self.loops(self.place("codebook", place, "shared"), place))

    # -- loads -------------------------------------------------------------------------------------------------------------

    def load_activations(self, place: LoopRV, per_thread: int) -> SBlockRV:
        """Copy A, of which a thread takes `per_thread` consecutive k, to registers, by loads as wide as rows allow."""
        held = self.place("held", place, "local")
        size = FORMATS[self.config.activation_dtype].bits // 8
        width = math.gcd(per_thread, self.config.K, _LOAD_BYTES // size)
        if width > 1 and self.padded_k == self.config.K:
            self.sch.vectorize(self.sch.split(self.loops(held, place)[-1], [None, width])[1])
        return held

    def load_words(self, place: LoopRV, per_thread: int) -> None:
        """Load the words of `per_thread` consecutive codes to registers, by loads as wide as rows allow."""
        if "words" not in self.names:
            return
        bits = self.problem.layout.bits
        words = self.place("words", place, "local")
        width = math.gcd(per_thread * bits // 32, self.config.K * bits // 32, _LOAD_BYTES // WORD_BYTES)
        if period_words(bits) == 1 and width > 1:
            self.sch.vectorize(self.sch.split(self.loops(words, place)[-1], [None, width])[1])
        self.unroll(words, place)

    # -- quantized activations ---------------------------------------------------------------------------------------------

    def quantization(self, block: LoopRV, chunk: LoopRV) -> None:
        """Find the largest magnitudes of rows, or groups, and what they give: for a block of threads, or where that is too
        much for its memory, for a chunk."""
        groups = self.config.activation_groups
        if not groups:
            return
        whole = 2 * 4 * self.tiling.block_m * groups <= _SCALE_BYTES
        place, scope = (block, "shared") if whole else (chunk, self.chunk_scope)
        scale = self.place("activation_scale", place, scope)
        absmax = self.place("absmax", place, scope)
        if scope == "local":
            return
        self.share_rows(*self.loops(scale, place))
        self.share_maxima(self.loops(absmax, place))

    #: Where a chunk's scales lie.
    chunk_scope = "shared"

    def share_maxima(self, loops: list[LoopRV]) -> None:
        """Share out the loops (row, group, k) of the largest magnitudes among the threads."""
        raise NotImplementedError


class _LaneNest(_Nest):
    """Lanes that share out k."""

    chunk_scope = "local"

    @property
    def thread_extents(self) -> tuple[int, int]:
        """See `_Nest`."""
        return self.tiling.threads_n, self.tiling.lanes

    def apply(self) -> None:
        """Take all steps."""
        sch, tiling = self.sch, self.tiling
        row, n = sch.get_loops(sch.get_sblock("epilogue"))
        rows, row = sch.split(row, [None, tiling.block_m])
        columns, thread, column = sch.split(n, [None, tiling.threads_n, tiling.thread_n])
        sch.reorder(columns, rows, thread, row, column)
        block = self.block_of(columns, rows)
        sch.bind(thread, _ROWS)
        sch.unroll(row)
        sch.unroll(column)
        self.inline("scale", "zero", "unpack")
        turn, partial = self.accumulate(thread)
        self.chunk_of_lane(turn)
        self.codebook(block)
        self.quantization(block, turn)
        sch.decompose_reduction(partial, turn)
        for name in ("accumulate_rf_init", "accumulate"):
            self.unroll(sch.get_sblock(name), thread)

    def accumulate(self, thread: LoopRV) -> tuple[LoopRV, SBlockRV]:
        """Sum the chunks of a lane, then the lanes; returns the loop over the chunks, and their block."""
        sch = self.sch
        total = self.place("accumulate", thread, "local")
        chunk = self.loops(total, thread)[-1]
        _, lane = sch.split(chunk, [None, self.tiling.lanes])
        partial = sch.rfactor(lane, 0)
        sch.set_scope(partial, 0, "local")
        loops = sch.get_loops(total)
        sch.bind(loops[-1], _LANES)
        sch.compute_at(partial, loops[3], preserve_unit_loops=True)
        lane, row, column, turn = self.loops(partial, loops[3])
        sch.reorder(lane, turn, row, column)
        sch.bind(lane, _LANES)
        sch.unroll(row)
        sch.unroll(column)
        return turn, partial

    def chunk_of_lane(self, turn: LoopRV) -> None:
        """All of one chunk, in registers."""
        sch = self.sch
        matmul = self.place("matmul", turn, "local")
        _, row, column, k = self.loops(matmul, turn)
        sch.reorder(k, row, column)
        first = self.loops(matmul, turn)[0]
        self.unroll(matmul, turn)
        decode = self.place("decode", turn, "local")
        self.unroll(decode, turn)
        self.load_words(turn, self.chunk)
        if "row_sum" in self.names:
            row_sum = self.place("row_sum", turn, "local")
            self.unroll(row_sum, turn)
            sch.decompose_reduction(row_sum, self.loops(row_sum, turn)[0])
        activation = self.place("activation", turn, "local")
        self.unroll(activation, turn)
        self.unroll(self.load_activations(turn, self.chunk), turn)
        sch.decompose_reduction(matmul, first)

    def share_maxima(self, loops: list[LoopRV]) -> None:
        """See `_Nest`: a row by all threads; a group by the lanes, where the threads over columns share out the groups evenly:
        what TVM writes of a reduction by threads has no bounds."""
        sch = self.sch
        _, group, k = loops
        threads, lanes = self.thread_extents
        if int(sch.get(group).extent) % threads:
            _, y, x = sch.split(k, [None, threads, lanes])
        else:
            _, x = sch.split(k, [None, lanes])
            _, y = sch.split(group, [None, threads])
        sch.bind(y, _ROWS)
        sch.bind(x, _LANES)


class _TileNest(_Nest):
    """Tiles in shared memory."""

    @property
    def thread_extents(self) -> tuple[int, int]:
        """See `_Nest`."""
        return self.tiling.threads_m, self.tiling.threads_n

    def apply(self) -> None:
        """Take all steps."""
        sch, tiling = self.sch, self.tiling
        row, n = sch.get_loops(sch.get_sblock("epilogue"))
        rows, y, row = sch.split(row, [None, tiling.threads_m, tiling.thread_m])
        columns, x, column = sch.split(n, [None, tiling.threads_n, tiling.thread_n])
        sch.reorder(columns, rows, y, x, row, column)
        block = self.block_of(columns, rows)
        sch.bind(y, _ROWS)
        sch.bind(x, _LANES)
        sch.unroll(row)
        sch.unroll(column)
        self.inline("scale", "zero", "unpack")
        total = self.place("accumulate", x, "local")
        row, column, chunk = self.loops(total, x)
        sch.reorder(chunk, row, column)
        self.unroll(total, chunk)
        matmul = self.place("matmul", chunk, "local")
        _, row, column, k = self.loops(matmul, chunk)
        sch.reorder(k, row, column)
        first = self.loops(matmul, chunk)[0]
        self.unroll(matmul, chunk)
        if "row_sum" in self.names:
            row_sum = self.place("row_sum", chunk, "local")
            self.unroll(row_sum, chunk)
            sch.decompose_reduction(row_sum, self.loops(row_sum, chunk)[0])
        self.tile_of_weights(chunk)
        activation = self.place("activation", chunk, "shared")
        self.quantization(block, chunk)
        self.tile_of_activations(activation, chunk)
        self.codebook(block)
        sch.decompose_reduction(matmul, first)
        init = sch.decompose_reduction(total, chunk)
        self.unroll(init, x)

    def tile_of_weights(self, chunk: LoopRV) -> None:
        """Decode a tile of weights: neighbouring threads take neighbouring columns, and each some consecutive k."""
        sch, tiling = self.sch, self.tiling
        decode = self.place("decode", chunk, "shared")
        k, n = self.loops(decode, chunk)
        codes = self.per_thread(tiling.block_n, stream_period(self.problem.layout.bits) if "words" in self.names else 1)
        parts, code = sch.split(k, [None, codes // self.step])
        sch.reorder(parts, n, code)
        place = self.share([parts, n])
        sch.unroll(code)
        self.load_words(place, codes)

    def tile_of_activations(self, activation: SBlockRV, chunk: LoopRV) -> None:
        """Convert a tile of activations: each thread takes some consecutive k of a row; rows begin in different banks."""
        sch, tiling = self.sch, self.tiling
        row, k = self.loops(activation, chunk)
        size = FORMATS[self.config.activation_dtype].bits // 8
        taken = self.per_thread(
            tiling.block_m, stream_period(self.problem.layout.bits) if tiling.dot else 1, _LOAD_BYTES // size
        )
        parts, element = sch.split(k, [None, taken // self.step])
        place = self.share_rows(row, parts)
        sch.unroll(element)
        sch.storage_align(activation, 0, axis=0, factor=32, offset=4)
        self.unroll(self.load_activations(place, taken), place)

    def per_thread(self, lines: int, unit: int, most: int = 1 << 30) -> int:
        """Consecutive k of a chunk that a thread takes of each of so many lines: a multiple of `unit`, perhaps at most `most`,
        and near to what keeps all threads at work."""
        wanted = min(most, self.chunk * lines // self.tiling.num_threads)
        sizes = [size for size in range(unit, self.chunk + 1, unit) if self.chunk % size == 0]
        return min(sizes, key=lambda size: abs(size - wanted))

    def share_maxima(self, loops: list[LoopRV]) -> None:
        """See `_Nest`: a row, or its groups, by the threads that share its results."""
        sch = self.sch
        row, _, k = loops
        threads, lanes = self.thread_extents
        y, _ = sch.split(row, [threads, None])
        _, x = sch.split(k, [None, lanes])
        sch.bind(y, _ROWS)
        sch.bind(x, _LANES)
