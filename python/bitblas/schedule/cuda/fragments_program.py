"""The program of a kernel for tensor cores, written thread by thread. Importing this imports TVM.

Weights are the left operand, 16 rows of them, and activations the right one, 8 rows: out^T = W · A^T. So a few rows of A waste
little, and a weight is decoded once for all rows of a tile. A code is multiplied as the number that it is, exactly, and what
scales it meets the sums, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...config import MatmulConfig
from ...expr.storage import finish, placed_dtype, widen
from ...expr.streams import join_bytes
from ...formats import FORMATS
from ...layout import FRAGMENT_K, FRAGMENT_N, WARP, PackedLayout, Plane
from .fragments_decode import Decoder, Zero, table_words, u32
from .tiles import FRAGMENT_M, SUM_PADDING, FragmentTiling, element_bytes

#: Bits of 1 in each half or byte.
_ONES = {"f16": 0x3C003C00, "bf16": 0x3F803F80, "s8": 0x01010101, "u8": 0x01010101}


def products_of(config: MatmulConfig, layout: PackedLayout) -> str:
    """What tensor cores multiply.

    ``"f16"`` or ``"bf16"``; ``"s8"`` or ``"u8"``, the weights, with signed activations; or two kinds of float8, the weights'
    first, as in ``"e4m3_e5m2"``.
    """
    if config.integer_products:
        return "u8" if config.W_dtype == "uint8" else "s8"
    if layout.name == "mma8":
        return f"{config.W_dtype}_{config.A_dtype}".replace("float8_", "")
    return "bf16" if config.A_dtype == "bfloat16" else "f16"


@contextmanager
def _when(condition: Expr | bool) -> Any:
    """Statements under a condition; `True` for none."""
    if condition is True:
        yield
        return
    with B.If(condition), B.Then():
        yield


def _run(name: str, *arguments: Expr) -> None:
    """A call of a function of `src/cuda` for its effects."""
    B.evaluate(B.call_extern("void", f"bitblas_{name}", *arguments))


def _named(name: str, value: Any) -> Any:
    """The value, under a name in the program's text."""
    IRBuilder.name(name, value)
    return value


def _let(name: str, value: Expr) -> Expr:
    """A variable that holds a value."""
    return _named(name, B.bind(value))


class _Registers:
    """An array of a thread, indexed by constants."""

    def __init__(self, name: str, size: int, dtype: str) -> None:
        self.buffer, self.size = _named(name, B.sblock_alloc_buffer((size,), dtype, scope="local")), size

    def __getitem__(self, index: int) -> Expr:
        return self.buffer[index]

    def __setitem__(self, index: int, value: Expr) -> None:
        B.buffer_store(self.buffer, value, [index])

    def at(self, index: int) -> Expr:
        """The address of an element."""
        return B.address_of(self.buffer[index])

    def fill(self, value: Expr) -> None:
        for index in range(self.size):
            self[index] = value

    def take(self, other: _Registers) -> None:
        for index in range(self.size):
            self[index] = other[index]


