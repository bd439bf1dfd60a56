"""What kernels for tensor cores load, and from where: the first half of their program. Importing this imports TVM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...config import MatmulConfig
from ...expr.storage import placed_dtype
from ...layout import FRAGMENT_K, FRAGMENT_N, WARP, PackedLayout, Plane
from .emit import Registers, named, run, when
from .fragments_decode import Decoder
from .tiles import FRAGMENT_M, FragmentTiling, element_bytes, source_bytes


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


@dataclass(frozen=True)
class Loaded:
    """What a thread has of the weights of a step: words, and scales and zero points as they lie in memory."""

    words: Registers
    scales: Registers | None
    zeros: Registers | None

    def take_groups(self, other: Loaded) -> None:
        """Copy what belongs to groups from what was loaded elsewhere."""
        for mine, theirs in ((self.scales, other.scales), (self.zeros, other.zeros)):
            if mine is not None and theirs is not None and mine is not theirs:
                mine.take(theirs)


class FragmentLoads:
    """A kernel in the making: its facts, its arguments, and how they come to a thread.

    Parameters
    ----------
    config : MatmulConfig
        The kernels' question.
    layout : PackedLayout
        "mma16" or "mma8".
    tiling : FragmentTiling
        How to walk.
    """

    #: The thread's place in its block, its warp's share of columns and of k, its row and quarter of a product, and its tile's.
    thread: Expr
    lane: Expr
    warp_n: Expr
    warp_k: Expr
    row: Expr
    quarter: Expr
    first_m: Expr
    first_n: Expr
    #: The ring of stages, and after it the sums.
    shared: tirx.Buffer
    #: What is multiplied, and what is being loaded for a later step; of both what the text that follows means.
    now: Loaded
    ahead: Loaded
    activations: Registers

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
        self.element_bytes = element_bytes(config)
        #: Zero points and scales that a step needs: one, or one for each fold.
        self.num_folds = tiling.block_k // self.fold if self.per_group else 1
        self.wide_activations = self.element_bytes > 1
        self.widen = "" if self.wide_activations or self.decoder.is_bytes else _widening(config)
        #: Registers of the activations of 32 k as they lie in memory.
        self.raw = 4 if self.wide_activations else 2
        #: Bytes in which a packed zero point lies.
        self.zero_bytes = 2 if 8 % config.format.bits else 1

    def _arguments(self) -> None:
        cfg = self.config
        self.m = tirx.Var("m", "int32")

        def argument(name: str, shape: Sequence[Any], dtype: str) -> tirx.Buffer:
            return named(name, B.match_buffer(B.arg(f"{name}_handle", B.handle()), shape, placed_dtype(dtype, True)))

        self.A = argument("A", (self.m, cfg.K), cfg.activation_dtype)
        self.W = argument("W", (self.layout.num_bytes,), "int8")
        if cfg.with_scaling:
            self.S = argument("S", cfg.scale_shape, cfg.scale_dtype)
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

    # -- loading -----------------------------------------------------------------------------------------------------------

    def _load(self, step: Expr) -> None:
        """Ask for the weights of a step, and for what scales them."""
        if not self.tiling.stages:
            for place, words, address in self._vectors(step):
                run(f"stream_{4 * words}", self.ahead.words.at(place), B.address_of(self.W[address]))
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
        return lambda index: self.now.words[first + index]

    def _group(self, step: Expr, fold: int) -> Expr | int:
        if self.config.num_groups == 1:
            return 0
        return (step * self.tiling.block_k + fold * self.fold) // self.config.group

    def _per_row(self, n_tile: int, fold: int, half: int) -> int:
        return (n_tile * self.num_folds + fold) * 2 + half

    def _load_scale(self, step: Expr, n_tile: int, fold: int, half: int) -> None:
        index, n, group = self._per_row(n_tile, fold, half), self._column(n_tile, half), self._group(step, fold)
        scales, zeros = self.ahead.scales, self.ahead.zeros
        if scales is not None:
            scales[index] = self.S[0] if self.config.scale_per_tensor else self.S[n, group]
        if zeros is not None and self.float_zeros:
            zeros[index] = self.Z[n, group]
        if zeros is not None and self.config.zeros_packed:
            byte = group * self.zero_row + n * self.config.format.bits // 8
            for part in range(self.zero_bytes):
                place = byte if part == 0 else tirx.min(byte + 1, self.config.num_groups * self.zero_row - 1)
                zeros[index * self.zero_bytes + part] = self.Z[place]

    def _load_activations(self, step: Expr) -> None:
        """Eight rows and 32 k at a time: a thread's eight in a row are what it multiplies."""
        for m_tile in range(self.tiling.m_tiles):
            row = self.first_m + m_tile * FRAGMENT_M + self.row
            with when(row < self.m):
                for half_block in range(2 * self.blocks_per_step):
                    k = step * self.tiling.block_k + half_block * 32 + self.quarter * 8
                    at = (m_tile * 2 * self.blocks_per_step + half_block) * self.raw
                    run(f"load_{4 * self.raw}", self.activations.at(at), B.address_of(self.A[row, k]))

    def _copy(self, step: Expr, stage: Expr | int) -> None:
        """Ask for a stage: the weights, each thread its own, and the activations, for all warps; rows beyond m are 0."""
        for place, words, address in self._vectors(step):
            run(f"copy_words_{4 * words}", self._staged_words(place, words, stage), B.address_of(self.W[address]))
        size = source_bytes(self.config)
        tiling, chunk = self.tiling, 16 // size
        per_row = tiling.block_k // chunk
        total = tiling.block_m * per_row
        for first in range(0, total, tiling.num_threads):
            index = first + self.thread
            with when(index < total if first + tiling.num_threads > total else True):
                row, k = index // per_row, index % per_row * chunk
                m = self.first_m + row
                to = stage * tiling.stage_bytes(self.config) + row * tiling.copied_row_bytes(self.config) + k * size
                source = self.A[tirx.min(m, self.m - 1), step * tiling.block_k + k]
                read = tirx.Select(m < self.m, tirx.const(16, "int32"), tirx.const(0, "int32"))
                run("copy_async", B.address_of(self.shared[to]), B.address_of(source), read)


def _widening(config: MatmulConfig) -> str:
    source = {"float8_e4m3": "e4m3", "float8_e5m2": "e5m2"}.get(config.A_dtype, "s8")
    return f"widen_{source}_f16"
