"""The program of an attention on a CPU: rows in the lanes, keys and values one by one. Importing this imports TVM.

S^T = K · Q^T and out^T = V^T · P^T: so the maximum over keys, and the sum, are those of registers, lane by lane, and
nothing is ever added across lanes. Elements of K and V are scalars that are spread over the lanes as they are loaded.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from .attention_tiling import LaneAttentionTiling
from .exponential import exp2

#: What a maximum begins with: a finite number, so that what is not seen, -inf, is infinitely far below it.
LOWEST = -3.4028234663852886e38


def i32(value: Any) -> Expr:
    """As int32."""
    return tirx.const(value, "int32") if isinstance(value, int) else value.astype("int32")


def i64(value: Any) -> Expr:
    """As int64."""
    return tirx.const(value, "int64") if isinstance(value, int) else value.astype("int64")


def let(name: str, value: Expr) -> Expr:
    """A variable that holds a value."""
    bound = B.bind(value)
    IRBuilder.name(name, bound)
    return bound


def alloc(name: str, size: int, dtype: str = "float32", scope: str = "global") -> tirx.Buffer:
    """Memory of a thread."""
    found = B.sblock_alloc_buffer((size,), dtype, scope=scope)
    IRBuilder.name(name, found)
    return found


class LaneAttention:
    """The whole of a kernel."""

    def __init__(self, config: FlashAttenConfig, tiling: LaneAttentionTiling) -> None:
        self.config, self.tiling = config, tiling
        self.lanes, self.vectors = tiling.lanes, tiling.vectors
        self.sub = tiling.lanes * tiling.vectors  # rows that are computed together
        self.rows, self.keys = tiling.block_m, tiling.block_n
        self.scale = config.softmax_scale * math.log2(math.e)

    # -- words -----------------------------------------------------------------------------------------------------------

    def ramp(self, first: Expr | int) -> Expr:
        return B.ramp(i32(first) if isinstance(first, int) else first, 1, self.lanes)

    def load(self, buffer: tirx.Buffer, first: Expr | int) -> Expr:
        return buffer.vload([first], f"{buffer.dtype}x{self.lanes}")

    def store(self, buffer: tirx.Buffer, first: Expr | int, value: Expr) -> None:
        B.buffer_store(buffer, value, [self.ramp(first)])

    def spread(self, value: Expr | float) -> Expr:
        value = tirx.const(value, "float32") if isinstance(value, float) else value
        return tirx.Broadcast(value, self.lanes)

    # -- the kernel --------------------------------------------------------------------------------------------------------

    def func(self, name: str) -> tirx.PrimFunc:
        """The function; its arguments are those of `bitblas.expr.attention_func`, with any strides but the last."""
        with IRBuilder() as builder, B.prim_func(s_tir=True):
            B.func_name(name)
            B.func_attr({"tirx.noalias": True, "global_symbol": name})
            self._arguments()
            self.group = let("group", tirx.truncdiv(self.heads, self.heads_kv))
            self.num_rows = let("rows", self.queries * self.group)
            blocks = let("blocks", tirx.truncdiv(self.num_rows + (self.rows - 1), i64(self.rows)))
            with B.parallel(0, self.batch * self.heads_kv * blocks) as task, B.sblock("kernel"):
                B.reads()
                B.writes()
                self._place(task, blocks)
                self._body()
        return builder.get()

    def _arguments(self) -> None:
        config = self.config
        sizes = "batch", "heads", "heads_kv", "queries", "keys"
        self.batch, self.heads, self.heads_kv, self.queries, self.num_keys = (B.int64() for _ in sizes)
        k_shape: tuple[Any, ...] = (self.batch, self.num_keys, self.heads_kv, i64(config.dim))
        if config.layout == "ntn":
            k_shape = (self.batch, i64(config.dim), self.heads_kv, self.num_keys)
        shapes = {
            "q": ((self.batch, self.queries, self.heads, i64(config.dim)), config.Q_dtype),
            "k": (k_shape, config.K_dtype),
            "v": ((self.batch, self.num_keys, self.heads_kv, i64(config.dim_v)), config.V_dtype),
            "out": ((self.batch, self.queries, self.heads, i64(config.dim_v)), config.Out_dtype),
        }
        handles = [B.arg(name, B.handle()) for name in shapes]
        self.q, self.k, self.v, self.out = (
            B.match_buffer(handle, shape, dtype, strides=[*(B.int64() for _ in range(3)), i64(1)])
            for handle, (shape, dtype) in zip(handles, shapes.values(), strict=True)
        )

    def _place(self, task: Expr, blocks: Expr) -> None:
        """Which batch, head and rows a task is for; the longest and the shortest of a causal one take turns."""
        head = let("head", tirx.truncdiv(task, blocks))
        self.b, self.h = let("b", tirx.truncdiv(head, self.heads_kv)), let("h", tirx.truncmod(head, self.heads_kv))
        block = let("turn", tirx.truncmod(task, blocks))
        if self.config.is_causal:
            half = tirx.truncdiv(block, i64(2))
            block = tirx.Select(tirx.truncmod(block, i64(2)) == 0, half, blocks - 1 - half)
        self.first = let("first", block * self.rows)

    def _body(self) -> None:
        config, rows = self.config, self.rows
        self.dim, self.dim_v = config.dim, config.dim_v
        self.queries_t = alloc("queries_t", self.dim * rows)
        self.keys_held = alloc("keys_held", self.keys * self.dim)
        self.values_held = alloc("values_held", self.keys * self.dim_v)
        self.weights = alloc("weights", self.keys * self.sub)
        self.sums = alloc("sums", self.dim_v * rows)
        self.maxima, self.totals = alloc("maxima", rows), alloc("totals", rows)
        self.limits = alloc("limits", rows, "int32")
        self._take_queries()
        last = let("last", self.limits[rows - 1])
        with B.serial(0, tirx.truncdiv(last + self.keys, i32(self.keys))) as block:
            first_key = let("first_key", block * self.keys)
            self._take_keys(first_key)
            with B.serial(0, rows // self.sub) as part:
                seen = let(
                    "seen", tirx.min(i32(self.keys), self.limits[part * self.sub + (self.sub - 1)] + 1 - first_key)
                )
                with B.If(seen > 0), B.Then():
                    tiles = let("tiles", tirx.truncdiv(seen + (self.tiling.keys - 1), i32(self.tiling.keys)))
                    self._update(part, first_key, tiles)
        self._give()

    def _row(self, row: Expr) -> tuple[Expr, Expr]:
        """Query and head of a row of the block; rows beyond the end are the last."""
        found = let("row", tirx.min(self.first + i64(row), self.num_rows - 1))
        query = let("query", tirx.truncdiv(found, self.group))
        return query, let("query_head", self.h * self.group + (found - query * self.group))

    def _take_queries(self) -> None:
        """Queries, scaled, one beside another; and how far each sees."""
        with B.serial(0, self.rows) as r:
            query, head = self._row(r)
            with B.serial(0, self.dim) as d:
                value = self.q[self.b, query, head, i64(d)].astype("float32") * tirx.const(self.scale, "float32")
                B.buffer_store(self.queries_t, value, [d * self.rows + r])
            limit = self.num_keys - 1
            if self.config.is_causal:
                limit = tirx.min(limit, query + (self.num_keys - self.queries))
            B.buffer_store(self.limits, tirx.max(limit, i64(-1)).astype("int32"), [r])
        with B.serial(0, self.rows // self.lanes) as j:
            self.store(self.maxima, j * self.lanes, self.spread(LOWEST))
            self.store(self.totals, j * self.lanes, self.spread(0.0))
        with B.serial(0, self.dim_v * self.rows // self.lanes) as j:
            self.store(self.sums, j * self.lanes, self.spread(0.0))

    def _take_keys(self, first_key: Expr) -> None:
        """A block of keys and values, as float32, side by side; values beyond the end are 0."""
        held = let("held", tirx.min(i64(self.keys), self.num_keys - i64(first_key)).astype("int32"))
        first = i64(first_key)
        if self.config.layout == "nnn":
            with B.serial(0, held) as j:
                self._copy(
                    self.keys_held, j * self.dim, self.dim, lambda d: [self.b, first + i64(j), self.h, i64(d)], self.k
                )
        else:
            with B.serial(0, self.dim) as d, B.serial(0, held) as j:
                value = self.k[self.b, i64(d), self.h, first + i64(j)].astype("float32")
                B.buffer_store(self.keys_held, value, [d * self.keys + j])
        with B.serial(0, held) as j:
            self._copy(
                self.values_held, j * self.dim_v, self.dim_v, lambda d: [self.b, first + i64(j), self.h, i64(d)], self.v
            )
        with B.serial(0, (self.keys - held) * self.dim_v) as j:
            B.buffer_store(self.values_held, tirx.const(0.0, "float32"), [held * self.dim_v + j])

    def _copy(self, to: tirx.Buffer, place: Expr, size: int, source: Any, buffer: tirx.Buffer) -> None:
        whole = size // self.lanes
        if whole:
            with B.serial(0, whole) as d:
                value = buffer.vload(source(d * self.lanes), f"{buffer.dtype}x{self.lanes}").astype(
                    f"float32x{self.lanes}"
                )
                self.store(to, place + d * self.lanes, value)
        if size % self.lanes:
            with B.serial(0, size % self.lanes) as d:
                value = buffer[tuple(source(d + whole * self.lanes))].astype("float32")
                B.buffer_store(to, value, [place + (d + whole * self.lanes)])

    # -- a block of keys with some rows ------------------------------------------------------------------------------------

    def _update(self, part: Expr, first_key: Expr, tiles: Expr) -> None:
        row = let("first_row", part * self.sub)
        largest = alloc("largest", self.sub, scope="local")
        factors = alloc("factors", self.sub, scope="local")
        for c in range(self.vectors):
            self.store(largest, c * self.lanes, self.load(self.maxima, row + c * self.lanes))
        self._scores(row, first_key, tiles, largest)
        self._softmax(row, tiles, largest, factors)
        self._weigh(row, tiles, factors)

    def _scores(self, row: Expr, first_key: Expr, tiles: Expr, largest: tirx.Buffer) -> None:
        keys, lanes = self.tiling.keys, self.lanes
        with B.serial(0, tiles) as tile:
            acc = alloc("scores", keys * self.sub, scope="local")
            for i in range(keys * self.vectors):
                self.store(acc, i * lanes, self.spread(0.0))
            with B.serial(0, self.dim) as d:
                q = [self.load(self.queries_t, d * self.rows + row + c * lanes) for c in range(self.vectors)]
                q = [let("q", x) for x in q]
                for r in range(keys):
                    at = (
                        (tile * keys + r) * self.dim + d
                        if self.config.layout == "nnn"
                        else d * self.keys + (tile * keys + r)
                    )
                    key = let("key", self.spread(self.keys_held[at]))
                    for c in range(self.vectors):
                        place = (r * self.vectors + c) * lanes
                        self.store(acc, place, self.load(acc, place) + key * q[c])
            crosses = first_key + tile * keys + (keys - 1) > self.limits[row]
            with B.If(crosses):
                with B.Then():
                    self._keep_scores(row, first_key, tile, acc, largest, masked=True)
                with B.Else():
                    self._keep_scores(row, first_key, tile, acc, largest, masked=False)

    def _keep_scores(
        self, row: Expr, first_key: Expr, tile: Expr, acc: tirx.Buffer, largest: tirx.Buffer, masked: bool
    ) -> None:
        keys, lanes = self.tiling.keys, self.lanes
        for c in range(self.vectors):
            top = self.load(largest, c * lanes)
            for r in range(keys):
                value = self.load(acc, (r * self.vectors + c) * lanes)
                if masked:
                    limit = self.load(self.limits, row + c * lanes)
                    key = tirx.Broadcast(first_key + (tile * keys + r), lanes)
                    value = tirx.Select(key <= limit, value, self.spread(-math.inf))
                value = let("score", value)
                self.store(self.weights, ((tile * keys + r) * self.vectors + c) * lanes, value)
                top = tirx.max(value, top)
            self.store(largest, c * lanes, top)

    def _softmax(self, row: Expr, tiles: Expr, largest: tirx.Buffer, factors: tirx.Buffer) -> None:
        lanes = self.lanes
        total = alloc("total", self.sub, scope="local")
        for c in range(self.vectors):
            at = row + c * lanes
            factor = let("factor", exp2(self.load(self.maxima, at) - self.load(largest, c * lanes), lanes, 5))
            self.store(factors, c * lanes, factor)
            self.store(total, c * lanes, self.load(self.totals, at) * factor)
            self.store(self.maxima, at, self.load(largest, c * lanes))
        with B.serial(0, tiles * self.tiling.keys) as j:
            for c in range(self.vectors):
                place = (j * self.vectors + c) * lanes
                value = let("weight", exp2(self.load(self.weights, place) - self.load(largest, c * lanes), lanes, 5))
                self.store(self.weights, place, value)
                self.store(total, c * lanes, self.load(total, c * lanes) + value)
        for c in range(self.vectors):
            self.store(self.totals, row + c * lanes, self.load(total, c * lanes))

    def _weigh(self, row: Expr, tiles: Expr, factors: tirx.Buffer) -> None:
        size = self.tiling.values
        whole = self.dim_v // size
        if whole:
            with B.serial(0, whole) as tile:
                self._weigh_values(row, tiles, factors, tile * size, size)
        if self.dim_v % size:
            self._weigh_values(row, tiles, factors, i32(whole * size), self.dim_v % size)

    def _weigh_values(self, row: Expr, tiles: Expr, factors: tirx.Buffer, first: Expr, size: int) -> None:
        lanes = self.lanes
        acc = alloc("weighted", size * self.sub, scope="local")
        for r in range(size):
            for c in range(self.vectors):
                held = self.load(self.sums, (first + r) * self.rows + row + c * lanes)
                self.store(acc, (r * self.vectors + c) * lanes, held * self.load(factors, c * lanes))
        with B.serial(0, tiles * self.tiling.keys) as j:
            p = [let("p", self.load(self.weights, (j * self.vectors + c) * lanes)) for c in range(self.vectors)]
            for r in range(size):
                value = let("value", self.spread(self.values_held[j * self.dim_v + first + r]))
                for c in range(self.vectors):
                    place = (r * self.vectors + c) * lanes
                    self.store(acc, place, self.load(acc, place) + value * p[c])
        for r in range(size):
            for c in range(self.vectors):
                self.store(
                    self.sums, (first + r) * self.rows + row + c * lanes, self.load(acc, (r * self.vectors + c) * lanes)
                )

    def _give(self) -> None:
        """Write the output."""
        with B.serial(0, self.rows // self.lanes) as j:
            total = let("total_of", self.load(self.totals, j * self.lanes))
            ones = self.spread(1.0)
            self.store(self.totals, j * self.lanes, ones / tirx.Select(total == self.spread(0.0), ones, total))
        left = let("left", tirx.min(i64(self.rows), self.num_rows - self.first).astype("int32"))
        with B.serial(0, left) as r:
            query, head = self._row(r)
            with B.serial(0, self.dim_v) as d:
                value = self.sums[d * self.rows + r] * self.totals[r]
                B.buffer_store(self.out, value.astype(self.config.Out_dtype), [self.b, query, head, i64(d)])
