"""Tensor intrinsics: for each a scalar meaning and a vector implementation, side by side. Here: how operands are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...expr.streams import join_bytes, stream_code
from ...layout import LANES
from .transpose import exchanged

_UNSIGNED = {1: "uint8x16", 2: "uint16x16", 4: "int32x16"}


def register(name: str, meaning: tirx.PrimFunc, implementation: tirx.PrimFunc) -> str:
    """Make a tensor intrinsic known to TVM; returns its name."""
    TensorIntrin.register(name, meaning, implementation, override=True)
    return name


def pure_call(dtype: str, name: str, *arguments: Expr) -> Expr:
    """A call of an LLVM intrinsic without side effects."""
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


@cache
def load_words(word_bytes: int, prefetch: int = 0) -> str:
    """Sixteen little-endian words of 1, 2 or 4 bytes, side by side in memory, as int32. Any target.

    With `prefetch`, the line that many bytes further on is asked for; beyond the end of a tensor that does nothing.
    """
    size, vector = LANES * word_bytes, _UNSIGNED[word_bytes]

    @T.prim_func(s_tir=True)
    def meaning(W: T.Buffer((size,), "int8", offset_factor=1), U: T.Buffer((LANES,), "int32", offset_factor=1)) -> None:
        with T.sblock("root"):
            T.reads(W[0:size])
            T.writes(U[0:LANES])
            for i in T.serial(0, LANES):
                with T.sblock("words"):
                    lane = T.axis.remap("S", [i])
                    U[lane] = join_bytes([W[lane * word_bytes + j] for j in range(word_bytes)])

    @T.prim_func(s_tir=True)
    def implementation(
        W: T.Buffer((size,), "int8", offset_factor=1), U: T.Buffer((LANES,), "int32", offset_factor=1)
    ) -> None:
        with T.sblock("root"):
            T.reads(W[0:size])
            T.writes(U[0:LANES])
            U[T.ramp(T.int32(0), 1, LANES)] = T.Cast(
                f"int32x{LANES}", T.reinterpret(vector, W.vload([0], dtype=f"int8x{size}"))
            )

    @T.prim_func(s_tir=True)
    def prefetching(
        W: T.Buffer((size,), "int8", offset_factor=1), U: T.Buffer((LANES,), "int32", offset_factor=1)
    ) -> None:
        with T.sblock("root"):
            T.reads(W[0:size])
            T.writes(U[0:LANES])
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(W[prefetch]), 0, 3, 1))
            U[T.ramp(T.int32(0), 1, LANES)] = T.Cast(
                f"int32x{LANES}", T.reinterpret(vector, W.vload([0], dtype=f"int8x{size}"))
            )

    if prefetch:
        return register(f"bitblas.load_words_{word_bytes}_prefetch_{prefetch}", meaning, prefetching)
    return register(f"bitblas.load_words_{word_bytes}", meaning, implementation)


@cache
def transpose_lanes(dtype: str, width: int, rows_ahead: int = 0) -> str:
    """Sixteen rows of `width` (2, 4, 8 or 16) scales side by side in memory -> `width` vectors of sixteen lanes, as float32.

    Rows i, i + width, i + 2 width, ... fill the segments of register i; then segments are transposed as squares, in steps that
    exchange between two registers the halves, the quarters, and so on. With `rows_ahead`, the scales of the rows so far on,
    those of the next tile, are asked for. Any target.
    """

    @T.prim_func(s_tir=True)
    def meaning(s: T.handle, d: T.handle) -> None:
        s_stride, d_stride = T.int32(), T.int32()
        S = T.match_buffer(s, (LANES, width), dtype, strides=[s_stride, 1], offset_factor=1)
        D = T.match_buffer(d, (width, LANES), "float32", strides=[d_stride, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(S[0:LANES, 0:width])
            T.writes(D[0:width, 0:LANES])
            for j, i in T.grid(width, LANES):
                with T.sblock("scale"):
                    g, lane = T.axis.remap("SS", [j, i])
                    D[g, lane] = S[lane, g].astype("float32")

    def transposed(S: tirx.Buffer, row: int) -> Expr:
        """Register `row` of the result, as an expression; what the rows share is found again by the compiler."""

        def register(i: int, distance: int) -> Expr:
            if distance == width:
                loaded = [S.vload([first, 0], dtype=f"{dtype}x{width}") for first in range(i, LANES, width)]
                joined = (
                    tirx.Shuffle(loaded, [tirx.const(x, "int32") for x in range(LANES)])
                    if len(loaded) > 1
                    else loaded[0]
                )
                return joined.astype(f"float32x{LANES}")
            low, high = register(i & ~distance, distance * 2), register(i | distance, distance * 2)
            return exchanged(low, high, distance, bool(i & distance), LANES)

        return register(row, 1)

    with IRBuilder() as builder, B.prim_func(s_tir=True):  # built, not parsed: each row is stored by another expression
        B.func_name("implementation")
        s, d = B.arg("s", B.handle()), B.arg("d", B.handle())
        s_stride, d_stride = B.int32(), B.int32()
        S = B.match_buffer(s, (LANES, width), dtype, strides=[s_stride, 1], offset_factor=1)
        D = B.match_buffer(d, (width, LANES), "float32", strides=[d_stride, 1], offset_factor=1)
        with B.sblock("root"):
            B.reads(S[0:LANES, 0:width])
            B.writes(D[0:width, 0:LANES])
            for row in range(LANES if rows_ahead else 0):
                address = B.address_of(S[row + rows_ahead, 0])
                B.evaluate(B.call_llvm_intrin("void", "llvm.prefetch.p0", address, 0, 3, 1))
            for row in range(width):
                B.buffer_store(D, transposed(S, row), [row, B.ramp(0, 1, LANES)])
    implementation = builder.get()

    return register(f"bitblas.transpose_lanes_{dtype}_{width}_{rows_ahead}", meaning, implementation)


@cache
def unpack_zeros(bits: int) -> str:
    """Sixteen zero points of 1, 2, 4 or 8 bits, side by side in a bit stream -> sixteen lanes, as float32. Any target."""
    size = LANES * bits // 8
    mask, word_bits = (1 << bits) - 1, min(32, LANES * bits)

    def zero_of(Z: tirx.Buffer, lane: Expr) -> Expr:
        return tirx.bitwise_and(stream_code(Z, 0, lane, bits, size), tirx.const(mask, "int32")).astype("float32")

    @T.prim_func(s_tir=True)
    def meaning(
        Z: T.Buffer((size,), "int8", offset_factor=1), D: T.Buffer((LANES,), "float32", offset_factor=1)
    ) -> None:
        with T.sblock("root"):
            T.reads(Z[0:size])
            T.writes(D[0:LANES])
            for i in T.serial(0, LANES):
                with T.sblock("zero"):
                    lane = T.axis.remap("S", [i])
                    D[lane] = zero_of(Z, lane)

    def spread(values: Sequence[int]) -> Expr:
        return tirx.Shuffle(
            [tirx.const(value, "int32") for value in values], [tirx.const(i, "int32") for i in range(LANES)]
        )

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("implementation")
        z, d = B.arg("z", B.handle()), B.arg("d", B.handle())
        Z = B.match_buffer(z, (size,), "int8", offset_factor=1)
        D = B.match_buffer(d, (LANES,), "float32", offset_factor=1)
        with B.sblock("root"):
            B.reads(Z[0:size])
            B.writes(D[0:LANES])
            loaded = Z.vload([0], f"int8x{size}")
            if bits == 8:
                codes = tirx.reinterpret("uint8x16", loaded).astype("int32x16")
            else:
                words = LANES * bits // word_bits
                found = tirx.reinterpret(f"uint{word_bits}x{words}" if words > 1 else f"uint{word_bits}", loaded)
                wide = found.astype(f"int32x{words}" if words > 1 else "int32")
                places = [tirx.const(i * bits // word_bits, "int32") for i in range(LANES)]
                # a shuffle has at most as many results as arguments
                each = tirx.Shuffle([wide] * (LANES // words), places) if words > 1 else tirx.Broadcast(wide, LANES)
                shifted = tirx.shift_right(each, spread([i * bits % word_bits for i in range(LANES)]))
                codes = tirx.bitwise_and(shifted, tirx.Broadcast(tirx.const(mask, "int32"), LANES))
            B.buffer_store(D, codes.astype(f"float32x{LANES}"), [B.ramp(0, 1, LANES)])
    return register(f"bitblas.unpack_zeros_{bits}", meaning, builder.get())
