"""How an attention's operands reach a thread's own memory, and its results the output. Importing this imports TVM."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from ..words import i32, i64, let
from .attention_operands import FloatOperands, PairOperands, Row
from .attention_tiling import LaneAttentionTiling
from .attention_vectors import LOWEST, AttentionVectors, alloc, loop

#: Rows of K and V that are asked for ahead of their copying: they lie apart, so that no hardware sees them come.
ROWS_AHEAD = 8


class AttentionPanels(AttentionVectors):
    """Panels of words: what a task holds in its caches.

    Queries and outputs stand in the lanes, those side by side that are computed together: `queries_t` (parts, words, rows of
    a part), `sums` (parts, dim_v, rows of a part). Keys lie as in memory, (keys, words) or for "ntn" (words, keys); values
    as (words of keys, dim_v).
    """

    #: Where a task is: set by the program that uses this.
    first_row: Expr

    def __init__(self, config: FlashAttenConfig, tiling: LaneAttentionTiling) -> None:
        super().__init__(config, (PairOperands if tiling.dot else FloatOperands)(tiling.lanes))
        self.tiling, self.rows, self.keys = tiling, tiling.block_m, tiling.block_n
        self.together = tiling.lanes * tiling.vectors  # rows of a part
        self.depth = self.operands.depth
        self.words = -(-config.dim // self.depth)

    # -- places ------------------------------------------------------------------------------------------------------------

    def line(self, row: Expr, index: Expr | int, lines: int) -> Expr:
        """Where, in a panel of so many lines, a line of the part begins whose first row is `row`."""
        return row * lines + index * self.together

    def few(self, few: Expr, index: Expr | int, lines: int) -> Expr:
        """Where a line of a register's rows begins: of the part that they are in."""
        first = few * self.lanes
        within = tirx.truncmod(first, i32(self.together)) if self.tiling.vectors > 1 else i32(0)
        return self.line(first - within, index, lines) + within

    # -- queries -----------------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Reserve the panels, and count the rows that there are, and the parts that have some of them."""
        self.left = let("left", tirx.min(i64(self.rows), self.num_rows - self.first_row).astype("int32"))
        self.parts = let("parts", tirx.truncdiv(self.left + (self.together - 1), i32(self.together)))
        rows, operands, dim_v = self.rows, self.operands, self.config.dim_v
        self.queries_t = alloc("queries_t", self.words * rows, operands.dtype)
        self.keys_held = alloc("keys_held", self.keys * self.words, operands.dtype)
        self.values_held = alloc("values_held", self.keys // self.depth * dim_v, operands.dtype)
        self.sums = alloc("sums", dim_v * rows)
        self.maxima, self.totals = alloc("maxima", rows), alloc("totals", rows)
        self.limits = alloc("limits", rows, "int32")
        self.queries_of, self.heads_of = alloc("queries_of", rows, "int64"), alloc("heads_of", rows, "int64")
        self.square = alloc("square", self.lanes * self.lanes, operands.dtype)
        self.results = alloc("results", self.lanes * self.lanes)

    def _find_rows(self) -> None:
        """Query, head and last visible key of each row of the block; rows beyond the end are the last."""
        with loop("index", self.parts * self.together) as index:
            row = let("row", tirx.min(self.first_row + i64(index), self.num_rows - 1))
            for panel, value in zip((self.queries_of, self.heads_of, self.limits), self.find_row(row), strict=True):
                B.buffer_store(panel, value, [index])

    def _place_of(self, row: Expr) -> list[Expr]:
        """Batch, query and head of a row: where Q and the output have it."""
        return [self.batch_at, self.queries_of[row], self.heads_of[row]]

    def take_queries(self) -> None:
        """Queries, a register of them at a time, beside each other; and nothing as their sums."""
        lanes, whole = self.lanes, self.config.dim // self.depth // self.lanes
        self._find_rows()
        with loop("few", self.parts * self.tiling.vectors) as few:
            if whole:
                with loop("step", whole) as step:
                    with loop("i", lanes) as i:
                        vector = self.operands.along(self.q, self._query(few * lanes + i), step * lanes)
                        self.store(self.square, i * lanes, self._scaled(vector, lanes))
                    place = self.few(few, step * lanes, self.words)
                    self._transpose(self.square, 0, lanes, self.queries_t, place, self.together)
            if self.words > whole * lanes:
                with loop("i", lanes) as i:
                    for word in range(whole * lanes, self.words):
                        size = min(self.depth, self.config.dim - word * self.depth)
                        value = self.operands.one_along(self.q, self._query(few * lanes + i), i32(word), size)
                        B.buffer_store(self.queries_t, self._scaled(value, 1), [self.few(few, word, self.words) + i])
        for panel, lines, value in (
            (self.maxima, 1, LOWEST),
            (self.totals, 1, 0.0),
            (self.sums, self.config.dim_v, 0.0),
        ):
            with loop("at", self.parts * (lines * self.tiling.vectors)) as at:
                self.store(panel, at * lanes, self.spread(value))

    def _query(self, row: Expr) -> Row:
        return lambda d: [*self._place_of(row), i64(d)]

    def _transpose(
        self, source: tirx.Buffer, first: Expr | int, pitch: int, to: tirx.Buffer, place: Expr | int, to_pitch: int
    ) -> None:
        """Transpose a square of words, whose lines lie so many words apart."""
        address, target = B.address_of(source[first]), B.address_of(to[place])
        B.evaluate(B.call_extern("void", "bitblas_transpose", address, i64(pitch), target, i64(to_pitch)))

    def _scaled(self, value: Expr, lanes: int) -> Expr:
        if not self.operands.scales_queries:
            return value
        scale = tirx.const(self.scale, "float32")
        return value * (tirx.Broadcast(scale, lanes) if lanes > 1 else scale)

    # -- keys and values ---------------------------------------------------------------------------------------------------

    def take_keys(self, first_key: Expr) -> None:
        """A block of keys and values; values beyond the end are 0, so that nothing is what 0 makes of them."""
        held = let("held", tirx.min(i64(self.keys), self.num_keys - i64(first_key)).astype("int32"))
        first = let("first", i64(first_key))
        dim = self.config.dim
        if self.config.layout == "nnn":
            with loop("key", held) as j:
                self.ask_for(self.k, self.key_row(first + i64(j + ROWS_AHEAD)), dim)
                self._copy_along(self.key_row(first + i64(j)), j * self.words)
        else:
            whole = dim // self.depth
            with loop("word", whole) as w:
                rows = [self.transposed_row(w * self.depth + i, first) for i in range(self.depth)]
                self._copy_across(self.keys_held, self.k, w * self.keys, rows, held)
            if dim % self.depth:
                row = self.transposed_row(i32(dim - 1), first)
                self._copy_across(self.keys_held, self.k, i32(whole * self.keys), [row], held)
        self._take_values(first, held)

    def _take_values(self, first: Expr, held: Expr) -> None:
        dim_v, depth = self.config.dim_v, self.depth

        def row(key: Expr) -> Row:
            return self.value_row(first + i64(key))

        whole = tirx.truncdiv(held, i32(depth)) if depth > 1 else held
        with loop("keys", whole) as j:
            rows = [row(j * depth + i) for i in range(depth)]
            for i in range(depth):
                self.ask_for(self.v, row(j * depth + ROWS_AHEAD + i), dim_v)
            self._copy_across(self.values_held, self.v, j * dim_v, rows, dim_v)
        begun = whole
        if depth > 1:
            with B.If(tirx.truncmod(held, i32(depth)) != 0), B.Then():
                self._copy_across(self.values_held, self.v, whole * dim_v, [row(held - 1)], dim_v)
            begun = let("begun", tirx.truncdiv(held + (depth - 1), i32(depth)))
        with loop("at", (self.keys // depth - begun) * dim_v) as at:
            B.buffer_store(self.values_held, tirx.const(0, self.operands.dtype), [begun * dim_v + at])

    def _copy_along(self, row: Row, place: Expr) -> None:
        """A key as words."""
        dim, lanes = self.config.dim, self.lanes
        whole = dim // self.depth // lanes
        if whole:
            with loop("step", whole) as step:
                self.store(self.keys_held, place + step * lanes, self.operands.along(self.k, row, step * lanes))
        for word in range(whole * lanes, self.words):
            size = min(self.depth, dim - word * self.depth)
            B.buffer_store(self.keys_held, self.operands.one_along(self.k, row, i32(word), size), [place + word])

    def _copy_across(
        self, panel: tirx.Buffer, tensor: tirx.Buffer, place: Expr, rows: list[Row], size: Expr | int
    ) -> None:
        """Words across one or `depth` rows of `size` elements."""
        lanes = self.lanes
        whole: Any = size // lanes if isinstance(size, int) else tirx.truncdiv(size, i32(lanes))
        if not isinstance(whole, int) or whole:
            with loop("step", whole) as step:
                self.store(panel, place + step * lanes, self.operands.across(tensor, rows, step * lanes))
        if not isinstance(size, int) or size % lanes:
            with B.serial(0, size - whole * lanes) as rest:
                at = whole * lanes + rest
                B.buffer_store(panel, self.operands.one_across(tensor, rows, at), [place + at])

    # -- results -----------------------------------------------------------------------------------------------------------

    def give(self) -> None:
        """Write the output, a register of rows at a time."""
        lanes, dim_v, out_dtype = self.lanes, self.config.dim_v, self.config.Out_dtype
        whole = dim_v // lanes
        with loop("few", tirx.truncdiv(self.left + (lanes - 1), i32(lanes))) as few:
            total = let("total", self.load(self.totals, few * lanes))
            nothing = total == self.spread(0.0)  # no key was seen
            self.store(self.totals, few * lanes, self.spread(1.0) / tirx.Select(nothing, self.spread(1.0), total))
            there = let("there", tirx.min(i32(lanes), self.left - few * lanes))
            if whole:
                with loop("step", whole) as step:
                    place = self.few(few, step * lanes, dim_v)
                    self._transpose(self.sums, place, self.together, self.results, 0, lanes)
                    with loop("i", there) as i:
                        row = few * lanes + i
                        value = self.load(self.results, i * lanes) * self.spread(self.totals[row])
                        place = B.ramp(i64(step * lanes), 1, lanes)
                        B.buffer_store(self.out, value.astype(f"{out_dtype}x{lanes}"), [*self._place_of(row), place])
            if dim_v % lanes:
                with loop("i", there) as i, loop("rest", dim_v % lanes) as rest:
                    row, e = few * lanes + i, whole * lanes + rest
                    value = self.sums[self.few(few, e, dim_v) + i] * self.totals[row]
                    B.buffer_store(self.out, value.astype(out_dtype), [*self._place_of(row), i64(e)])
