"""The program of an attention of one row on a CPU; of more, one after another. Importing this imports TVM.

What counts is that keys and values are read once, in place, and by all threads: blocks of them are tasks of their own, whose
results are put together in the end. A head's elements stand in the lanes, so that the products of a key are added across them.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from ..words import i32, i64, let
from .attention_operands import FloatOperands, Row
from .attention_tiling import RowAttentionTiling
from .attention_vectors import LOWEST, AttentionVectors, alloc, loop
from .exponential import FULL_DEGREE, exp2
from .sums import sum_functions

#: Blocks of keys are shared out to about so many tasks, all heads together: enough for many cores, and soon put together.
_MOST_TASKS = 256
#: What stands before the sums of a task's result: the maximum, and the total.
_FACTS = 2


class RowAttention(AttentionVectors):
    """The whole of a kernel."""

    def __init__(self, config: FlashAttenConfig, tiling: RowAttentionTiling) -> None:
        super().__init__(config, FloatOperands(tiling.lanes))
        self.tiling, self.keys = tiling, tiling.block_n

    def func(self, name: str) -> tirx.PrimFunc:
        """The function."""
        with IRBuilder() as builder, B.prim_func(s_tir=True):
            self.begin(name)
            heads = let("all_heads", self.batch * self.heads_kv)
            self.blocks = let("blocks", tirx.truncdiv(self.num_keys + (self.keys - 1), i64(self.keys)))
            most = let("most", tirx.max(tirx.truncdiv(i64(_MOST_TASKS), heads), i64(1)))
            self.share = let("share", tirx.truncdiv(self.blocks + (most - 1), most))  # blocks of a task
            self.splits = let("splits", tirx.truncdiv(self.blocks + (self.share - 1), self.share))
            self.width = _FACTS + self.config.dim_v
            self.alone = self.splits == 1  # whether a task sees all keys
            tasks, rows = heads * self.splits, heads * self.num_rows
            self.partial = alloc("partial", tirx.Select(self.alone, i64(1), tasks * self.num_rows * self.width))
            annotations = {"pragma_import_llvm": self.operands.library + sum_functions(self.lanes)}
            with B.parallel(0, tasks, annotations=annotations) as task, B.sblock("keys"):
                B.reads()
                B.writes()
                self._see_some(task)
            with B.If(tirx.Not(self.alone)), B.Then(), B.parallel(0, rows) as task, B.sblock("rows"):
                B.reads()
                B.writes()
                self._put_together(task)
        return builder.get()

    def _place(self, head: Expr) -> None:
        self.batch_at = let("b", tirx.truncdiv(head, self.heads_kv))
        self.head_at = let("h", tirx.truncmod(head, self.heads_kv))

    def _part(self, head: Expr, split: Expr, row: Expr) -> Expr:
        """Where the result of a task begins for a row."""
        return ((head * self.splits + split) * self.num_rows + row) * self.width

    def _number(self, name: str, value: Expr) -> Expr:
        """A variable of whose value TVM knows nothing: it would work it into each address, and compile for long."""
        place = alloc(f"{name}_held", 1, "int32")
        B.buffer_store(place, value, [0])
        return let(name, place[0])

    # -- some of the keys ----------------------------------------------------------------------------------------------------

    def _see_some(self, task: Expr) -> None:
        head, split = let("head", tirx.truncdiv(task, self.splits)), let("split", tirx.truncmod(task, self.splits))
        self._place(head)
        first = self._number("first_block", i32(split * self.share))
        end = self._number("end_block", i32(tirx.min(self.blocks, (split + 1) * self.share)))
        self.query = alloc("query", self.config.dim)
        self.scores = alloc("scores", self.keys)
        self.products = alloc("products", self.lanes * self.lanes)
        self.sums = alloc("sums", self.config.dim_v)
        self.maximum = alloc("maximum", 1)
        self.total, self.factor = alloc("total", self.lanes), alloc("factor", self.lanes)
        with B.serial(i64(0), self.num_rows) as row:
            query, head_of_q, limit = self.find_row(row)
            self.limit = self._number("limit", limit)
            self._take_query(query, head_of_q)
            seen = tirx.truncdiv(self.limit + self.keys, i32(self.keys))
            with B.serial(first, tirx.max(first, tirx.min(end, seen))) as block:
                self._see_block(let("first_key", block * self.keys))
            total = let("seen_total", tirx.call_pure_extern("float32", "bitblas_total", self.load(self.total, 0)))
            with B.If(self.alone):
                with B.Then():
                    self._write(self.sums, total, query, head_of_q)
                with B.Else():
                    self._keep(self._part(head, split, row), total)

    def _take_query(self, query: Expr, head: Expr) -> None:
        """A query, scaled; and nothing as its sums."""
        lanes, (whole, rest) = self.lanes, divmod(self.config.dim, self.lanes)
        scale = tirx.const(self.scale, "float32")

        def row(d: Expr) -> list[Expr]:
            return [self.batch_at, query, head, i64(d)]

        if whole:
            with loop("step", whole) as step:
                vector = self.operands.along(self.q, row, step * lanes) * self.spread(scale)
                self.store(self.query, step * lanes, vector)
        if rest:
            with loop("rest", rest) as i:
                value = self.operands.one_along(self.q, row, whole * lanes + i) * scale
                B.buffer_store(self.query, value, [whole * lanes + i])
        B.buffer_store(self.maximum, tirx.const(LOWEST, "float32"), [0])
        self.store(self.total, 0, self.spread(0.0))
        with loop("e", self.config.dim_v) as e:
            B.buffer_store(self.sums, tirx.const(0.0, "float32"), [e])

    def _see_block(self, first_key: Expr) -> None:
        """Let the row see a block of keys, of which it sees one at least."""
        held = self._number("held", tirx.min(i32(self.keys), self.limit + 1 - first_key))
        if self.config.layout == "nnn":
            self._multiply_keys(first_key, held)
        else:
            self._multiply_transposed(first_key, held)
        rest = let("rest", tirx.truncmod(held, i32(self.lanes)))
        with B.If(rest != 0), B.Then():  # lanes behind the last key count for nothing
            last = held - rest
            there = B.ramp(i32(0), 1, self.lanes) < tirx.Broadcast(rest, self.lanes)
            self.store(self.scores, last, tirx.Select(there, self.load(self.scores, last), self.spread(-math.inf)))
        self._exponentials(let("tiles", tirx.truncdiv(held + (self.lanes - 1), i32(self.lanes))))
        self._multiply_values(first_key, held)

    def _multiply_keys(self, first_key: Expr, held: Expr) -> None:
        """The scores of keys that lie along the lanes: those of a register together, and behind the last key anything."""
        lanes, together = self.lanes, self.tiling.keys
        with loop("tile", tirx.truncdiv(held + (lanes - 1), i32(lanes))) as tile:
            with loop("part", lanes // together) as part:
                place = let("place", tile * lanes + part * together)
                self._ask_ahead(first_key, place, together)
                keys = [let("key", i64(first_key + tirx.min(place + j, held - 1))) for j in range(together)]
                self._multiply_some_keys(keys, part * together)
            source, target = B.address_of(self.products[0]), B.address_of(self.scores[tile * lanes])
            B.evaluate(B.call_extern("void", "bitblas_add_lanes", source, target))

    def _ask_ahead(self, first_key: Expr, place: Expr, count: int) -> None:
        """Prefetch keys and values: they lie apart, so that no hardware sees them come."""
        key = let("ahead", i64(first_key) + i64(place))
        with loop("j", count) as j:
            self.ask_for(self.k, self.key_row(key + (i64(j) + self.tiling.ahead)), self.config.dim)
            self.ask_for(self.v, self.value_row(key + i64(j)), self.config.dim_v)

    def _multiply_some_keys(self, keys: list[Expr], line: Expr) -> None:
        """Products of the query and keys, from a line of `products` on, a line for each of these."""
        lanes, (whole, rest) = self.lanes, divmod(self.config.dim, self.lanes)
        sums = alloc("key_sums", len(keys) * lanes, scope="local")
        for j in range(len(keys)):
            self.store(sums, j * lanes, self.spread(0.0))
        if whole:
            with loop("step", whole) as step:
                query = let("q", self.load(self.query, step * lanes))
                for j, key in enumerate(keys):
                    product = self.operands.along(self.k, self.key_row(key), step * lanes) * query
                    self.store(sums, j * lanes, self.load(sums, j * lanes) + product)
        for j in range(len(keys)):
            self.store(self.products, (line + j) * lanes, self.load(sums, j * lanes))
        if rest:
            with loop("rest", rest) as i:
                d = whole * lanes + i
                for j, key in enumerate(keys):
                    product = self.operands.one_along(self.k, self.key_row(key), d) * self.query[d]
                    place = (line + j) * lanes
                    B.buffer_store(self.products, self.products[place] + product, [place])

    def _multiply_transposed(self, first_key: Expr, held: Expr) -> None:
        """The scores of keys that lie across the lanes: vectors of them where there are so many, else one by one."""
        lanes, dim = self.lanes, self.config.dim

        def row(d: Expr) -> Row:
            return self.transposed_row(d, i64(first_key))

        with loop("j", held) as j:
            self.ask_for(self.v, self.value_row(i64(first_key + j)), self.config.dim_v)
        whole = let("whole", tirx.truncdiv(held, i32(lanes)))
        with loop("tile", whole) as tile:
            sums = alloc("tile_sums", lanes, scope="local")
            self.store(sums, 0, self.spread(0.0))
            with loop("d", dim) as d:
                product = self.operands.along(self.k, row(d), tile * lanes) * self.spread(self.query[d])
                self.store(sums, 0, self.load(sums, 0) + product)
            self.store(self.scores, tile * lanes, self.load(sums, 0))
        with B.serial(whole * lanes, held) as j:
            one = alloc("key_sum", 1, scope="local")
            B.buffer_store(one, tirx.const(0.0, "float32"), [0])
            with loop("d", dim) as d:
                B.buffer_store(one, one[0] + self.operands.one_along(self.k, row(d), j) * self.query[d], [0])
            B.buffer_store(self.scores, one[0], [j])

    def _exponentials(self, tiles: Expr) -> None:
        """Scores become weights, relative to the new maximum; the factor is that of all that came before."""
        lanes, scores = self.lanes, self.scores
        largest, total = alloc("largest", lanes, scope="local"), alloc("block_total", lanes, scope="local")
        self.store(largest, 0, self.spread(self.maximum[0]))
        with loop("tile", tiles) as tile:
            self.store(largest, 0, tirx.max(self.load(scores, tile * lanes), self.load(largest, 0)))
        maximum = let("maximum", tirx.call_pure_extern("float32", "bitblas_largest", self.load(largest, 0)))
        self.store(self.factor, 0, exp2(self.spread(self.maximum[0] - maximum), lanes, FULL_DEGREE))
        B.buffer_store(self.maximum, maximum, [0])
        self.store(total, 0, self.spread(0.0))
        with loop("tile", tiles) as tile:
            weight = let("weight", exp2(self.load(scores, tile * lanes) - self.spread(maximum), lanes, FULL_DEGREE))
            self.store(scores, tile * lanes, weight)
            self.store(total, 0, self.load(total, 0) + weight)
        self.store(self.total, 0, self.load(self.total, 0) * self.load(self.factor, 0) + self.load(total, 0))

    def _multiply_values(self, first_key: Expr, held: Expr) -> None:
        """Add the weighted values of a block to the sums."""
        lanes, dim_v = self.lanes, self.config.dim_v
        vectors, rest = divmod(dim_v, lanes)
        times, left = divmod(vectors, self.tiling.values)
        if times:
            with loop("step", times) as step:
                self._multiply_some_values(first_key, held, step * (self.tiling.values * lanes), self.tiling.values)
        if left:
            self._multiply_some_values(first_key, held, i32((vectors - left) * lanes), left)
        if rest:
            with loop("rest", rest) as i:
                e, one = vectors * lanes + i, alloc("value_sum", 1, scope="local")
                B.buffer_store(one, tirx.const(0.0, "float32"), [0])
                with loop("j", held) as j:
                    value = self.operands.one_along(self.v, self.value_row(i64(first_key + j)), e)
                    B.buffer_store(one, one[0] + value * self.scores[j], [0])
                B.buffer_store(self.sums, self.sums[e] * self.factor[0] + one[0], [e])

    def _multiply_some_values(self, first_key: Expr, held: Expr, first: Expr, vectors: int) -> None:
        """Of the elements from `first` on, so many vectors. A block is summed by itself, as in `LaneAttention`."""
        lanes = self.lanes
        sums = alloc("value_sums", vectors * lanes, scope="local")
        for e in range(0, vectors * lanes, lanes):
            self.store(sums, e, self.spread(0.0))
        with loop("j", held) as j:
            row, weight = self.value_row(i64(first_key + j)), let("p", self.spread(self.scores[j]))
            for e in range(0, vectors * lanes, lanes):
                product = self.operands.along(self.v, row, first + e) * weight
                self.store(sums, e, self.load(sums, e) + product)
        for e in range(0, vectors * lanes, lanes):
            before = self.load(self.sums, first + e) * self.load(self.factor, 0)
            self.store(self.sums, first + e, before + self.load(sums, e))

    def _keep(self, place: Expr, total: Expr) -> None:
        """Keep what the row has seen of the task's keys."""
        B.buffer_store(self.partial, self.maximum[0], [place])
        B.buffer_store(self.partial, total, [place + 1])
        with loop("e", self.config.dim_v) as e:
            B.buffer_store(self.partial, self.sums[e], [place + _FACTS + e])

    # -- all of the keys -----------------------------------------------------------------------------------------------------

    def _put_together(self, task: Expr) -> None:
        """A row's result, from those of the tasks of its keys."""
        lanes, dim_v, partial = self.lanes, self.config.dim_v, self.partial
        head, row = let("head", tirx.truncdiv(task, self.num_rows)), let("row", tirx.truncmod(task, self.num_rows))
        self._place(head)
        query, head_of_q, _ = self.find_row(row)
        maximum, total = alloc("maximum", 1, scope="local"), alloc("total", 1, scope="local")
        weight, sums = alloc("weight", lanes, scope="local"), alloc("sums", dim_v)
        B.buffer_store(maximum, tirx.const(LOWEST, "float32"), [0])
        B.buffer_store(total, tirx.const(0.0, "float32"), [0])
        with loop("e", dim_v) as e:
            B.buffer_store(sums, tirx.const(0.0, "float32"), [e])
        with B.serial(i64(0), self.splits) as split:
            B.buffer_store(maximum, tirx.max(partial[self._part(head, split, row)], maximum[0]), [0])
        with B.serial(i64(0), self.splits) as split:
            place = let("place", self._part(head, split, row))
            self.store(weight, 0, exp2(self.spread(partial[place] - maximum[0]), lanes, FULL_DEGREE))
            B.buffer_store(total, total[0] + partial[place + 1] * weight[0], [0])
            with loop("e", dim_v) as e:
                B.buffer_store(sums, sums[e] + partial[place + _FACTS + e] * weight[0], [e])
        self._write(sums, total[0], query, head_of_q)

    def _write(self, sums: tirx.Buffer, total: Expr, query: Expr, head: Expr) -> None:
        """Divide a row's sums; zeros where it has seen no key."""
        one = tirx.const(1.0, "float32")
        factor = let("factor", one / tirx.Select(total == 0.0, one, total))
        with loop("e", self.config.dim_v) as e:
            value = (sums[e] * factor).astype(self.config.Out_dtype)
            B.buffer_store(self.out, value, [self.batch_at, query, head, i64(e)])
