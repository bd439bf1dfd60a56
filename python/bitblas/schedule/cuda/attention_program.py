"""The program of attention for tensor cores, written thread by thread. Importing this imports TVM.

A warp computes the scores of its rows for a tile of keys, makes weights of them in its registers (the sums of one product are
laid out as the left operand of the next), and multiplies them with the tile of values. Maxima of rows are kept of the scores as
they are, and scaled with them: 2^(score * scale - maximum * scale) is one FMA and one exponential.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from .attention_arguments import exp2, finite, held, i32, i64, inverse_of, minus_infinity
from .attention_loads import AttentionLoads
from .attention_tiles import CHUNK, FRAGMENT, NUM_FACTS, FragmentAttentionTiling
from .emit import Registers, let, named, run, when
from .fragments_decode import call, u32

#: By how much, as a power of 2, a row's largest score may exceed the one that its weights are relative to: results are made
#: relative to another one seldom, and weights still fit 16 bits.
_GROWTH = 8.0


class AttentionProgram(AttentionLoads):
    """The whole of a kernel: see `AttentionLoads` for its parameters."""

    def __init__(self, config: FlashAttenConfig, tiling: FragmentAttentionTiling) -> None:
        super().__init__(config, tiling)
        self.rounding = "bf16" if config.Out_dtype == "bfloat16" else "f16"
        self.n_tiles = tiling.warp_keys // 8
        self.v_tiles = -(-self.dim_v // 8)
        self.row_parts = 2 * tiling.m_tiles  # rows of a thread

    def func(self, name: str) -> tirx.PrimFunc:
        """The function; its arguments are q, k, v and out."""
        with self.kernel(name, self.tiling.blocks_at_once) as builder:
            self._body()
        return builder.get()

    # -- the body ----------------------------------------------------------------------------------------------------------

    def _body(self) -> None:
        self._threads()
        self._allocate()
        self._start()
        with B.serial(0, self.num_tiles) as tile:
            named("tile", tile)
            run("wait_copies<0>")
            B.evaluate(B.tvm_storage_sync("shared"))
            self.base_of_k, self.base_of_v = self.bases[self.bases_at], self.bases[self.bases_at + 1]
            stages = self.tiling.stages
            if stages == 1:
                self._copy_v(tile, 0)
            else:
                with when(tile + 1 < self.num_tiles):
                    self._copy_k(tile + 1, (tile + 1) % 2)
                    self._copy_v(tile + 1, (tile + 1) % 2)
            run("commit_copies")
            self._operands(tile % 2 if stages == 2 else 0)
            self._multiply_keys()
            if stages == 1:
                run("wait_copies<0>")
                B.evaluate(B.tvm_storage_sync("shared"))
            self._hide(tile)
            self._weigh()
            if stages == 1:
                with when(tile + 1 < self.num_tiles):
                    self._copy_k(tile + 1, 0)
                run("commit_copies")
            self._multiply_values()
            self._park(self.sums, 1)  # not before, or no product would begin until all exponentials are there
        self._finish()

    def _allocate(self) -> None:
        tiling = self.tiling
        self.scores = Registers("scores", tiling.m_tiles * self.n_tiles * 4, "float32")
        self.totals = Registers("totals", tiling.m_tiles * self.v_tiles * 4, "float32")
        self.maxima = Registers("maxima", self.row_parts, "float32")
        self.sums = Registers("sums", self.row_parts, "float32")
        self.q_held = Registers("q_held", tiling.m_tiles * 4 * (self.k_steps if tiling.keeps_q else 1), "uint32")
        self.q_held.fill(u32(0))  # so that TVM sees all of them used
        self.right = Registers("right", 4, "uint32")
        self.weights = Registers("weights", tiling.m_tiles * 4, "uint32")
        self.lowest = minus_infinity()
        self.totals.fill(tirx.const(0, "float32"))
        self.sums.fill(tirx.const(0, "float32"))
        self.maxima.fill(self.lowest)
        size = tiling.shared_bytes(self.config) // 4
        self.parked = B.decl_buffer((size,), "float32", data=self.shared.data, scope="shared.dyn")
        self._park(self.maxima, 0)
        self._park(self.sums, 1)
        self._keep_facts()
        self.q_lane = let("q_lane", self._rows_first(self.q_pitch))

    def _parking(self, number: int) -> Expr:
        place = self.tiling.parking_place(self.config) + 16 * (number * self.num_threads + self.thread)
        return B.address_of(self.parked[place // 4])

    def _park(self, rows: Registers, number: int) -> None:
        """Leave the maxima (0) or the sums (1) of the thread's rows in shared memory, where registers are scarce."""
        if self.tiling.parks_rows(self.config):
            run("store_quad", self._parking(number), rows.at(0))

    def _unpark(self) -> None:
        if self.tiling.parks_rows(self.config):
            for number, rows in enumerate((self.maxima, self.sums)):
                run("load_quad", rows.at(0), self._parking(number))

    def _keep_facts(self) -> None:
        """Leave in shared memory what is needed in the end, and how many keys each row sees, where not all see all."""
        size = self.tiling.shared_bytes(self.config) // 4
        self.facts = B.decl_buffer((size,), "int32", data=self.shared.data, scope="shared.dyn")
        self.bases = B.decl_buffer((size // 2,), "int64", data=self.shared.data, scope="shared.dyn")
        self.facts_at = self.tiling.facts_place(self.config) // 4
        self.bases_at = self.facts_at // 2 + 2
        self.limits_at = self.facts_at + NUM_FACTS
        with when(self.thread == 0):
            for place, fact in enumerate((self.first_m, self.group, self.number)):
                B.buffer_store(self.facts, fact, [self.facts_at + place])
            for place, argument in enumerate((self.k, self.v)):
                B.buffer_store(self.bases, self.base_of(argument), [self.bases_at + place])
        if not self.config.is_causal:
            return
        for first in range(0, self.block_m, self.num_threads):
            row = first + self.thread
            with when(row < self.block_m if first + self.num_threads > self.block_m else True):
                B.buffer_store(self.facts, self.limit(self.first_m + row), [self.limits_at + row])

    def _recall_facts(self) -> None:
        first_m, group, number = (held("fact", self.facts[self.facts_at + place]) for place in range(3))
        self.first_m, self.group = first_m, group
        self.rows = held("all_rows", i32(self.seq_len) * group)
        self._find_head(number)

    def _row_of(self, part: int) -> Expr:
        """A row of the block that the thread has scores of."""
        first = self.warp_m * (self.tiling.m_tiles * FRAGMENT)
        return first + (part // 2 * FRAGMENT + part % 2 * 8) + self.row

    def _start(self) -> None:
        """Ask for the rows of Q and the first tile."""
        tiling = self.tiling
        with when(self.num_tiles > 0):
            self._copy_q()
            self.base_of_k, self.base_of_v = self.base_of(self.k), self.base_of(self.v)
            self._copy_k(tirx.const(0, "int32"), 0)
            if not tiling.keeps_q and tiling.stages == 2:
                self._copy_v(tirx.const(0, "int32"), 0)
        run("commit_copies")
        if not tiling.keeps_q:
            return
        run("wait_copies<0>")
        B.evaluate(B.tvm_storage_sync("shared"))
        with when(self.num_tiles > 0):
            for step in range(self.k_steps):
                for m_tile in range(tiling.m_tiles):
                    self._load_q(self.q_held, 4 * (step * tiling.m_tiles + m_tile), m_tile, step)
        if tiling.stages == 2:
            B.evaluate(B.tvm_storage_sync("shared"))
            with when(self.num_tiles > 0):
                self._copy_v(tirx.const(0, "int32"), 0)
            run("commit_copies")

    # -- a tile ------------------------------------------------------------------------------------------------------------

    def _multiply_keys(self) -> None:
        """scores = Q · K^T."""
        m_tiles = self.tiling.m_tiles
        self.scores.fill(tirx.const(0, "float32"))
        for step in range(self.k_steps):
            at = step * m_tiles * 4 if self.tiling.keeps_q else 0
            if not self.tiling.keeps_q:
                for m_tile in range(m_tiles):
                    self._load_q(self.q_held, 4 * m_tile, m_tile, step)
            for pair in range(self.n_tiles // 2):
                self._load_k(self.right, pair, step)
                for m_tile in range(m_tiles):
                    for half in range(2):
                        sums = self._score(m_tile, 2 * pair + half, 0)
                        left = self.q_held.at(at + 4 * m_tile)
                        run(
                            f"mma_{self.products}",
                            self.scores.at(sums),
                            left,
                            self.right[2 * half],
                            self.right[2 * half + 1],
                        )
        if self.first_scale is not None:
            for index in range(self.scores.size):
                self.scores[index] = self.scores[index] * tirx.const(self.first_scale, "float32")

    def _score(self, m_tile: int, n_tile: int, element: int) -> int:
        return (m_tile * self.n_tiles + n_tile) * 4 + element

    def _scores_of(self, part: int) -> list[int]:
        """Which scores are those of a row of the thread."""
        elements = (2 * (part % 2), 2 * (part % 2) + 1)
        return [self._score(part // 2, n_tile, element) for n_tile in range(self.n_tiles) for element in elements]

    def _hide(self, tile: Expr) -> None:
        """Scores of keys that a row does not see become minus infinity."""
        with when(tile >= self.whole_tiles):
            first = tile * self.block_n + self.warp_n * self.tiling.warp_keys + 2 * self.quarter
            for part in range(self.row_parts):
                limit = self.facts[self.limits_at + self._row_of(part)] if self.config.is_causal else self.keys
                seen = held("seen", limit - first)
                for place, index in enumerate(self._scores_of(part)):
                    key = place // 2 * 8 + place % 2
                    self.scores[index] = tirx.Select(key < seen, self.scores[index], self.lowest)

    def _weigh(self) -> None:
        """Scores become weights, relative to a maximum that is at most `_GROWTH` behind."""
        scale, grown = tirx.const(self.scale, "float32"), tirx.const(False, "bool")
        largest = Registers("largest", self.row_parts, "float32")
        self._unpark()
        for part in range(self.row_parts):
            found = self.maxima[part]
            for index in self._scores_of(part):
                found = tirx.max(found, self.scores[index])
            largest[part] = B.call_extern("float32", "bitblas_lanes_max<4>", found)
            growth = (largest[part] - self.maxima[part]) * scale
            grown = tirx.any(grown, growth > tirx.const(_GROWTH, "float32"))
        with when(B.call_extern("int32", "bitblas_any", grown.astype("int32")) != 0):
            for part in range(self.row_parts):
                self._shrink(part, largest[part])
                self.maxima[part] = largest[part]
            self._park(self.maxima, 0)
        for part in range(self.row_parts):
            base = let("base", finite(self.maxima[part], self.lowest) * scale)
            total = self.sums[part]
            for index in self._scores_of(part):
                self.scores[index] = exp2(self.scores[index] * scale - base)
                total = total + self.scores[index]
            self.sums[part] = total

    def _shrink(self, part: int, largest: Expr) -> None:
        """Make the sum and the results of a row relative to a larger maximum."""
        scale = tirx.const(self.scale, "float32")
        shrink = let("shrink", exp2((self.maxima[part] - finite(largest, self.lowest)) * scale))
        self.sums[part] = self.sums[part] * shrink
        for v_tile in range(self.v_tiles):
            for element in (2 * (part % 2), 2 * (part % 2) + 1):
                index = (part // 2 * self.v_tiles + v_tile) * 4 + element
                self.totals[index] = self.totals[index] * shrink

    def _multiply_values(self) -> None:
        """totals += weights · V."""
        m_tiles = self.tiling.m_tiles
        for step in range(self.n_tiles // 2):
            for m_tile in range(m_tiles):
                for register in range(4):
                    first = self._score(m_tile, 2 * step + register // 2, 2 * (register % 2))
                    pair = self.scores[first], self.scores[first + 1]
                    self.weights[4 * m_tile + register] = call(f"pack_{self.products}", *pair)
            for pair_of_tiles in range(-(-self.v_tiles // 2)):
                self._load_v(self.right, pair_of_tiles, step)
                for m_tile in range(m_tiles):
                    for half in range(min(2, self.v_tiles - 2 * pair_of_tiles)):
                        total = (m_tile * self.v_tiles + 2 * pair_of_tiles + half) * 4
                        run(
                            f"mma_{self.products}",
                            self.totals.at(total),
                            self.weights.at(4 * m_tile),
                            self.right[2 * half],
                            self.right[2 * half + 1],
                        )

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Results pass through shared memory, and are stored row by row."""
        run("wait_copies<0>")
        B.evaluate(B.tvm_storage_sync("shared"))
        self._recall_facts()
        self._unpark()
        for part in range(self.row_parts):
            self.sums[part] = B.call_extern("float32", "bitblas_lanes_sum<4>", self.sums[part])
        (self._store_rounded if self.tiling.stores_rounded(self.config) else self._store_joined)()

    def _total(self, part: int, v_tile: int, element: int) -> Expr:
        return self.totals[(part // 2 * self.v_tiles + v_tile) * 4 + 2 * (part % 2) + element]

    def _store_rounded(self) -> None:
        """Where a warp has all of a row's results: pairs of 16 bits meet in shared memory."""
        words = B.decl_buffer(
            (self.tiling.shared_bytes(self.config) // 4,), "uint32", data=self.shared.data, scope="shared.dyn"
        )
        for part in range(self.row_parts):
            inverse = inverse_of(self.sums[part])
            place = self._row_of(part) * (self.v_pitch // 4) + self.quarter
            for v_tile in range(self.v_tiles):
                pair = (self._total(part, v_tile, element) * inverse for element in range(2))
                B.buffer_store(words, call(f"pack_{self.rounding}", *pair), [place + 4 * v_tile])
        B.evaluate(B.tvm_storage_sync("shared"))
        rounded = Registers("rounded", 4, "uint32")
        rounded.fill(u32(0))  # so that TVM sees all of them used
        for row, chunk, more in self._chunks(self.block_m, self.dim_v // CHUNK):
            m = let("m_out", self.first_m + row + more)
            with when(m < self.rows):
                place = (row + more) * self.v_pitch + chunk * 16
                run("load_shared_16", rounded.at(0), B.address_of(self.shared[place]))
                run("store_16", self.out.at(self.row_offset(self.out, m) + i64(chunk * CHUNK)), rounded.at(0))

    def _store_joined(self) -> None:
        """Where warps have shared out keys, or results are not rounded: sums meet in shared memory."""
        tiling, pitch = self.tiling, self.tiling.total_pitch(self.config)
        size = tiling.shared_bytes(self.config) // 4
        self.floats = B.decl_buffer((size,), "float32", data=self.shared.data, scope="shared.dyn")
        self.rows_at = tiling.warps_n * tiling.block_m * pitch  # where facts of rows begin
        if tiling.warps_n > 1:
            self._join_maxima()
        for part in range(self.row_parts):
            row = let("row_of_block", self.warp_n * tiling.block_m + self._row_of(part))
            with when(self.quarter == 0):
                B.buffer_store(self.floats, self.sums[part], [self.rows_at + row])
            for v_tile in range(self.v_tiles):
                for element in range(2):
                    column = v_tile * 8 + element + 2 * self.quarter
                    B.buffer_store(self.floats, self._total(part, v_tile, element), [row * pitch + column])
        B.evaluate(B.tvm_storage_sync("shared"))
        self._store_rows(pitch)

    def _join_maxima(self) -> None:
        """Make sums and results of each warp relative to the largest score of all."""
        tiling = self.tiling
        maxima_at = self.rows_at + tiling.warps_n * tiling.block_m
        for part in range(self.row_parts):
            row = self.warp_n * tiling.block_m + self._row_of(part)
            with when(self.quarter == 0):
                B.buffer_store(self.floats, self.maxima[part], [maxima_at + row])
        B.evaluate(B.tvm_storage_sync("shared"))
        for part in range(self.row_parts):
            largest = self.floats[maxima_at + self._row_of(part)]
            for warp in range(1, tiling.warps_n):
                largest = tirx.max(largest, self.floats[maxima_at + warp * tiling.block_m + self._row_of(part)])
            self._shrink(part, let("largest_of_all", largest))

    def _store_rows(self, pitch: int) -> None:
        """Eight elements of a row at a time: divided by the row's sum, rounded, stored."""
        tiling, out = self.tiling, Registers("rounded", CHUNK, "uint32")
        for row, chunk, more in self._chunks(self.block_m, self.dim_v // CHUNK):
            row = row + more
            m = let("m_out", self.first_m + row)
            with when(m < self.rows):

                def of_all(place: Expr, step: int) -> Expr:
                    value = self.floats[place]
                    for warp in range(1, self.tiling.warps_n):
                        value = value + self.floats[place + warp * step]
                    return value

                total = let("total", of_all(self.rows_at + row, tiling.block_m))
                inverse = inverse_of(total)
                values = [
                    of_all(row * pitch + chunk * CHUNK + place, tiling.block_m * pitch) * inverse
                    for place in range(CHUNK)
                ]
                target = let("target", self.row_offset(self.out, m) + i64(chunk * CHUNK))
                self._store_chunk(target, values, out)

    def _store_chunk(self, target: Expr, values: list[Expr], out: Registers) -> None:
        dtype = self.config.Out_dtype
        if dtype == "float32":
            for place, value in enumerate(values):
                out[place] = tirx.reinterpret("uint32", value)
            for half in range(2):
                run("store_16", self.out.at(target + 4 * half), out.at(4 * half))
            return
        for pair in range(CHUNK // 2):
            out[pair] = call(f"pack_{self.rounding}", values[2 * pair], values[2 * pair + 1])
        run("store_16", self.out.at(target), out.at(0))
