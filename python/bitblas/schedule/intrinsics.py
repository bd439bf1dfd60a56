"""Tensor intrinsics: for each a scalar meaning and a vector implementation, side by side."""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ..expr.decode import decode
from ..expr.matmul import join_bytes
from ..formats import parse_format
from ..layout import LANES

_UNSIGNED = {1: "uint8x16", 2: "uint16x16", 4: "int32x16"}


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
        return _register(f"bitblas.load_words_{word_bytes}_prefetch_{prefetch}", meaning, prefetching)
    return _register(f"bitblas.load_words_{word_bytes}", meaning, implementation)


@cache
def avx512_table(format_name: str) -> str:
    """Decode sixteen codes of at most 4 bits by `vpermps` in a table that fills one register.

    Only the lowest 4 bits of an index count, so the bits above the code need no mask: the table repeats.
    """
    fmt = parse_format(format_name)
    values = [tirx.const(fmt.code_values[i % (1 << fmt.bits)], "float32") for i in range(LANES)]
    table = tirx.Shuffle(values, [tirx.const(i, "int32") for i in range(LANES)])

    def value(code: Expr) -> tirx.Expr:
        return decode(fmt, code)

    @T.prim_func(s_tir=True)
    def meaning(
        U: T.Buffer((LANES,), "int32", offset_factor=1), D: T.Buffer((LANES,), "float32", offset_factor=1)
    ) -> None:
        with T.sblock("root"):
            T.reads(U[0:LANES])
            T.writes(D[0:LANES])
            for i in T.serial(0, LANES):
                with T.sblock("decode"):
                    lane = T.axis.remap("S", [i])
                    D[lane] = value(U[lane])

    @T.prim_func(s_tir=True)
    def implementation(
        U: T.Buffer((LANES,), "int32", offset_factor=1), D: T.Buffer((LANES,), "float32", offset_factor=1)
    ) -> None:
        with T.sblock("root"):
            T.reads(U[0:LANES])
            T.writes(D[0:LANES])
            D[T.ramp(T.int32(0), 1, LANES)] = T.call_llvm_pure_intrin(
                "float32x16", "llvm.x86.avx512.permvar.sf.512", table, U.vload([0], dtype="int32x16")
            )

    return _register(f"bitblas.avx512_table_{format_name}", meaning, implementation)


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
            move = distance if i & distance else 0
            lanes = [x + move if not x & distance else x + move - distance + LANES for x in range(LANES)]
            return tirx.Shuffle([low, high], [tirx.const(x, "int32") for x in lanes])

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

    return _register(f"bitblas.transpose_lanes_{dtype}_{width}_{rows_ahead}", meaning, implementation)


def _register(name: str, meaning: tirx.PrimFunc, implementation: tirx.PrimFunc) -> str:
    TensorIntrin.register(name, meaning, implementation, override=True)
    return name
