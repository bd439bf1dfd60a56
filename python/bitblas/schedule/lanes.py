"""The loop nest that every CPU rule shares: sixteen outputs in the lanes, weights decoded in registers."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from ..config import MatmulConfig
from ..expr.matmul import reduction_chunk
from ..layout import LANES
from .intrinsics import load_words
from .rule import Problem, Tiling


def schedule_lanes(func: tirx.PrimFunc, problem: Problem, tiling: Tiling, decode_intrinsic: str | None) -> Schedule:
    """Schedule a matmul for lanes.

    Before -> after::

        activation, row_sum, decode, matmul, accumulate, epilogue, each over everything
        ->
        activation, row_sum                                  (once, parallel over rows when there are many)
        parallel (panel of rows, tile of columns):
            for tile of rows:
                for chunk of k:
                    for ko: words; for ki unrolled: unpack, decode, matmul      (all in registers)
                    scale, zero, accumulate
                epilogue
    """
    sch = Schedule(tirx.PrimFunc.with_attr(func, {"tirx.noalias": True}))
    nest = _Nest(sch, problem, tiling, decode_intrinsic)
    nest.activations()
    tile = nest.tiles()
    chunk_loop = nest.accumulate(tile)
    nest.scales(chunk_loop)
    nest.matmul(chunk_loop)
    nest.finish()
    return sch


class _Nest:
    """The schedule in the making."""

    def __init__(self, sch: Schedule, problem: Problem, tiling: Tiling, decode_intrinsic: str | None) -> None:
        self.sch, self.problem, self.tiling = sch, problem, tiling
        self.config: MatmulConfig = problem.config
        self.decode_intrinsic = decode_intrinsic
        self.lane_blocks = tiling.block_n // LANES
        self.reductions: list[tuple[SBlockRV, LoopRV]] = []  # to be split into init and update at the very end

    def split_lanes(self, loop: LoopRV) -> tuple[LoopRV, LoopRV]:
        """A loop over a tile's columns -> unrolled blocks of sixteen, vectorized lanes."""
        blocks, lanes = self.sch.split(loop, [self.lane_blocks, LANES])
        self.sch.unroll(blocks)
        return blocks, lanes

    def activations(self) -> None:
        sch, many = self.sch, self.problem.m > self.tiling.block_m and self.tiling.parallel
        block = sch.get_sblock("activation")
        if self.config.A_dtype == "float32":
            sch.compute_inline(block)
        else:
            row, k = sch.get_loops(block)
            width = math.gcd(self.config.K, LANES)
            if width > 1:
                sch.vectorize(sch.split(k, [None, width])[1])
            if many:
                sch.parallel(row)
        if not self.config.with_zeros:
            return
        if reduction_chunk(self.config) % LANES == 0:
            lanes = sch.get_sblock("row_sum_lanes")
            row, _, lane, j = sch.get_loops(lanes)
            sch.reorder(j, lane)
            sch.vectorize(lane)
            self.reductions.append((lanes, j))
            total = sch.get_sblock("row_sum")
            sch.compute_at(lanes, sch.get_loops(total)[1], preserve_unit_loops=True)
            j = sch.get_loops(lanes)[-2]
            self.reductions[-1] = (lanes, j)
        if many:
            sch.parallel(sch.get_loops(sch.get_sblock("row_sum"))[0])

    def tiles(self) -> LoopRV:
        """Tile the output; returns the loop over tiles of rows, under which all the rest is computed."""
        sch, tiling = self.sch, self.tiling
        epilogue = sch.get_sblock("epilogue")
        i, n = sch.get_loops(epilogue)
        tile, row = sch.split(i, [None, tiling.block_m])
        outer, block, lane = sch.split(n, [None, self.lane_blocks, LANES])
        if tiling.panel_m:
            panel, tile = sch.split(tile, [None, tiling.panel_m // tiling.block_m])
            sch.reorder(panel, outer, tile, row, block, lane)
            outer = sch.fuse(panel, outer)
        else:
            sch.reorder(outer, tile, row, block, lane)
        if tiling.parallel:
            sch.parallel(outer)
        sch.unroll(row)
        sch.unroll(block)
        sch.vectorize(lane)
        return tile

    def accumulate(self, tile: LoopRV) -> LoopRV:
        """Place the sums of a tile; returns the loop over chunks of k."""
        sch = self.sch
        block = sch.get_sblock("accumulate")
        sch.compute_at(block, tile, preserve_unit_loops=True)
        row, n, chunk = sch.get_loops(block)[-3:]
        blocks, lanes = self.split_lanes(n)
        sch.reorder(chunk, row, blocks, lanes)
        sch.unroll(row)
        sch.vectorize(lanes)
        self.reductions.append((block, chunk))
        return chunk

    def scales(self, chunk_loop: LoopRV) -> None:
        for name, wanted in (("scale", self.config.with_scaling), ("zero", self.config.with_zeros)):
            if not wanted:
                continue
            block = self.sch.get_sblock(name)
            place = chunk_loop
            if name == "scale" and self.config.integer_accumulation:
                place = self.sch.get_loops(self.sch.get_sblock("epilogue"))[-4]
            self.sch.compute_at(block, place, preserve_unit_loops=True)
            self.sch.vectorize(self.split_lanes(self.sch.get_loops(block)[-1])[1])

    def matmul(self, chunk_loop: LoopRV) -> None:
        sch, tiling = self.sch, self.tiling
        block = sch.get_sblock("matmul")
        sch.compute_at(block, chunk_loop, preserve_unit_loops=True)
        row, n, chunk, k = sch.get_loops(block)[-4:]
        blocks, lanes = self.split_lanes(n)
        outer, inner = sch.split(k, [None, math.gcd(tiling.block_k, reduction_chunk(self.config))])
        sch.reorder(chunk, outer, inner, row, blocks, lanes)
        sch.unroll(inner)
        sch.unroll(row)
        sch.vectorize(lanes)
        self.reductions.append((block, outer))
        self.weights(outer, inner)

    def weights(self, outer: LoopRV, inner: LoopRV) -> None:
        """Words are loaded once for the k that share them; codes are decoded where they are used."""
        sch, layout = self.sch, self.problem.layout
        decode, unpack = sch.get_sblock("decode"), sch.get_sblock("unpack")
        sch.compute_at(decode, inner, preserve_unit_loops=True)
        sch.compute_at(unpack, inner, preserve_unit_loops=True)
        lanes = self.split_lanes(sch.get_loops(decode)[-1])[1]
        if self.decode_intrinsic is None:
            sch.vectorize(lanes)
        else:
            sch.tensorize(lanes, self.decode_intrinsic)
        sch.vectorize(self.split_lanes(sch.get_loops(unpack)[-1])[1])
        if layout.name == "packed":
            return
        for index, plane in enumerate(layout.planes):
            words = sch.get_sblock(f"words{index}")
            sch.compute_at(words, outer if plane.codes_per_word > 1 else inner, preserve_unit_loops=True)
            sch.tensorize(self.split_lanes(sch.get_loops(words)[-1])[1], load_words(plane.word_bytes))

    def finish(self) -> None:
        for block, loop in self.reductions:
            self.sch.decompose_reduction(block, loop)
