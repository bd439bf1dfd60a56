"""Tensor intrinsics: for each a scalar meaning and a vector implementation, side by side."""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from ..expr.decode import decode
from ..expr.matmul import join_bytes
from ..formats import parse_format
from ..layout import LANES

_UNSIGNED = {1: "uint8x16", 2: "uint16x16", 4: "int32x16"}


@cache
def load_words(word_bytes: int) -> str:
    """Sixteen little-endian words of 1, 2 or 4 bytes, side by side in memory, as int32. Any target."""
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


def _register(name: str, meaning: tirx.PrimFunc, implementation: tirx.PrimFunc) -> str:
    TensorIntrin.register(name, meaning, implementation, override=True)
    return name
