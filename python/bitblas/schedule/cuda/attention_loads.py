"""How operands of attention come to shared memory, and from there to tensor cores. Importing this imports TVM."""

from __future__ import annotations

from collections.abc import Iterator

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from ...layout import WARP
from .attention_arguments import Argument, AttentionArguments, held, i64
from .attention_tiles import CHUNK, FRAGMENT, FragmentAttentionTiling, in_fragments, row_bytes
from .emit import Registers, let, named, run, when


class AttentionLoads(AttentionArguments):
    """The first half of a kernel for tensor cores: see `AttentionArguments`.

    Parameters
    ----------
    config : FlashAttenConfig
        The kernels' question.
    tiling : FragmentAttentionTiling
        How to walk.
    """

    #: The thread's lane, its warp's share of rows and of keys, and its row and quarter of a product.
    lane: Expr
    warp_m: Expr
    warp_n: Expr
    row: Expr
    quarter: Expr
    #: Operands, and after them results; and where the lane's first row of a matrix of Q is, but for the matrix.
    shared: tirx.Buffer
    q_lane: Expr
    #: Where the head's first key and value are.
    base_of_k: Expr
    base_of_v: Expr

    def __init__(self, config: FlashAttenConfig, tiling: FragmentAttentionTiling) -> None:
        super().__init__(config, tiling.block_m, tiling.block_n, tiling.num_threads)
        self.tiling = tiling
        self.products = "bf16" if config.Q_dtype == "bfloat16" else "f16"
        self.dim, self.dim_v = config.dim, config.dim_v or 0
        self.k_steps = in_fragments(self.dim) // FRAGMENT
        self.is_transposed = config.layout == "ntn"
        self.q_pitch = row_bytes(in_fragments(self.dim))
        self.k_pitch = row_bytes(tiling.block_n) if self.is_transposed else self.q_pitch
        self.v_pitch = row_bytes(in_fragments(self.dim_v))

    def _threads(self) -> None:
        """Names for the thread's place, and the shared memory."""
        tiling = self.tiling
        self.lane, warp = let("lane", self.thread % WARP), let("warp", self.thread // WARP)
        self.warp_m, self.warp_n = let("warp_m", warp % tiling.warps_m), let("warp_n", warp // tiling.warps_m)
        self.row, self.quarter = let("row", self.lane // 4), let("quarter", self.lane % 4)
        size = tiling.shared_bytes(self.config)
        self.shared = named(f"shared_{self.name}", B.sblock_alloc_buffer((size,), "int8", scope="shared.dyn"))

    def _rows_first(self, pitch: int) -> Expr:
        """Where the lane's row of the four matrices of a load begins, if the second lies below the first."""
        return self.lane % 16 * pitch + self.lane // 16 * (2 * CHUNK)

    def _columns_first(self, pitch: int) -> Expr:
        """… if the second lies beside the first: two neighbouring registers are then the operand of a product, as it wants."""
        return (self.lane % 8 + self.lane // 16 * 8) * pitch + self.lane // 8 % 2 * (2 * CHUNK)

    # -- to shared memory --------------------------------------------------------------------------------------------------

    def _chunks(self, rows: int, chunks: int) -> Iterator[tuple[Expr, Expr, int]]:
        """Share out rows of chunks of 16 bytes among threads.

        Yields a row and a chunk of the thread, and the rows to be added to that, known beforehand.
        """
        threads = self.num_threads
        if threads % chunks == 0:
            row, chunk = let("chunk_row", self.thread // chunks), let("chunk", self.thread % chunks)
            for first in range(0, rows, threads // chunks):
                with when(row + first < rows if first + threads // chunks > rows else True):
                    yield row, chunk, first
            return
        for first in range(0, rows * chunks, threads):
            index = self.thread + first
            with when(index < rows * chunks if first + threads > rows * chunks else True):
                yield index // chunks, index % chunks, 0

    def _copy_q(self) -> None:
        """Ask for the rows of Q; those beyond the last one, and elements beyond a head's, are 0."""
        place = self.tiling.q_place(self.config)
        for row, chunk, more in self._chunks(self.block_m, in_fragments(self.dim) // CHUNK):
            m = let("m", self.first_m + row + more)
            to = place + (row + more) * self.q_pitch + chunk * 16
            source = self.row_offset(self.q, m) + i64(chunk * CHUNK)
            inside = self._within(chunk, self.dim, m < self.rows)
            run("copy_async", B.address_of(self.shared[to]), self.q.at(source), _bytes(inside))

    def _copy_k(self, tile: Expr, stage: Expr | int) -> None:
        """Ask for a tile of keys; those beyond the last one, and elements beyond a head's, are 0."""
        to = stage * self.tiling.stage_bytes(self.config)
        if not self.is_transposed:
            self._copy_keys(self.k, self.base_of_k, tile, to, self.k_pitch, self.dim)
            return
        base = held("base_of_keys", self.base_of_k)
        for row, chunk, more in self._chunks(in_fragments(self.dim), self.block_n // CHUNK):
            key, element = tile * self.block_n + chunk * CHUNK, row + more
            source = base + i64(element) * self.k.strides[1] + i64(key)
            size = tirx.max(tirx.min(self.keys - key, CHUNK), tirx.const(0, "int32")) * 2
            if self.dim % FRAGMENT:
                size = tirx.Select(element < self.dim, size, tirx.const(0, "int32"))
            place = to + (row + more) * self.k_pitch + chunk * 16
            run("copy_part", B.address_of(self.shared[place]), self.k.at(source), size)

    def _copy_v(self, tile: Expr, stage: Expr | int) -> None:
        """Ask for the values of a tile of keys, likewise."""
        to = stage * self.tiling.stage_bytes(self.config) + self.tiling.k_bytes(self.config)
        self._copy_keys(self.v, self.base_of_v, tile, to, self.v_pitch, self.dim_v)

    def _copy_keys(self, argument: Argument, base: Expr, tile: Expr, to: Expr | int, pitch: int, dim: int) -> None:
        first = tile * self.block_n
        here, last = None, 0
        for row, chunk, more in self._chunks(self.block_n, in_fragments(dim) // CHUNK):
            if here is None or more == last:
                here = Registers("here", 1, "int64")
                here[0] = base + i64(first + row) * argument.strides[1] + i64(chunk * CHUNK)
                left = held("left", self.keys - first - row)
            else:
                here[0] = here[0] + argument.strides[1] * (more - last)
            last = more
            inside = self._within(chunk, dim, left > more)
            place = to + (row + more) * pitch + chunk * 16
            run("copy_async", B.address_of(self.shared[place]), argument.at(here[0]), _bytes(inside))

    @staticmethod
    def _within(chunk: Expr, dim: int, inside: Expr) -> Expr:
        return tirx.all(inside, chunk < dim // CHUNK) if dim % FRAGMENT else inside

    # -- to registers ------------------------------------------------------------------------------------------------------

    def _load_q(self, to: Registers, at: int, m_tile: int, step: int) -> None:
        """16 rows by 16 elements, as the left operand."""
        first = self.warp_m * (self.tiling.m_tiles * FRAGMENT) + m_tile * FRAGMENT
        place = self.tiling.q_place(self.config) + first * self.q_pitch + step * 32
        run("load_matrices", to.at(at), B.address_of(self.shared[self.q_lane + place]))

    def _load_k(self, to: Registers, pair: int, step: int) -> None:
        """16 keys by 16 elements, as the right operands of two products."""
        if self.is_transposed:
            place = step * (FRAGMENT * self.k_pitch) + pair * 32
        else:
            place = pair * (FRAGMENT * self.k_pitch) + step * 32
        run(f"load_matrices{'_trans' * self.is_transposed}", to.at(0), B.address_of(self.shared[self.k_now + place]))

    def _load_v(self, to: Registers, pair: int, step: int) -> None:
        """16 keys by 16 elements of their values, as the right operands of two products."""
        place = step * (FRAGMENT * self.v_pitch) + pair * 32
        run("load_matrices_trans", to.at(0), B.address_of(self.shared[self.v_now + place]))

    def _operands(self, stage: Expr | int) -> None:
        """Where the lane's rows of matrices of a stage begin."""
        base = stage * self.tiling.stage_bytes(self.config)
        first = self.warp_n * self.tiling.warp_keys
        if self.is_transposed:
            k = self._rows_first(self.k_pitch) + first * 2
        else:
            k = self._columns_first(self.k_pitch) + first * self.k_pitch
        self.k_now = let("k_now", base + k)
        v = base + self.tiling.k_bytes(self.config)
        self.v_now = let("v_now", v + self._rows_first(self.v_pitch) + first * self.v_pitch)


def _bytes(inside: Expr) -> Expr:
    return tirx.Select(inside, tirx.const(16, "int32"), tirx.const(0, "int32"))
