"""The program of an attention on a CPU: rows in the lanes, keys and values one by one. Importing this imports TVM.

S^T = K · Q^T and out^T = V^T · P^T: so the maximum over keys, and the sum, are those of registers, lane by lane, and nothing is
ever added across lanes. Words of K and V are spread over the lanes as they are loaded.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from ..words import i32, i64, let
from .attention_panels import AttentionPanels
from .attention_tiling import LaneAttentionTiling
from .attention_vectors import alloc, loop
from .exponential import FULL_DEGREE, exp2

#: Degree of the polynomial of 2^x, by how weights are multiplied: as float32, or rounded to bfloat16.
_DEGREES = {"": FULL_DEGREE, "bf16": 3}


class LaneAttention(AttentionPanels):
    """The whole of a kernel."""

    def __init__(self, config: FlashAttenConfig, tiling: LaneAttentionTiling) -> None:
        super().__init__(config, tiling)
        self.degree = _DEGREES[tiling.dot]

    def func(self, name: str) -> tirx.PrimFunc:
        """The function."""
        with IRBuilder() as builder, B.prim_func(s_tir=True):
            self.begin(name)
            blocks = let("blocks", tirx.truncdiv(self.num_rows + (self.rows - 1), i64(self.rows)))
            annotations = {"pragma_import_llvm": self.operands.library}
            tasks = self.batch * self.heads_kv * blocks
            with B.parallel(0, tasks, annotations=annotations) as task, B.sblock("kernel"):
                B.reads()
                B.writes()
                self._place(task, blocks)
                self._body()
        return builder.get()

    def _place(self, task: Expr, blocks: Expr) -> None:
        """Which batch, head and rows a task is for; of a causal one the shortest and the longest take turns."""
        head = let("head", tirx.truncdiv(task, blocks))
        self.batch_at = let("b", tirx.truncdiv(head, self.heads_kv))
        self.head_at = let("h", tirx.truncmod(head, self.heads_kv))
        block = let("turn", tirx.truncmod(task, blocks))
        if self.config.is_causal:
            half = tirx.truncdiv(block, i64(2))
            block = tirx.Select(tirx.truncmod(block, i64(2)) == 0, half, blocks - 1 - half)
        self.first_row = let("first_row", block * self.rows)

    def _body(self) -> None:
        self.allocate()
        self.weights = alloc("weights", self.keys // self.depth * self.together, self.operands.dtype)
        self.scores = alloc("scores", self.keys * self.together) if self.depth > 1 else self.weights
        self.take_queries()
        last, keys = let("last", self.limits[self.parts * self.together - 1]), self.tiling.keys
        with loop("block", tirx.truncdiv(last + self.keys, i32(self.keys))) as block:
            first_key = let("first_key", block * self.keys)
            self.take_keys(first_key)
            with loop("part", self.parts) as part:
                limit = self.limits[part * self.together + (self.together - 1)]
                seen = let("seen", tirx.min(i32(self.keys), limit + 1 - first_key))
                with B.If(seen > 0), B.Then():
                    self._update(
                        let("row", part * self.together),
                        first_key,
                        let("tiles", tirx.truncdiv(seen + (keys - 1), i32(keys))),
                    )
        self.give()

    # -- a block of keys and some rows -------------------------------------------------------------------------------------

    def _update(self, row: Expr, first_key: Expr, tiles: Expr) -> None:
        """Let the rows from `row` on see `tiles` tiles of keys."""
        largest = alloc("largest", self.together, scope="local")
        factors = alloc("factors", self.together, scope="local")
        for at in self._vectors():
            self.store(largest, at, self.load(self.maxima, row + at))
        with loop("tile", tiles) as tile:
            self._multiply_keys(row, first_key, let("key", tile * self.tiling.keys), largest)
        self._exponentials(row, tiles, largest, factors)
        size = self.tiling.values
        whole, rest = divmod(self.config.dim_v, size)
        if whole:
            with loop("tile", whole) as tile:
                self._multiply_values(row, tiles, factors, tile * size, size)
        if rest:
            self._multiply_values(row, tiles, factors, i32(whole * size), rest)

    def _vectors(self) -> range:
        """Where the vectors of rows that are computed together begin."""
        return range(0, self.together, self.lanes)

    def _multiply_keys(self, row: Expr, first_key: Expr, key: Expr, largest: tirx.Buffer) -> None:
        """The scores of a tile of keys, from `key` of the block on."""
        keys = self.tiling.keys
        sums = alloc("products", keys * self.together, scope="local")
        for place in range(0, keys * self.together, self.lanes):
            self.store(sums, place, self.spread(0.0))
        with loop("word", self.words) as w:
            queries = [
                let("q", self.load(self.queries_t, self.line(row, w, self.words) + at)) for at in self._vectors()
            ]
            for j in range(keys):
                at = (key + j) * self.words + w if self.config.layout == "nnn" else w * self.keys + key + j
                self._add_products(sums, j, self.keys_held[at], queries)
        with B.If(first_key + key + (keys - 1) > self.limits[row]):
            with B.Then():
                self._keep_scores(row, first_key, key, sums, largest, masked=True)
            with B.Else():
                self._keep_scores(row, first_key, key, sums, largest, masked=False)

    def _add_products(self, sums: tirx.Buffer, line: int, word: Expr, vectors: list[Expr]) -> None:
        """Add the products of a word with vectors to a line of sums."""
        spread = let("word", self.spread(word))
        for at, vector in zip(self._vectors(), vectors, strict=True):
            place = line * self.together + at
            self.store(sums, place, self.operands.add_product(self.load(sums, place), spread, vector))

    def _keep_scores(
        self, row: Expr, first_key: Expr, key: Expr, sums: tirx.Buffer, largest: tirx.Buffer, masked: bool
    ) -> None:
        """Write the scores of a tile, and take part in the maximum; those of keys that a row does not see are -inf."""
        for at in self._vectors():
            top = self.load(largest, at)
            limit = let("limit", self.load(self.limits, row + at)) if masked else None
            for j in range(self.tiling.keys):
                value = self.load(sums, j * self.together + at)
                if not self.operands.scales_queries:
                    value = value * self.spread(self.scale)
                if limit is not None:
                    place = tirx.Broadcast(first_key + key + j, self.lanes)
                    value = tirx.Select(place <= limit, value, self.spread(-math.inf))
                value = let("score", value)
                self.store(self.scores, (key + j) * self.together + at, value)
                top = let("top", tirx.max(value, top))
            self.store(largest, at, top)

    def _exponentials(self, row: Expr, tiles: Expr, largest: tirx.Buffer, factors: tirx.Buffer) -> None:
        """Scores become weights, relative to the new maxima; the factors are those of all that came before.

        They are 1 where a maximum has not risen, or errors would add up.
        """
        total = alloc("total", self.together, scope="local")
        for at in self._vectors():
            maximum = let("maximum", self.load(largest, at))
            self.store(factors, at, exp2(self.load(self.maxima, row + at) - maximum, self.lanes, FULL_DEGREE))
            self.store(total, at, self.spread(0.0))
            self.store(self.maxima, row + at, maximum)
        with loop("word", tiles * (self.tiling.keys // self.depth)) as w:
            for at in self._vectors():
                maximum = self.load(largest, at)
                values = [
                    let(
                        "weight",
                        exp2(
                            self.load(self.scores, (w * self.depth + i) * self.together + at) - maximum,
                            self.lanes,
                            self.degree,
                        ),
                    )
                    for i in range(self.depth)
                ]
                words = let("words", self.operands.weights(values))
                self.store(self.weights, w * self.together + at, words)
                self.store(total, at, self.operands.add_weights(self.load(total, at), words))
        for at in self._vectors():
            before = self.load(self.totals, row + at) * self.load(factors, at)
            self.store(self.totals, row + at, before + self.load(total, at))

    def _multiply_values(self, row: Expr, tiles: Expr, factors: tirx.Buffer, first: Expr, size: int) -> None:
        """Add the weighted values to `size` sums of each row, from `first` on.

        A block is summed by itself: errors grow with the root of what is added, and blocks are far fewer than keys.
        """
        sums = alloc("weighted", size * self.together, scope="local")
        for place in range(0, size * self.together, self.lanes):
            self.store(sums, place, self.spread(0.0))
        with loop("word", tiles * (self.tiling.keys // self.depth)) as w:
            weights = [let("p", self.load(self.weights, w * self.together + at)) for at in self._vectors()]
            for i in range(size):
                self._add_products(sums, i, self.values_held[w * self.config.dim_v + first + i], weights)
        for i in range(size):
            for at in self._vectors():
                place = self.line(row, first + i, self.config.dim_v) + at
                before = self.load(self.sums, place) * self.load(factors, at)
                self.store(self.sums, place, before + self.load(sums, i * self.together + at))
