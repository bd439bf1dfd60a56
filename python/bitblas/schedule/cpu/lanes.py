"""The loop nest that every CPU rule shares: sixteen outputs in the lanes, weights decoded in registers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from ...config import MatmulConfig
from ...expr.pairs import PAIR
from ...expr.quads import needs_row_sum
from ...layout import LANES, QUAD, UNIT
from ..rule import LINE_BYTES, Problem
from .intrinsics import load_words, transpose_lanes, unpack_zeros
from .units import LaneTiling


@dataclass(frozen=True)
class Intrinsics:
    """The tensor intrinsics of a nest, by name.

    Attributes
    ----------
    activation : str or None
        Turns sixteen words of A into those of its copy; None leaves that to arithmetic.
    decode : str or None
        Turns sixteen codes into values; None leaves that to arithmetic.
    dot : callable or None
        From a number of words to what adds the products of so many to sixteen sums; for tilings with a `dot`.
    depth : int
        Words of each lane that it takes at most.
    library : str
        Functions that they call, as LLVM IR.
    """

    decode: str | None = None
    activation: str | None = None
    dot: Callable[[int], str] | None = None
    depth: int = 1
    library: str = ""


def schedule_lanes(func: tirx.PrimFunc, problem: Problem, tiling: LaneTiling, intrinsics: Intrinsics) -> Schedule:
    """Schedule a matmul for lanes.

    Before -> after, where weights are decoded in registers::

        activation, row_sum, decode, matmul, accumulate, epilogue, each over everything
        ->
        activation, row_sum                                  (once, parallel over rows when there are many)
        parallel tile of columns:
            for tile of rows:
                for several chunks of k: scale, zero                         (transposed together)
                    for chunk of k:
                        for ko: words; for ki unrolled: unpack, decode, matmul  (all in registers)
                        accumulate
                epilogue

    and where they are decoded into a panel::

        parallel tile of columns:
            for chunk of k:
                for ko: words; for ki unrolled: unpack, decode                   (chunk x tile, in the L1 cache)
                scale, zero
                for tile of rows:
                    for ko; for ki unrolled: matmul
                    accumulate
            for tile of rows: epilogue

    For dot products k counts words of four bytes, and there is no `unpack`.
    """
    sch = Schedule(func.with_attr({"tirx.noalias": True}))
    nest = _Nest(sch, problem, tiling, intrinsics)
    nest.activations()
    outer, tile = nest.tiles()
    groups, chunk, tile = nest.accumulate(outer if tiling.panel else tile)
    nest.scales(groups)
    inner, words = nest.matmul(chunk if tile is None else tile)
    nest.weights(chunk if tiling.panel else inner, words)
    nest.finish()
    return sch


class _Nest:
    """The schedule in the making."""

    def __init__(self, sch: Schedule, problem: Problem, tiling: LaneTiling, intrinsics: Intrinsics) -> None:
        self.sch, self.problem, self.tiling = sch, problem, tiling
        self.config: MatmulConfig = problem.config
        self.intrinsics = intrinsics
        self.lane_blocks = tiling.block_n // LANES
        self.chunk = tiling.chunk(self.config, problem.layout)
        #: k that one step of the loop over k stands for
        self.step = {"": 1, "bf16": PAIR}.get(tiling.dot, QUAD)
        unrolled = max(tiling.block_k, problem.layout.unit) if tiling.dot else tiling.block_k
        self.unrolled = math.gcd(unrolled, self.chunk) // self.step
        self.groups_at_once = self._groups_at_once()
        self.rows_ahead = tiling.block_n if tiling.prefetch else 0
        self.reductions: list[tuple[SBlockRV, LoopRV]] = []  # to be split into init and update at the very end
        self.to_tensorize: list[tuple[LoopRV, str]] = []  # after everything that asks for the blocks in these loops

    def _groups_at_once(self) -> int:
        """How many groups' scales are transposed together; 1 where that is not worth it, or tails stand against it."""
        config = self.config
        whole_tiles = config.N % self.tiling.block_n == 0
        if self.tiling.panel or self.chunk != config.group or not whole_tiles or not config.is_grouped:
            return 1
        return math.gcd(config.num_groups // self.tiling.split_k, LANES)

    def split_lanes(self, loop: LoopRV) -> tuple[LoopRV, LoopRV]:
        """A loop over a tile's columns -> unrolled blocks of sixteen, vectorized lanes."""
        blocks, lanes = self.sch.split(loop, [self.lane_blocks, LANES])
        self.sch.unroll(blocks)
        return blocks, lanes

    def activations(self) -> None:
        """Convert activations once, and sum them where zero points ask for it."""
        sch = self.sch
        block = sch.get_sblock("activation")
        if self.tiling.slices or self.config.activation_groups:
            self.measured_rows(block)
        elif self.config.A_dtype == "float32" and not self.tiling.panel:
            sch.compute_inline(block)
        else:
            row, k = sch.get_loops(block)
            self.align_rows(block)
            self.convert(row, k)
            if self.many_rows:
                sch.parallel(row)
        if not self.has_row_sums:
            return
        self.lanes_first("row_sum", self.chunk)
        if self.many_rows and not self.config.activation_groups:
            sch.parallel(sch.get_loops(sch.get_sblock("row_sum"))[0])

    def measured_rows(self, block: SBlockRV) -> None:
        """What begins with the largest magnitudes of a row is done a row at a time, while a cache holds it.

        Cutting activations into bytes; or quantizing them, with the sums.
        """
        sch, sliced = self.sch, self.tiling.slices
        row = sch.get_loops(sch.get_sblock("absmax"))[0]
        names = ["step", "activation"] if sliced else ["activation_scale", "activation"]
        if not sliced and self.has_row_sums:
            names += ["row_sum_lanes", "row_sum"] if self.chunk % LANES == 0 else ["row_sum"]
        self.lanes_first("absmax", self.chunk if sliced else self.config.K // self.config.activation_groups)
        for name in names:
            sch.reverse_compute_at(sch.get_sblock(name), row, preserve_unit_loops=True)
        self.align_rows(block)
        if sliced:
            index, k = sch.get_loops(block)[-2:]
            k, lanes = self.vectorize_k(k)
            sch.reorder(k, index, lanes)
            sch.unroll(index)  # so that what the digits of an activation share is found once
        else:
            groups = self.config.activation_groups
            width = math.gcd(self.padded_k // groups, LANES)
            *_, lanes = sch.split(sch.get_loops(block)[-1], [groups, None, width])
            if width > 1:
                sch.vectorize(lanes)
        if self.many_rows:
            sch.parallel(row)

    def convert(self, row: LoopRV, k: LoopRV) -> None:
        """Write a copy of A a vector at a time."""
        sch = self.sch
        if self.intrinsics.activation is None or self.config.K % (LANES * self.step):
            self.vectorize_k(k)
            return
        sch.annotate(row, "pragma_import_llvm", self.intrinsics.library)
        sch.tensorize(sch.split(k, [None, LANES])[1], self.intrinsics.activation)

    @property
    def padded_k(self) -> int:
        """K, rounded up to whole chunks."""
        return -(-self.config.K // self.chunk) * self.chunk

    @property
    def has_row_sums(self) -> bool:
        """Whether activations are summed."""
        return needs_row_sum(self.config, self.tiling.dot)

    @property
    def many_rows(self) -> bool:
        """Whether there are rows enough to prepare them by several threads."""
        return self.problem.m > self.tiling.block_m and self.tiling.parallel

    @property
    def line(self) -> int:
        """Elements of the copy of A in a cache line."""
        return LINE_BYTES // (1 if self.tiling.dot in ("u8s8", "s8s8") else 4)

    def align_rows(self, block: SBlockRV) -> None:
        """An odd number of cache lines a row: rows that are a power of two apart would share the sets of a cache."""
        axis = 1 if self.tiling.slices else 0
        self.sch.storage_align(block, 0, axis=axis, factor=2 * self.line, offset=self.line)

    def vectorize_k(self, k: LoopRV) -> tuple[LoopRV, LoopRV]:
        """Split a loop over the k of a copy of A into one over vectors, and the vector."""
        length = self.padded_k // (PAIR if self.tiling.dot == "bf16" else 1)
        outer, lanes = self.sch.split(k, [None, math.gcd(length, self.line)])
        self.sch.vectorize(lanes)
        return outer, lanes

    def lanes_first(self, name: str, size: int) -> None:
        """Reduce `size` elements to sixteen lanes, where they divide them, beside each part of a row."""
        sch = self.sch
        if size % LANES:
            return
        lanes = sch.get_sblock(f"{name}_lanes")
        sch.compute_at(lanes, sch.get_loops(sch.get_sblock(name))[-2], preserve_unit_loops=True)
        *_, lane, j = sch.get_loops(lanes)
        sch.reorder(j, lane)
        sch.vectorize(lane)
        self.reductions.append((lanes, j))

    def tiles(self) -> tuple[LoopRV, LoopRV]:
        """Tile the output, or the parts of K that are summed to it; returns the loops over tiles of columns and of rows."""
        sch, tiling = self.sch, self.tiling
        *parts, i, n = sch.get_loops(sch.get_sblock("part" if tiling.split_k > 1 else "epilogue"))
        tile, row = sch.split(i, [None, tiling.block_m])
        outer, block, lane = sch.split(n, [None, self.lane_blocks, LANES])
        sch.reorder(*parts, outer, tile, row, block, lane)
        if parts:
            outer = sch.fuse(*parts, outer)
            self.join_parts()
        if tiling.parallel:
            sch.parallel(outer)
        sch.unroll(row)
        sch.unroll(block)
        sch.vectorize(lane)
        if self.intrinsics.library:
            sch.annotate(tile, "pragma_import_llvm", self.intrinsics.library)
        return outer, tile

    def join_parts(self) -> None:
        """Sum the parts of K while the output is written."""
        sch = self.sch
        row, n = sch.get_loops(sch.get_sblock("epilogue"))
        outer, lanes = sch.split(n, [None, LANES])
        sch.reorder(outer, row, lanes)
        if self.tiling.parallel:
            sch.parallel(outer)
        sch.vectorize(lanes)
        join = sch.get_sblock("join")
        sch.compute_at(join, row, preserve_unit_loops=True)
        lanes, part = sch.get_loops(join)[-2:]
        sch.reorder(part, lanes)
        sch.vectorize(lanes)
        self.reductions.append((join, part))

    def accumulate(self, place: LoopRV) -> tuple[LoopRV, LoopRV, LoopRV | None]:
        """Place the sums of a tile.

        Returns the loop over chunks of k whose scales are transposed together, the one over chunks in it, and with a panel
        the one over tiles of rows in that.
        """
        sch = self.sch
        block = sch.get_sblock("accumulate")
        sch.compute_at(block, place, preserve_unit_loops=True)
        row, n, chunk = sch.get_loops(block)[-3:]
        tile = None
        if self.tiling.panel:
            tile, row = sch.split(row, [None, self.tiling.block_m])
        blocks, lanes = self.split_lanes(n)
        groups, chunk = sch.split(chunk, [None, self.groups_at_once])
        sch.reorder(groups, chunk, *([tile] if tile else []), row, blocks, lanes)
        sch.unroll(row)
        sch.vectorize(lanes)
        self.reductions.append((block, groups))
        return groups, chunk, tile

    def scales(self, place: LoopRV) -> None:
        """Scales and zero points lie row by row: a square of them is transposed into lanes at a time."""
        sch, config = self.sch, self.config
        for name, wanted in (("scale", config.with_scaling), ("zero", config.with_zeros)):
            if not wanted:
                continue
            block = sch.get_sblock(name)
            late = name == "scale" and config.integer_accumulation
            if late and self.tiling.split_k > 1:  # each is used once
                sch.compute_inline(block)
                continue
            tile = sch.get_loops(sch.get_sblock("epilogue"))[-4] if late else place
            sch.compute_at(block, tile, preserve_unit_loops=True)
            group, n = sch.get_loops(block)[-2:]
            packed = name == "zero" and config.zeros_packed
            if packed and 8 % config.format.bits == 0 and config.N % self.tiling.block_n == 0:
                sch.tensorize(self.split_lanes(n)[1], unpack_zeros(config.format.bits))
            elif packed or self.groups_at_once == 1:
                sch.vectorize(self.split_lanes(n)[1])
            else:  # blocks are not unrolled here: a square is a hundred instructions, and a tile many squares
                blocks, lanes = sch.split(n, [self.lane_blocks, LANES])
                sch.reorder(blocks, group, lanes)
                sch.tensorize(group, transpose_lanes(config.scale_dtype, self.groups_at_once, self.rows_ahead))

    def matmul(self, place: LoopRV) -> tuple[LoopRV, LoopRV]:
        """Place the products; returns the loop over unrolled k and the one around it."""
        sch = self.sch
        block = sch.get_sblock("matmul")
        sch.compute_at(block, place, preserve_unit_loops=True)
        if self.intrinsics.dot is not None:
            return self.dots(block, self.intrinsics.dot)
        chunk, row, n, k = sch.get_loops(block)[-4:]
        blocks, lanes = self.split_lanes(n)
        outer, inner = sch.split(k, [None, self.unrolled])
        sch.reorder(chunk, outer, inner, row, blocks, lanes)
        sch.unroll(inner)
        sch.unroll(row)
        sch.vectorize(lanes)
        self.reductions.append((block, outer))
        return inner, outer

    def dots(self, block: SBlockRV, dot: Callable[[int], str]) -> tuple[LoopRV, LoopRV]:
        """Products of words: the loop over their bytes, the lanes, and `depth` words become one intrinsic."""
        sch, depth = self.sch, math.gcd(self.intrinsics.depth, self.unrolled)
        chunk, *row, n, q, j = sch.get_loops(block)[-6 if self.tiling.slices else -5 :]
        blocks, lanes = self.split_lanes(n)
        outer, inner = sch.split(q, [None, self.unrolled // depth * depth])
        sch.reorder(chunk, outer, inner, *row, blocks, lanes, j)
        first = lanes
        if depth > 1:
            inner, first = sch.split(inner, [None, depth])
            sch.reorder(inner, *row, blocks, first, lanes)
        for loop in (inner, *row):
            sch.unroll(loop)
        sch.vectorize(sch.get_loops(sch.decompose_reduction(block, outer))[-1])
        self.to_tensorize.append((first, dot(depth)))
        return inner, outer

    def weights(self, place: LoopRV, words_place: LoopRV) -> None:
        """Words are loaded once for the k that share them; codes are decoded in registers, or into a panel."""
        sch, layout = self.sch, self.problem.layout
        decode = sch.get_sblock("decode")
        sch.compute_at(decode, place, preserve_unit_loops=True)
        k, n = sch.get_loops(decode)[-2:]
        lanes = self.split_lanes(n)[1]
        if self.tiling.panel:
            words_place, place = sch.split(
                k, [None, math.gcd(layout.unit if self.tiling.dot else UNIT, self.chunk) // self.step]
            )
            sch.unroll(place)
        if self.tiling.dot in ("u8s8", "s8s8"):
            sch.vectorize(lanes)
        else:
            self.unpack(place, lanes)
        for index, plane in enumerate(layout.planes if layout.name != "packed" else ()):
            words = sch.get_sblock(f"words{index}")
            shared = plane.codes_per_word > self.step and self.chunk % plane.codes_per_word == 0
            sch.compute_at(words, words_place if shared else place, preserve_unit_loops=True)
            sch.tensorize(
                self.split_lanes(sch.get_loops(words)[-1])[1], load_words(plane.word_bytes, self.tiling.prefetch)
            )

    def unpack(self, place: LoopRV, lanes: LoopRV) -> None:
        """Place the codes, and turn them into values over `lanes`."""
        sch = self.sch
        unpack = sch.get_sblock("unpack")
        sch.compute_at(unpack, place, preserve_unit_loops=True)
        if self.intrinsics.decode is None:
            sch.vectorize(lanes)
        else:
            sch.tensorize(lanes, self.intrinsics.decode)
        sch.vectorize(self.split_lanes(sch.get_loops(unpack)[-1])[1])

    def finish(self) -> None:
        """Do what the steps above had to leave for the end."""
        for block, loop in self.reductions:
            self.sch.decompose_reduction(block, loop)
        for loop, intrinsic in self.to_tensorize:
            self.sch.tensorize(loop, intrinsic)
