"""The program of attention that computes number by number: every dtype, dim and alignment. Importing this imports TVM.

Scores of a tile are sums of a thread, 4 rows by 4 keys, out of shared memory, in which rows of Q stay and chunks of keys come
and go. Lanes that share a row make weights of its scores there. Each thread has some rows and columns of the result, and reads
values from memory, where its neighbours read the neighbouring ones.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from ...expr.storage import store_as, widen
from .attention_arguments import AttentionArguments, exp2, finite, held, i64, inverse_of, minus_infinity
from .attention_tiles import QUAD, THREAD_CHUNK, THREADS, ThreadAttentionTiling
from .emit import Registers, let, named, run, when

#: Keys whose values a thread asks for at once.
_KEYS_AT_ONCE = 4


class ThreadAttentionProgram(AttentionArguments):
    """The whole of a kernel.

    Parameters
    ----------
    config : FlashAttenConfig
        The kernels' question.
    tiling : ThreadAttentionTiling
        How to walk.
    """

    #: Shared memory, and its elements: of Q, of K, of weights, of what is known of rows.
    shared: tirx.Buffer

    def __init__(self, config: FlashAttenConfig, tiling: ThreadAttentionTiling) -> None:
        super().__init__(config, tiling.block_m, tiling.block_n, THREADS)
        self.tiling, self.dim, self.dim_v = tiling, config.dim, config.dim_v
        self.k_at, self.weights_at, self.facts_at, self.size = tiling.places(config)
        self.column_threads = tiling.column_threads(config)
        self.columns = -(-self.dim_v // self.column_threads)
        self.thread_rows = tiling.block_m * self.column_threads // THREADS
        #: Lanes that share a row of scores.
        self.row_lanes = THREADS // tiling.block_m

    def func(self, name: str) -> tirx.PrimFunc:
        """The function; its arguments are q, k, v and out."""
        with self.kernel(name, 1) as builder:
            self._body()
        return builder.get()

    def _body(self) -> None:
        self.shared = named(f"shared_{self.name}", B.sblock_alloc_buffer((self.size,), "float32", scope="shared.dyn"))
        row_threads = self.block_m // QUAD
        self.row, self.key = (
            held("row", self.thread % row_threads * QUAD),
            held("key", self.thread // row_threads * QUAD),
        )
        self.column = held("column", self.thread % self.column_threads)
        self.out_row = held("out_row", self.thread // self.column_threads * self.thread_rows)
        self.scores = Registers("scores", QUAD * QUAD, "float32")
        self.left, self.right = Registers("left", QUAD, "uint32"), Registers("right", QUAD, "uint32")
        self.totals = Registers("totals", self.thread_rows * self.columns, "float32")
        self.totals.fill(tirx.const(0, "float32"))
        self.lowest = minus_infinity()
        self.maximum, self.sum = Registers("maximum", 1, "float32"), Registers("sum", 1, "float32")
        self.maximum[0], self.sum[0] = self.lowest, tirx.const(0, "float32")
        self.limits = Registers("limits", QUAD, "int32")
        for row in range(QUAD):
            self.limits[row] = self.limit(self.first_m + self.row + row)
        self._load_q()
        with B.serial(0, self.num_tiles) as tile:
            named("tile", tile)
            first = held("first", tile * self.block_n)
            self._multiply_keys(first)
            self._weigh()
            self._multiply_values(first)
        self._store()

    # -- scores ------------------------------------------------------------------------------------------------------------

    def _load_q(self) -> None:
        """Rows of Q, element by element of the heads; 0 beyond the last row and element."""
        rounded = -(-self.dim // THREAD_CHUNK) * THREAD_CHUNK
        with B.serial(0, rounded * self.block_m // THREADS) as round_:
            index = round_ * THREADS + self.thread
            row, element = let("q_row", index // rounded), let("q_element", index % rounded)
            m = let("q_m", tirx.min(self.first_m + row, self.rows - 1))
            value = widen(self.q.flat[self.row_offset(self.q, m) + i64(tirx.min(element, self.dim - 1))])
            inside = tirx.all(self.first_m + row < self.rows, element < self.dim)
            self._put(tirx.Select(inside, value, tirx.const(0, "float32")), element * self.block_m + row)

    def _put(self, value: Expr, place: Expr) -> None:
        B.buffer_store(self.shared, value, [place])

    def _load_k(self, first: Expr, chunk: Expr) -> None:
        """Some elements of all keys of a tile; 0 beyond the last key and element."""
        base = self.base_of(self.k)
        for start in range(0, THREAD_CHUNK * self.block_n, THREADS):
            index = start + self.thread
            if self.config.layout == "ntn":
                key, element = index % self.block_n, index // self.block_n
            else:
                key, element = index // THREAD_CHUNK, index % THREAD_CHUNK
            place, of_head = self.k_at + element * self.tiling.k_pitch + key, chunk * THREAD_CHUNK + element
            j, d = i64(tirx.min(first + key, self.keys - 1)), i64(tirx.min(of_head, self.dim - 1))
            if self.config.layout == "ntn":
                offset = base + d * self.k.strides[1] + j
            else:
                offset = base + j * self.k.strides[1] + d
            inside = tirx.all(first + key < self.keys, of_head < self.dim)
            self._put(tirx.Select(inside, widen(self.k.flat[offset]), tirx.const(0, "float32")), place)

    def _quad(self, to: Registers, place: Expr) -> None:
        """Four elements of shared memory side by side."""
        run("load_shared_16", to.at(0), B.address_of(self.shared[place]))

    def _multiply_keys(self, first: Expr) -> None:
        """scores = Q · K^T of the thread's rows and keys, as they are compared, which then stand where weights will."""
        self.scores.fill(tirx.const(0, "float32"))
        for side in (self.left, self.right):
            side.fill(tirx.const(0, "uint32"))  # so that TVM sees all of them used
        with B.serial(0, -(-self.dim // THREAD_CHUNK)) as chunk:
            named("chunk", chunk)
            B.evaluate(B.tvm_storage_sync("shared"))
            self._load_k(first, chunk)
            B.evaluate(B.tvm_storage_sync("shared"))
            for element in range(THREAD_CHUNK):
                self._quad(self.left, (chunk * THREAD_CHUNK + element) * self.block_m + self.row)
                self._quad(self.right, self.k_at + element * self.tiling.k_pitch + self.key)
                for row in range(QUAD):
                    for key in range(QUAD):
                        product = _float(self.left[row]) * _float(self.right[key])
                        self.scores[row * QUAD + key] = self.scores[row * QUAD + key] + product
        for row in range(QUAD):
            for key in range(QUAD):
                score = self.scores[row * QUAD + key]
                if self.first_scale is not None:
                    score = score * tirx.const(self.first_scale, "float32")
                score = tirx.Select(first + self.key + key < self.limits[row], score, self.lowest)
                self._put(score, self.weights_at + (self.key + key) * self.tiling.weight_pitch + self.row + row)
        B.evaluate(B.tvm_storage_sync("shared"))

    # -- weights -----------------------------------------------------------------------------------------------------------

    def _weigh(self) -> None:
        """Scores of a row become weights, relative to its largest score so far; how results shrink is left for all."""
        scale, lanes = tirx.const(self.scale, "float32"), self.row_lanes
        row, part = self.thread // lanes, self.thread % lanes
        found = Registers("found", 1, "float32")

        def place(turn: Expr) -> Expr:
            return self.weights_at + (turn * lanes + part) * self.tiling.weight_pitch + row

        found[0] = self.maximum[0]
        with B.serial(0, self.block_n // lanes) as turn:
            found[0] = tirx.max(found[0], self.shared[place(turn)])
        found[0] = B.call_extern("float32", f"bitblas_lanes_max<{lanes}>", found[0])
        shrink = held("shrink", exp2((self.maximum[0] - finite(found[0], self.lowest)) * scale))
        base = held("base", finite(found[0], self.lowest) * scale)
        self.maximum[0], self.sum[0] = found[0], self.sum[0] * shrink
        with B.serial(0, self.block_n // lanes) as turn:
            weight = held("weight", exp2(self.shared[place(turn)] * scale - base))
            self.sum[0] = self.sum[0] + weight
            self._put(weight, place(turn))
        with when(part == 0):
            self._put(shrink, self.facts_at + row)
        B.evaluate(B.tvm_storage_sync("shared"))

    # -- results -----------------------------------------------------------------------------------------------------------

    def _total(self, row: int, column: int) -> int:
        return row * self.columns + column

    def _multiply_values(self, first: Expr) -> None:
        """totals = totals · shrink + weights · V, of the thread's rows and columns."""
        for row in range(self.thread_rows):
            shrink = held("shrink_of_row", self.shared[self.facts_at + self.out_row + row])
            for column in range(self.columns):
                self.totals[self._total(row, column)] = self.totals[self._total(row, column)] * shrink
        base = self.base_of(self.v)
        values = Registers("values", _KEYS_AT_ONCE * self.columns, "float32")
        with B.serial(0, self.block_n // _KEYS_AT_ONCE) as turn:
            key = turn * _KEYS_AT_ONCE
            for more in range(_KEYS_AT_ONCE):
                j = i64(tirx.min(first + key + more, self.keys - 1))
                for column in range(self.columns):
                    element = i64(tirx.min(self.column + column * self.column_threads, self.dim_v - 1))
                    value = widen(self.v.flat[base + j * self.v.strides[1] + element])
                    inside = first + key + more < self.keys  # garbage times no weight may be a NaN
                    values[more * self.columns + column] = tirx.Select(inside, value, tirx.const(0, "float32"))
            for more in range(_KEYS_AT_ONCE):
                for quad in range(0, self.thread_rows, QUAD):
                    weights = self.weights_at + (key + more) * self.tiling.weight_pitch
                    self._quad(self.left, weights + self.out_row + quad)
                    for row in range(QUAD):
                        for column in range(self.columns):
                            at = self._total(quad + row, column)
                            product = _float(self.left[row]) * values[more * self.columns + column]
                            self.totals[at] = self.totals[at] + product

    def _store(self) -> None:
        """Divide by the sums of rows, round and store."""
        B.evaluate(B.tvm_storage_sync("shared"))
        lanes = self.row_lanes
        total = held("total", B.call_extern("float32", f"bitblas_lanes_sum<{lanes}>", self.sum[0]))
        with when(self.thread % lanes == 0):
            self._put(inverse_of(total), self.facts_at + self.thread // lanes)
        B.evaluate(B.tvm_storage_sync("shared"))
        for row in range(self.thread_rows):
            m = held("m_out", self.first_m + self.out_row + row)
            with when(m < self.rows):
                inverse = held("inverse_of_row", self.shared[self.facts_at + self.out_row + row])
                offset = held("offset", self.row_offset(self.out, m))
                for column in range(self.columns):
                    element = self.column + column * self.column_threads
                    with when(element < self.dim_v if self.dim_v % self.column_threads else True):
                        value = self.totals[self._total(row, column)] * inverse
                        value = store_as(value, "float32", self.config.Out_dtype, threads=True, as_bits=True)
                        B.buffer_store(self.out.flat, value, [offset + i64(element)])


def _float(bits: Expr) -> Expr:
    return tirx.reinterpret("float32", bits)
