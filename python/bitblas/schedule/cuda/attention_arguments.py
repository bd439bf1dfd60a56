"""The arguments of kernels for attention, and which rows and keys a block takes. Importing this imports TVM."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from ...expr.storage import placed_dtype
from ..words import i32 as i32
from ..words import i64 as i64
from .emit import Registers, let, named

#: Elements of the flat views of arguments: more than memory has.
_ALL = 1 << 60
#: Scales from which on the largest score is that of the largest product, and one of minus infinity stays so.
_SMALL_SCALE, _LARGE_SCALE = 1e-30, 3e38


@dataclass(frozen=True)
class Argument:
    """A tensor: its elements by their distance from the first, and its strides, of which the last is 1."""

    flat: tirx.Buffer
    strides: tuple[Expr, ...]

    def at(self, offset: Expr) -> Expr:
        """The address of an element."""
        return B.address_of(self.flat[offset])


def held(name: str, value: Expr) -> Expr:
    """A variable that holds a value, which TVM would write out anew in each place where it is used."""
    register = Registers(name, 1, str(value.ty.dtype))
    register[0] = value
    return register[0]


def exp2(value: Expr) -> Expr:
    """2 to the power of a value, about."""
    return B.call_extern("float32", "bitblas_exp2", value)


def minus_infinity() -> Expr:
    """The score of a key that is not seen."""
    return let("lowest", B.call_extern("float32", "bitblas_float_of_bits", tirx.const(0xFF800000, "uint32")))


def finite(largest: Expr, lowest: Expr) -> Expr:
    """A maximum, or 0 in the place of a maximum of nothing."""
    return tirx.Select(largest == lowest, tirx.const(0.0, "float32"), largest)


def inverse_of(total: Expr) -> Expr:
    """What a row is multiplied by for its sum of weights to be 1; 0 for a row that saw no key."""
    one, zero = tirx.const(1.0, "float32"), tirx.const(0.0, "float32")
    return let("inverse", tirx.Select(total == zero, zero, one / total))


class AttentionArguments:
    """A kernel in the making: its facts, its arguments, and the block's share of the problem.

    Tensors are indexed with 64 bits, their rows and keys with 32.

    Parameters
    ----------
    config : FlashAttenConfig
        The kernels' question.
    block_m, block_n : int
        Rows of a block, and keys at a time.
    num_threads : int
        Threads of a block.
    """

    #: The thread of the block; the batch, the key head, and the block's first row.
    thread: Expr
    batch: Expr
    head: Expr
    first_m: Expr
    #: The number of the key head among those of all batches.
    number: Expr
    #: Rows of a key head, heads of Q that share it, keys, and how many more keys than queries there are.
    rows: Expr
    group: Expr
    keys: Expr
    ahead: Expr

    def __init__(self, config: FlashAttenConfig, block_m: int, block_n: int, num_threads: int) -> None:
        self.config, self.block_m, self.block_n, self.num_threads = config, block_m, block_n, num_threads
        scale = config.softmax_scale * math.log2(math.e)
        scale = max(min(scale, _LARGE_SCALE), -_LARGE_SCALE)
        #: What scores are multiplied by before they are compared, if at all, and after that.
        self.first_scale: float | None
        self.first_scale, self.scale = (None, scale) if scale > _SMALL_SCALE else (scale, 1.0)

    @contextmanager
    def kernel(self, name: str, blocks_at_once: int) -> Iterator[IRBuilder]:
        """The frame of a function, in which the body of a thread is written."""
        with IRBuilder() as builder, B.prim_func(s_tir=True):
            B.func_name(name)
            self.name = name  # kernels of one text may not declare different memory under one name
            B.func_attr({"tirx.noalias": True, "global_symbol": name})
            self._arguments()
            tiles = (self.seq_len * (self.heads // self.heads_kv) + (self.block_m - 1)) // self.block_m
            with (
                B.thread_binding(0, i32(tiles * self.num_batches * self.heads_kv), "blockIdx.x") as block,
                B.thread_binding(0, self.num_threads, "threadIdx.x") as thread,
                B.sblock("kernel"),
            ):
                B.reads()
                B.writes()
                self.thread = thread
                with B.attr(thread, "tirx.launch_bounds_min_blocks_per_sm", blocks_at_once):
                    self._place(block)
                    yield builder

    def _arguments(self) -> None:
        cfg = self.config
        sizes = ("batch", "seq_len", "heads", "seq_len_kv", "heads_kv")
        self.num_batches, self.seq_len, self.heads, self.keys_64, self.heads_kv = (
            tirx.Var(f"num_{name}" if name == "batch" else name, "int64") for name in sizes
        )
        keys = (self.num_batches, self.keys_64, self.heads_kv)
        transposed = (self.num_batches, cfg.dim, self.heads_kv, self.keys_64)
        self.q = self._argument("q", (self.num_batches, self.seq_len, self.heads, cfg.dim), cfg.Q_dtype)
        self.k = self._argument("k", transposed if cfg.layout == "ntn" else (*keys, cfg.dim), cfg.K_dtype)
        self.v = self._argument("v", (*keys, cfg.dim_v), cfg.V_dtype)
        self.out = self._argument("out", (self.num_batches, self.seq_len, self.heads, cfg.dim_v), cfg.Out_dtype)

    def _argument(self, name: str, shape: Sequence[Any], dtype: str) -> Argument:
        shape = [tirx.const(size, "int64") if isinstance(size, int) else size for size in shape]
        strides = [tirx.Var(f"{name}_stride_{axis}", "int64") for axis in range(len(shape) - 1)]
        strides.append(tirx.const(1, "int64"))
        handle = B.arg(f"{name}_handle", B.handle())
        buffer = named(name, B.match_buffer(handle, shape, placed_dtype(dtype, True), strides=strides))
        return Argument(buffer, tuple(strides))

    def _place(self, block: Expr) -> None:
        """What the block computes: its rows and the keys that these see. Blocks with the most keys come first."""
        for argument in ("q", "k", "v", "out"):
            buffer = getattr(self, argument).flat
            flat = named(f"{argument}_flat", B.decl_buffer((_ALL,), buffer.dtype, data=buffer.data))
            setattr(self, argument, Argument(flat, getattr(self, argument).strides))
        self.group = held("group", tirx.truncdiv(i32(self.heads), i32(self.heads_kv)))
        self.rows = held("rows", i32(self.seq_len) * self.group)
        self.keys = held("keys", i32(self.keys_64))
        self.ahead = held("ahead", i32(self.keys_64 - self.seq_len))
        tiles = held("tiles", tirx.truncdiv(self.rows + (self.block_m - 1), self.block_m))
        tile = tirx.truncmod(block, tiles)
        self.first_m = held("first_m", (tiles - 1 - tile if self.config.is_causal else tile) * self.block_m)
        self.number = held("number", tirx.truncdiv(block, tiles))
        self._find_head(self.number)
        whole, total = tirx.truncdiv(self.keys, self.block_n), self.keys
        if self.config.is_causal:
            whole = tirx.truncdiv(self.limit(self.first_m), self.block_n)
            total = self.limit(tirx.min(self.first_m + self.block_m, self.rows) - 1)
        #: Tiles of keys that all rows see whole, and those that a row sees any of.
        self.whole_tiles = held("whole_tiles", whole)
        self.num_tiles = held("num_tiles", tirx.truncdiv(total + (self.block_n - 1), self.block_n))

    def _find_head(self, number: Expr) -> None:
        """The batch and the key head, by their number among all of them."""
        self.batch = held("batch", i64(tirx.truncdiv(number, i32(self.heads_kv))))
        self.head = held("head", i64(tirx.truncmod(number, i32(self.heads_kv))))

    def limit(self, row: Expr) -> Expr:
        """How many keys a row sees."""
        if not self.config.is_causal:
            return self.keys
        seen = tirx.truncdiv(row, self.group) + self.ahead + 1
        return tirx.max(tirx.min(seen, self.keys), tirx.const(0, "int32"))

    def base_of(self, argument: Argument) -> Expr:
        """Distance of the head's first key or value from the first element."""
        return self.batch * argument.strides[0] + self.head * argument.strides[2]

    def row_offset(self, argument: Argument, row: Expr) -> Expr:
        """Distance of a row of Q or of the result from the first element."""
        query, of_group = tirx.truncdiv(row, self.group), tirx.truncmod(row, self.group)
        head = self.head * i64(self.group) + i64(of_group)
        return self.batch * argument.strides[0] + i64(query) * argument.strides[1] + head * argument.strides[2]
