"""What programs of attention on CPUs are written with: arguments, registers, a thread's memory. Importing this imports TVM."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...config import FlashAttenConfig
from ...formats import parse_format
from ..rule import LINE_BYTES
from ..words import i32, i64, let, named
from .attention_operands import FloatOperands, Row

#: What a maximum begins with: a finite number, so that what is not seen, -inf, is infinitely far below it.
LOWEST = -3.4028234663852886e38


def alloc(name: str, size: Expr | int, dtype: str = "float32", scope: str = "global") -> tirx.Buffer:
    """Memory of a thread, or of all where no task is begun."""
    return named(name, B.sblock_alloc_buffer((size,), dtype, scope=scope))


@contextmanager
def loop(name: str, size: Expr | int) -> Iterator[Expr]:
    """A loop, left out where it has no turns."""
    if isinstance(size, int) and size == 1:
        yield i32(0)
        return
    with B.serial(0, size) as var:
        yield named(name, var)


class AttentionVectors:
    """The arguments of an attention, and vectors of `lanes` words."""

    q: tirx.Buffer
    k: tirx.Buffer
    v: tirx.Buffer
    out: tirx.Buffer
    batch: Expr
    heads: Expr
    heads_kv: Expr
    num_queries: Expr
    num_keys: Expr
    #: Queries that share a head of keys, of one query position.
    group: Expr
    #: Rows of each head of keys.
    num_rows: Expr
    #: Where a task is: set by the program.
    batch_at: Expr
    head_at: Expr

    def __init__(self, config: FlashAttenConfig, operands: FloatOperands) -> None:
        self.config, self.operands, self.lanes = config, operands, operands.lanes
        self.scale = config.softmax_scale * math.log2(math.e)

    def begin(self, name: str) -> None:
        """The function's name, and its arguments: those of `bitblas.expr.attention_func`, with any strides but the last."""
        B.func_name(name)
        B.func_attr({"tirx.noalias": True, "global_symbol": name})
        config = self.config
        self.batch, self.heads, self.heads_kv, self.num_queries, self.num_keys = (B.int64() for _ in range(5))
        dim, dim_v = i64(config.dim), i64(config.dim_v)
        k_shape: tuple[Any, ...] = (self.batch, self.num_keys, self.heads_kv, dim)
        if config.layout == "ntn":
            k_shape = (self.batch, dim, self.heads_kv, self.num_keys)
        shapes = {
            "q": ((self.batch, self.num_queries, self.heads, dim), config.Q_dtype),
            "k": (k_shape, config.K_dtype),
            "v": ((self.batch, self.num_keys, self.heads_kv, dim_v), config.V_dtype),
            "out": ((self.batch, self.num_queries, self.heads, dim_v), config.Out_dtype),
        }
        handles = [B.arg(name, B.handle()) for name in shapes]
        self.q, self.k, self.v, self.out = (
            B.match_buffer(handle, shape, dtype, strides=[B.int64(), B.int64(), B.int64(), i64(1)])
            for handle, (shape, dtype) in zip(handles, shapes.values(), strict=True)
        )
        self.group = let("group", tirx.truncdiv(self.heads, self.heads_kv))
        self.num_rows = let("num_rows", self.num_queries * self.group)

    def find_row(self, row: Expr) -> tuple[Expr, Expr, Expr]:
        """Query and head of a row, and the last key that it sees: -1 where it sees none."""
        query = let("query", tirx.truncdiv(row, self.group))
        limit = self.num_keys - 1
        if self.config.is_causal:
            limit = tirx.min(limit, query + (self.num_keys - self.num_queries))
        return query, self.head_at * self.group + (row - query * self.group), tirx.max(limit, i64(-1)).astype("int32")

    # -- registers ---------------------------------------------------------------------------------------------------------

    def load(self, buffer: tirx.Buffer, first: Expr | int) -> Expr:
        """A vector."""
        return buffer.vload([first], f"{buffer.dtype}x{self.lanes}")

    def store(self, buffer: tirx.Buffer, first: Expr | int, value: Expr) -> None:
        """A vector."""
        first = i32(first) if isinstance(first, int) else first
        B.buffer_store(buffer, value, [B.ramp(first, 1, self.lanes)])

    def spread(self, value: Expr | float) -> Expr:
        """A value in all lanes."""
        value = tirx.const(value, "float32") if isinstance(value, float) else value
        return tirx.Broadcast(value, self.lanes)

    # -- keys and values ---------------------------------------------------------------------------------------------------

    def key_row(self, key: Expr) -> Row:
        """The elements of a key, for the layout nnn."""
        return lambda d: [self.batch_at, key, self.head_at, i64(d)]

    def transposed_row(self, d: Expr, first: Expr) -> Row:
        """One element of the keys from `first` on, for the layout ntn."""
        return lambda j: [self.batch_at, i64(d), self.head_at, first + i64(j)]

    def value_row(self, key: Expr) -> Row:
        """The elements of a key's value."""
        return lambda e: [self.batch_at, key, self.head_at, i64(e)]

    def ask_for(self, tensor: tirx.Buffer, row: Row, size: int) -> None:
        """Prefetch a row, which beyond the end does nothing."""
        line = LINE_BYTES * 8 // parse_format(str(tensor.dtype)).bits
        for at in range(0, size, line):
            address = B.address_of(tensor[tuple(row(i32(at)))])
            B.evaluate(B.call_llvm_intrin("void", "llvm.prefetch.p0", address, 0, 3, 1))