class FragmentProgram:
    """A kernel in the making.

    Parameters
    ----------
    config : MatmulConfig
        The kernels' question.
    layout : PackedLayout
        "mma16" or "mma8".
    tiling : FragmentTiling
        How to walk.
    """

    def __init__(self, config: MatmulConfig, layout: PackedLayout, tiling: FragmentTiling) -> None:
        self.config, self.layout, self.tiling = config, layout, tiling
        self.products = products_of(config, layout)
        self.decoder = Decoder(config.format, layout, self.products)
        self.sum_dtype = "int32" if config.integer_products else "float32"
        self.total_dtype = "int32" if config.integer_accumulation else "float32"
        self.blocks_per_step = tiling.block_k // FRAGMENT_K
        self.num_steps = config.K // tiling.block_k
        self.workers = tiling.split_k * tiling.warps_k
        #: What is summed before it meets the scale and the zero point of its group.
        self.fold = tiling.fold(config)
        self.float_zeros = config.with_zeros and not config.zeros_packed
        #: Whether the whole part of a float zero point is subtracted from codes, so that only a rest, if there is one, asks for
        #: the sums of activations.
        self.splits_zeros = (
            self.float_zeros and config.zeros_mode == "original" and config.format.bits < 8 and config.W_dtype != "int1"
        )
        self.scales_groups = config.with_scaling and not config.integer_accumulation
        self.per_group = config.num_groups > 1
        self.folds = self.per_group and (self.scales_groups or self.float_zeros)
        #: Zero points and scales that a step needs: one, or one for each fold.
        self.num_folds = tiling.block_k // self.fold if self.per_group else 1
        self.wide_activations = FORMATS[config.A_dtype].bits > 8
        self.widen = "" if self.wide_activations or self.decoder.is_bytes else _widening(config)
        self.element_bytes = element_bytes(config)

    def func(self, name: str) -> tirx.PrimFunc:
        """The function; its arguments are those of `bitblas.expr.matmul_func`, and a workspace where K is split."""
        with IRBuilder() as builder, B.prim_func(s_tir=True):
            B.func_name(name)
            self.name = name  # kernels of one text may not declare different memory under one name
            B.func_attr({"tirx.noalias": True, "global_symbol": name})
            self._arguments()
            tiles_m = -(-self.config.N // self.tiling.block_n)
            m_tiles = (self.m + self.tiling.block_m - 1) // self.tiling.block_m
            self.m_tiles = m_tiles
            with (
                B.thread_binding(0, m_tiles * tiles_m, "blockIdx.x") as tile,
                B.thread_binding(0, self.tiling.split_k, "blockIdx.y") as part,
                B.thread_binding(0, self.tiling.num_threads, "threadIdx.x") as thread,
                B.sblock("kernel"),
            ):
                B.reads()
                B.writes()
                self.tile, self.part, self.thread = tile, part, thread
                with B.attr(thread, "tirx.launch_bounds_min_blocks_per_sm", self.tiling.blocks_at_once):
                    self._body()
        return builder.get()

    def _arguments(self) -> None:
        cfg = self.config
        self.m = tirx.Var("m", "int32")

        def argument(name: str, shape: Sequence[Any], dtype: str) -> tirx.Buffer:
            return _named(name, B.match_buffer(B.arg(f"{name}_handle", B.handle()), shape, placed_dtype(dtype, True)))

        self.A = argument("A", (self.m, cfg.K), cfg.activation_dtype)
        self.W = argument("W", (self.layout.num_bytes,), "int8")
        if cfg.with_scaling:
            self.S = argument("S", (cfg.N, cfg.num_groups), cfg.scale_dtype)
        if cfg.zeros_packed:
            self.zero_row = (cfg.N * cfg.format.bits + 7) // 8
            self.Z = argument("Z", (cfg.num_groups * self.zero_row,), "int8")
        elif cfg.with_zeros:
            self.Z = argument("Z", (cfg.N, cfg.num_groups), cfg.scale_dtype)
        self.bias = argument("bias", (cfg.N,), cfg.bias_dtype) if cfg.with_bias else None
        self.out = argument("out", (self.m, cfg.N), cfg.out_dtype)
        if self.tiling.split_k > 1:
            self.partial = argument("partial", (tirx.Var("partial_size", "int32"),), self.total_dtype)
            self.counters = argument("counters", (tirx.Var("counters_size", "int32"),), "int32")

    # -- the body ----------------------------------------------------------------------------------------------------------

    def _body(self) -> None:
        tiling = self.tiling
        self.lane, warp = _let("lane", self.thread % WARP), _let("warp", self.thread // WARP)
        self.warp_n, self.warp_k = _let("warp_n", warp % tiling.warps_n), _let("warp_k", warp // tiling.warps_n)
        self.row, self.quarter = _let("row", self.lane // 4), _let("quarter", self.lane % 4)
        self.first_m = _let("first_m", tirx.truncmod(self.tile, self.m_tiles) * tiling.block_m)
        self.first_n = _let("first_n", tirx.truncdiv(self.tile, self.m_tiles) * tiling.block_n)
        self._allocate()
        self.sums.fill(tirx.const(0, self.sum_dtype))
        if self.row_sums is not None:
            self.row_sums.fill(tirx.const(0, self.sum_dtype))
        if self.totals is not self.sums:
            self.totals.fill(tirx.const(0, self.total_dtype))
        worker = self.part * tiling.warps_k + self.warp_k if tiling.warps_k > 1 else self.part
        worker = _let("worker", worker)
        count = _let("count", (self.num_steps - worker + (self.workers - 1)) // self.workers)
        with _when(worker < self.num_steps if self.workers > 1 else True):
            self._load(worker)
        if not self.per_group:
            self._load_groups(worker)
            self._split_zeros()
        for ahead in range(tiling.stages - 1):
            with _when(count > ahead):
                self._copy(worker + ahead * self.workers, ahead)
            _run("commit_copies")
        with B.serial(0, count) as turn:
            _named("turn", turn)
            self._turn(worker + turn * self.workers, turn, count)
        if not self.per_group and (self.scales_groups or self.float_zeros):
            self._fold(0)
        self._finish()

    def _allocate(self) -> None:
        tiling = self.tiling
        tiles = tiling.n_tiles * tiling.m_tiles
        step_words = tiling.n_tiles * self.blocks_per_step * self.layout.bits
        self.words = _Registers("words", step_words, "uint32")
        if not tiling.stages:
            self.next_words = _Registers("next_words", step_words, "uint32")
        self.weights = _Registers("weights", 4, "uint32")
        per_row = 2 * self.num_folds * tiling.n_tiles
        if self.scales_groups:
            self.scales, self.next_scales = self._now_and_next("scales", per_row, self.S.dtype)
        if self.float_zeros:
            self.zeros, self.next_zeros = self._now_and_next("zeros", per_row, self.Z.dtype)
        if self.config.zeros_packed:
            self.zero_bytes = 2 if 8 % self.config.format.bits else 1
            self.zeros, self.next_zeros = self._now_and_next("zeros", per_row * self.zero_bytes, "int8")
        self.raw = 4 if self.wide_activations else 2  # registers of 32 k as they lie in memory
        held = tiling.m_tiles * (2 * self.blocks_per_step if not tiling.stages else 1)
        self.activations = _Registers("activations", held * self.raw, "uint32")
        if not tiling.stages:
            self.activations.fill(u32(0))  # of rows beyond m
        self.right = _Registers("right", tiling.m_tiles * 4, "uint32") if self.widen else self.activations
        self.sums = _Registers("sums", tiles * 4, self.sum_dtype)
        self.totals = _Registers("totals", tiles * 4, self.total_dtype) if self._has_totals else self.sums
        self.row_sums = _Registers("row_sums", tiling.m_tiles * 4, self.sum_dtype) if self.float_zeros else None
        if self.float_zeros:
            self.ones = _Registers("ones", 4, "uint32")
            self.ones.fill(u32(_ONES[self.products]))
        if self.splits_zeros:
            self.offsets, self.rests = _Registers("offsets", per_row, "uint32"), _Registers("rests", per_row, "float32")
            self.any_rest = _Registers("any_rest", 1, "int32")
        if self.decoder.looks_up:
            self.table = _Registers("table", 8, "uint32")
            for index, word in enumerate(table_words(self.config.format, self.products)):
                self.table[index] = u32(word)
        shared = tiling.shared_bytes(self.config)
        self.shared = _named(f"shared_{self.name}", B.sblock_alloc_buffer((shared,), "int8", scope="shared.dyn"))

    def _now_and_next(self, name: str, size: int, dtype: str) -> tuple[_Registers, _Registers]:
        """What belongs to groups, of this step and of the next; one and the same where there is one group."""
        now = _Registers(name, size, dtype)
        return now, _Registers(f"next_{name}", size, dtype) if self.per_group else now

    @property
    def _has_totals(self) -> bool:
        """Whether sums are added up elsewhere, because they are scaled on the way or of another dtype."""
        return self.folds or self.sum_dtype != self.total_dtype

    def _turn(self, step: Expr, turn: Expr, count: Expr) -> None:
        """One step over k: take what was loaded, load for the next, multiply."""
        tiling = self.tiling
        if not tiling.stages:
            self._load_activations(step)  # from a cache, while the weights are still on their way
        for now, ahead in self._pairs():
            now.take(ahead)
        with _when(turn + 1 < count):
            self._load(step + self.workers)
        if self.per_group:
            self._split_zeros()
        if tiling.stages:
            _run(f"wait_copies<{tiling.stages - 2}>")
            B.evaluate(B.tvm_storage_sync("shared"))
            ahead = turn + (tiling.stages - 1)
            with _when(ahead < count):
                self._copy(step + (tiling.stages - 1) * self.workers, ahead % tiling.stages)
            _run("commit_copies")
            for place, words, _ in self._vectors(step):
                _run(
                    f"load_shared_{4 * words}",
                    self.words.at(place),
                    self._staged_words(place, words, turn % tiling.stages),
                )
        for block in range(self.blocks_per_step):
            self._multiply(block, turn)

    def _pairs(self) -> list[tuple[_Registers, _Registers]]:
        pairs = [] if self.tiling.stages else [(self.words, self.next_words)]
        if self.scales_groups and self.per_group:
            pairs.append((self.scales, self.next_scales))
        if self.config.with_zeros and self.per_group:
            pairs.append((self.zeros, self.next_zeros))
        return pairs

    # -- loading -----------------------------------------------------------------------------------------------------------

    def _load(self, step: Expr) -> None:
        """Ask for the weights of a step, and for what scales them."""
        if not self.tiling.stages:
            for place, words, address in self._vectors(step):
                _run(f"stream_{4 * words}", self.next_words.at(place), B.address_of(self.W[address]))
        if self.per_group:
            self._load_groups(step)

    def _load_groups(self, step: Expr) -> None:
        """What belongs to a group of a row of weights: for the next step, or once for all."""
        for n_tile in range(self.tiling.n_tiles):
            for fold in range(self.num_folds):
                for half in range(2):
                    self._load_scale(step, n_tile, fold, half)

    def _block_n(self, n_tile: int) -> Expr:
        """Number of the block of 16 rows of weights; the last one for those that lie beyond."""
        block = self.first_n // FRAGMENT_N + self.warp_n * self.tiling.n_tiles + n_tile
        whole = self.config.N % self.tiling.block_n == 0
        return block if whole else tirx.min(block, self.config.N // FRAGMENT_N - 1)

    def _column(self, n_tile: int, half: int) -> Expr:
        return self._block_n(n_tile) * FRAGMENT_N + 8 * half + self.row

    def _vectors(self, step: Expr) -> Iterator[tuple[int, int, Expr]]:
        """What a thread loads for a step: its place in the thread's words, how many they are, and the address in W.

        A whole span of blocks at once, or as many as the step has.
        """
        for n_tile in range(self.tiling.n_tiles):
            base = n_tile * self.blocks_per_step * self.layout.bits
            blocks_of_row = self._block_n(n_tile) * (self.config.K // FRAGMENT_K)
            for plane in self.layout.planes:
                span, width = self.layout.span(plane), plane.width
                at_once = min(span, self.blocks_per_step)
                for block in range(0, self.blocks_per_step, at_once):
                    number = blocks_of_row + step * self.blocks_per_step + block
                    for piece in range(max(1, width // 4)):
                        vector = number // span * max(1, width // 4) + piece
                        address = plane.offset + (vector * WARP + self.lane) * (4 * min(4, width * span))
                        address += number % span * (4 * width) if at_once < span else 0
                        yield base + block * width + 4 * piece, min(4, width * at_once), address
                base += self.blocks_per_step * width

    def _staged_words(self, place: int, words: int, stage: Expr | int) -> Expr:
        """Where a thread's words of a stage lie in shared memory: side by side for the threads of a warp."""
        first = self.tiling.activation_bytes(self.config) + place * (4 * WARP * self.tiling.warps_n)
        offset = stage * self.tiling.stage_bytes(self.config) + first + (self.warp_n * WARP + self.lane) * (4 * words)
        return B.address_of(self.shared[offset])

    def _word(self, plane: Plane, n_tile: int, block: int) -> Callable[[int], Expr]:
        """The words of a plane, of one block of 16 x 64."""
        first = n_tile * self.blocks_per_step * self.layout.bits + block * plane.width
        first += self.blocks_per_step * sum(other.width for other in self.layout.planes if other.offset < plane.offset)
        return lambda index: self.words[first + index]

    def _group(self, step: Expr, fold: int) -> Expr | int:
        if self.config.num_groups == 1:
            return 0
        return (step * self.tiling.block_k + fold * self.fold) // self.config.group

    def _per_row(self, n_tile: int, fold: int, half: int) -> int:
        return (n_tile * self.num_folds + fold) * 2 + half

    def _load_scale(self, step: Expr, n_tile: int, fold: int, half: int) -> None:
        index, n, group = self._per_row(n_tile, fold, half), self._column(n_tile, half), self._group(step, fold)
        if self.scales_groups:
            self.next_scales[index] = self.S[n, group]
        if self.float_zeros:
            self.next_zeros[index] = self.Z[n, group]
        if self.config.zeros_packed:
            byte = group * self.zero_row + n * self.config.format.bits // 8
            for part in range(self.zero_bytes):
                place = byte if part == 0 else tirx.min(byte + 1, self.config.num_groups * self.zero_row - 1)
                self.next_zeros[index * self.zero_bytes + part] = self.Z[place]

    def _load_activations(self, step: Expr) -> None:
        """Eight rows and 32 k at a time: a thread's eight in a row are what it multiplies."""
        for m_tile in range(self.tiling.m_tiles):
            row = self.first_m + m_tile * FRAGMENT_M + self.row
            with _when(row < self.m):
                for half_block in range(2 * self.blocks_per_step):
                    k = step * self.tiling.block_k + half_block * 32 + self.quarter * 8
                    at = (m_tile * 2 * self.blocks_per_step + half_block) * self.raw
                    _run(f"load_{4 * self.raw}", self.activations.at(at), B.address_of(self.A[row, k]))

    def _copy(self, step: Expr, stage: Expr | int) -> None:
        """Ask for a stage: the weights, each thread its own, and the activations, for all warps; rows beyond m are 0."""
        for place, words, address in self._vectors(step):
            _run(f"copy_words_{4 * words}", self._staged_words(place, words, stage), B.address_of(self.W[address]))
        tiling, chunk = self.tiling, 16 // self.element_bytes
        per_row = tiling.block_k // chunk
        total = tiling.block_m * per_row
        for first in range(0, total, tiling.num_threads):
            index = first + self.thread
            with _when(index < total if first + tiling.num_threads > total else True):
                row, k = index // per_row, index % per_row * chunk
                m = self.first_m + row
                to = (
                    stage * tiling.stage_bytes(self.config)
                    + row * tiling.row_bytes(self.config)
                    + k * self.element_bytes
                )
                source = self.A[tirx.min(m, self.m - 1), step * tiling.block_k + k]
                size = tirx.Select(m < self.m, tirx.const(16, "int32"), tirx.const(0, "int32"))
                _run("copy_async", B.address_of(self.shared[to]), B.address_of(source), size)

    # -- multiplying -------------------------------------------------------------------------------------------------------

    def _multiply(self, block: int, turn: Expr) -> None:
        """Multiply one block of 64 k, all tiles, and fold what is complete."""
        steps_per_half = self.decoder.num_steps // 2
        for half_block in range(2):
            self._right(block, half_block, turn)
            for step in range(steps_per_half):
                for n_tile in range(self.tiling.n_tiles):
                    self._decode(block, half_block * steps_per_half + step, n_tile)
                    for m_tile in range(self.tiling.m_tiles):
                        self._mma(
                            self.sums,
                            n_tile * self.tiling.m_tiles + m_tile,
                            self.weights,
                            m_tile,
                            step,
                            block,
                            half_block,
                        )
            self._sum_rows(block, half_block)
            done = block * FRAGMENT_K + (half_block + 1) * 32
            if self.folds and done % self.fold == 0:
                self._fold(done // self.fold - 1)

    def _sum_rows(self, block: int, half_block: int) -> None:
        """Sum the activations of 32 k of each row, where a zero point asks for it: products with ones."""
        if self.row_sums is None:
            return
        with _when(self.any_rest[0] != 0 if self.splits_zeros else True):
            for step in range(self.decoder.num_steps // 2):
                for m_tile in range(self.tiling.m_tiles):
                    self._mma(self.row_sums, m_tile, self.ones, m_tile, step, block, half_block)

    def _split_zeros(self) -> None:
        """Float zero points into what codes hold, and a rest, which is 0 for whole ones."""
        if not self.splits_zeros:
            return
        fmt, largest = self.config.format, float((1 << self.config.format.bits) - 1)
        offset = tirx.const(float(fmt.code_offset), "float32")
        found: Expr = tirx.const(False, "bool")
        for index in range(self.zeros.size):
            zero = widen(self.zeros[index]) + offset
            whole = tirx.max(tirx.min(tirx.nearbyint(zero), tirx.const(largest, "float32")), tirx.const(0.0, "float32"))
            self.offsets[index] = whole.astype("uint32")
            self.rests[index] = zero - self.offsets[index].astype("float32")
            found = tirx.any(found, self.rests[index] != tirx.const(0.0, "float32"))
        self.any_rest[0] = B.call_extern("int32", "bitblas_any", found.astype("int32"))

    def _right(self, block: int, half_block: int, turn: Expr) -> None:
        """The activations of 32 k into registers, as they are multiplied."""
        tiling = self.tiling
        if tiling.stages:
            for m_tile in range(tiling.m_tiles):
                offset = turn % tiling.stages * tiling.stage_bytes(self.config)
                offset += (m_tile * FRAGMENT_M + self.row) * tiling.row_bytes(self.config)
                offset += (block * FRAGMENT_K + half_block * 32 + self.quarter * 8) * self.element_bytes
                _run(
                    f"load_shared_{4 * self.raw}",
                    self.activations.at(m_tile * self.raw),
                    B.address_of(self.shared[offset]),
                )
        if self.widen:
            for m_tile in range(tiling.m_tiles):
                at = self._held(m_tile, block, half_block) * self.raw
                for index in range(2):
                    _run(self.widen, self.right.at(m_tile * 4 + 2 * index), self.activations[at + index])

    def _held(self, m_tile: int, block: int, half_block: int) -> int:
        """Which of the held pieces of activations are those of 32 k."""
        if self.tiling.stages:
            return m_tile
        return m_tile * 2 * self.blocks_per_step + 2 * block + half_block

    def _mma(
        self, sums: _Registers, tile: int, weights: _Registers, m_tile: int, step: int, block: int, half_block: int
    ) -> None:
        registers = 2 if self.decoder.is_bytes else 4  # of 32 k, as they are multiplied
        piece = m_tile if self.widen else self._held(m_tile, block, half_block)
        first = piece * registers + 2 * step
        _run(f"mma_{self.products}", sums.at(4 * tile), weights.at(0), self.right[first], self.right[first + 1])

    def _decode(self, block: int, step: int, n_tile: int) -> None:
        words = [self._word(plane, n_tile, block) for plane in self.layout.planes]
        if self.decoder.looks_up:
            _run("look_up", self.weights.at(0), words[0](step), self.table.at(0))
            return
        k = block * FRAGMENT_K + step * (FRAGMENT_K // self.decoder.num_steps)
        fold = k // self.fold if self.num_folds > 1 else 0
        for register in range(4):
            zero = self._zero(n_tile, fold, register % 2)
            self.weights[register] = self.decoder.register(words, 4 * step + register, zero)

    def _zero(self, n_tile: int, fold: int, half: int) -> Zero | None:
        """What is subtracted from a code, beyond what its format says."""
        if self.splits_zeros:
            return Zero(self.offsets[self._per_row(n_tile, fold, half)])
        if not self.config.zeros_packed:
            return None
        bits, index = self.config.format.bits, self._per_row(n_tile, fold, half) * self.zero_bytes
        code = join_bytes([self.zeros[index + part] for part in range(self.zero_bytes)])
        code = tirx.shift_right(code, self._column(n_tile, half) * bits % 8)
        return Zero(tirx.bitwise_and(code, tirx.const((1 << bits) - 1, "int32")).astype("uint32"))

    def _fold(self, fold: int) -> None:
        """Let the sums of a group meet its scale and zero point, and begin anew."""
        cfg, tiling = self.config, self.tiling
        for n_tile in range(tiling.n_tiles):
            for m_tile in range(tiling.m_tiles):
                tile = n_tile * tiling.m_tiles + m_tile
                for element in range(4):
                    index, at = tile * 4 + element, self._per_row(n_tile, fold, element // 2)
                    value = self.sums[index].astype("float32")
                    scale = widen(self.scales[at]) if self.scales_groups else None
                    shift = None
                    if self.row_sums is not None:
                        row_sum = self.row_sums[m_tile * 4 + element].astype("float32")
                        zeros = self.rests if self.splits_zeros else self.zeros
                        shift = row_sum * widen(zeros[at])
                    if shift is not None and cfg.zeros_mode != "rescale":
                        value = value - shift
                    value = value if scale is None else value * scale
                    if shift is not None and cfg.zeros_mode == "rescale":
                        value = value - shift
                    self.totals[index] = self.totals[index] + value if self._has_totals else value
        if self.folds:
            self.sums.fill(tirx.const(0, self.sum_dtype))
            if self.row_sums is not None:
                self.row_sums.fill(tirx.const(0, self.sum_dtype))

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Add up the sums of warps, and of blocks, in shared memory, and store the result row by row."""
        tiling, pitch = self.tiling, self.tiling.block_n + SUM_PADDING
        sums = B.decl_buffer(
            (tiling.warps_k * tiling.block_m * pitch,), self.total_dtype, data=self.shared.data, scope="shared.dyn"
        )
        if tiling.stages:
            _run("wait_copies<0>")
            B.evaluate(B.tvm_storage_sync("shared"))
        for n_tile in range(tiling.n_tiles):
            for m_tile in range(tiling.m_tiles):
                for element in range(4):
                    row = m_tile * FRAGMENT_M + 2 * self.quarter + element % 2
                    column = (self.warp_n * tiling.n_tiles + n_tile) * FRAGMENT_N + self.row + 8 * (element // 2)
                    place = (self.warp_k * tiling.block_m + row) * pitch + column
                    value = self.totals[(n_tile * tiling.m_tiles + m_tile) * 4 + element]
                    B.buffer_store(sums, value, [place])
        B.evaluate(B.tvm_storage_sync("shared"))

        def of_block(row: Expr, column: Expr) -> Expr:
            value = sums[row * pitch + column]
            for warp in range(1, tiling.warps_k):
                value = value + sums[(warp * tiling.block_m + row) * pitch + column]
            return value

        if tiling.split_k == 1:
            self._each(lambda row, column, _index: self._store(row, column, of_block(row, column)))
            return
        elements = tiling.block_m * tiling.block_n
        base = self.tile * (tiling.split_k * elements)
        self._each(
            lambda row, column, index: B.buffer_store(
                self.partial, of_block(row, column), [base + self.part * elements + index]
            )
        )
        self._last_block(base, elements)

    def _last_block(self, base: Expr, elements: int) -> None:
        """The block that comes last adds up what all have left, in their order."""
        tiling = self.tiling
        arrived = B.decl_buffer((1,), "int32", data=self.shared.data, scope="shared.dyn")
        B.evaluate(B.tvm_storage_sync("shared"))
        with _when(self.thread == 0):
            before = B.call_extern("int32", "bitblas_arrive", B.address_of(self.counters[self.tile]))
            B.buffer_store(arrived, before, [0])
        B.evaluate(B.tvm_storage_sync("shared"))
        before_all = _Registers("before", 1, "int32")
        before_all[0] = arrived[0]
        with _when(before_all[0] == tiling.split_k - 1):
            _run("see_arrived")

            def store(row: Expr, column: Expr, index: Expr) -> None:
                value = self.partial[base + index]
                for part in range(1, tiling.split_k):
                    value = value + self.partial[base + part * elements + index]
                self._store(row, column, value)

            self._each(store)
            with _when(self.thread == 0):
                B.buffer_store(self.counters, tirx.const(0, "int32"), [self.tile])

    def _each(self, visit: Callable[[Expr, Expr, Expr], None]) -> None:
        """Share the elements of the tile out among threads, side by side along n."""
        total = self.tiling.block_m * self.tiling.block_n
        with B.serial(0, -(-total // self.tiling.num_threads)) as round_:
            index = round_ * self.tiling.num_threads + self.thread
            with _when(index < total if total % self.tiling.num_threads else True):
                visit(index // self.tiling.block_n, index % self.tiling.block_n, index)

    def _store(self, row: Expr, column: Expr, value: Expr) -> None:
        cfg, m, n = self.config, self.first_m + row, self.first_n + column
        inside = m < self.m
        if cfg.N % self.tiling.block_n:
            inside = tirx.all(inside, n < cfg.N)
        with _when(inside):
            scale = self.S[n, 0] if cfg.with_scaling and cfg.integer_accumulation else None
            bias = self.bias[n] if self.bias is not None else None
            B.buffer_store(self.out, finish(cfg, value, scale, None, bias, threads=True, as_bits=True), [m, n])


def _widening(config: MatmulConfig) -> str:
    source = {"float8_e4m3": "e4m3", "float8_e5m2": "e5m2"}.get(config.A_dtype, "s8")
    return f"widen_{source}_f16"
