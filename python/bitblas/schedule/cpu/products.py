"""Tensor intrinsics that add several products at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...expr.pairs import PAIR, half, join_pair
from ...expr.quads import quad_byte
from ...layout import LANES, QUAD
from .intrinsics import pure_call, register


@cache
def dot_quads(instruction: str, vector_lanes: int, dot: str, depth: int) -> str:
    """C[lane] += Σ over `depth` words Σ over 4 bytes of A · byte of Q, for sixteen lanes.

    Parameters
    ----------
    instruction : str
        A row of `DOT_INSTRUCTIONS`.
    vector_lanes : int
        Lanes of int32 in a register.
    dot : str
        Whether bytes of Q are unsigned (``"u8s8"``) or signed (``"s8s8"``).
    depth : int
        Consecutive words of Q for each lane, which are summed before they are added to C.
    """
    add_products = DOT_INSTRUCTIONS[instruction]

    @T.prim_func(s_tir=True)
    def meaning_of_one(a: T.handle, q: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (QUAD,), "int8", offset_factor=1)
        Q = T.match_buffer(q, (LANES,), "int32", offset_factor=1)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:LANES], A[0:QUAD], Q[0:LANES])
            T.writes(C[0:LANES])
            for i, b in T.grid(LANES, QUAD):
                with T.sblock("matmul"):
                    lane, j = T.axis.remap("SR", [i, b])
                    C[lane] = C[lane] + T.Cast("int32", A[j]) * quad_byte(Q[lane], j, dot)

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, q: T.handle, c: T.handle) -> None:
        q_stride = T.int32()
        A = T.match_buffer(a, (depth * QUAD,), "int8", offset_factor=1)
        Q = T.match_buffer(q, (depth, LANES), "int32", strides=[q_stride, 1], offset_factor=1)
        C = T.match_buffer(c, (LANES,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:LANES], A[0 : depth * QUAD], Q[0:depth, 0:LANES])
            T.writes(C[0:LANES])
            for w, i, b in T.grid(depth, LANES, QUAD):
                with T.sblock("matmul"):
                    lane, u, j = T.axis.remap("SRR", [i, w, b])
                    C[lane] = C[lane] + T.Cast("int32", A[u * QUAD + j]) * quad_byte(Q[u, lane], j, dot)

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("implementation")
        a, q, c = (B.arg(name, B.handle()) for name in "aqc")
        A = B.match_buffer(a, (depth * QUAD,), "int8", offset_factor=1)
        if depth > 1:
            Q = B.match_buffer(q, (depth, LANES), "int32", strides=[B.int32(), 1], offset_factor=1)
        else:
            Q = B.match_buffer(q, (LANES,), "int32", offset_factor=1)
        C = B.match_buffer(c, (LANES,), "int32", offset_factor=1)
        with B.sblock("root"):
            B.reads(C[0:LANES], A[0 : depth * QUAD], Q[0:depth, 0:LANES] if depth > 1 else Q[0:LANES])
            B.writes(C[0:LANES])
            four = [tirx.reinterpret("int32", A.vload([u * QUAD], "int8x4")) for u in range(depth)]
            for first in range(0, LANES, vector_lanes):
                quads = [Q.vload([u, first][depth == 1 :], f"int32x{vector_lanes}") for u in range(depth)]
                spread = [tirx.Broadcast(word, vector_lanes) for word in four]
                total = add_products(vector_lanes, C.vload([first], f"int32x{vector_lanes}"), quads, spread)
                B.buffer_store(C, total, [B.ramp(first, 1, vector_lanes)])
    described = meaning if depth > 1 else meaning_of_one
    return register(f"bitblas.{instruction}_{vector_lanes}_{dot}_{depth}", described, builder.get())


def _as_bytes(word: Expr, lanes: int) -> Expr:
    return tirx.reinterpret(f"int8x{lanes * QUAD}", word)


def _vpdpbusd(lanes: int, total: Expr, quads: list[Expr], activations: list[Expr]) -> Expr:
    """Unsigned times signed bytes, four products a lane, exactly."""
    name = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
    for q, a in zip(quads, activations, strict=True):
        total = pure_call(f"int32x{lanes}", name, total, _as_bytes(q, lanes), _as_bytes(a, lanes))
    return total


def _vpmaddubsw(lanes: int, total: Expr, quads: list[Expr], activations: list[Expr]) -> Expr:
    """Unsigned times signed bytes in pairs, which saturate at 16 bits; the caller sees to it that they never do."""
    wide = lanes == 16
    pairs = "llvm.x86.avx512.pmaddubs.w.512" if wide else "llvm.x86.avx2.pmadd.ub.sw"
    widen = "llvm.x86.avx512.pmaddw.d.512" if wide else "llvm.x86.avx2.pmadd.wd"
    halves: Expr | None = None
    for q, a in zip(quads, activations, strict=True):
        products = pure_call(f"int16x{lanes * 2}", pairs, _as_bytes(q, lanes), _as_bytes(a, lanes))
        halves = products if halves is None else halves + products
    ones = tirx.Broadcast(tirx.const(1, "int16"), lanes * 2)
    return total + pure_call(f"int32x{lanes}", widen, halves, ones)


def _sdot(lanes: int, total: Expr, quads: list[Expr], activations: list[Expr]) -> Expr:
    """Signed bytes, four products a lane, exactly."""
    for q, a in zip(quads, activations, strict=True):
        name = f"llvm.aarch64.neon.sdot.v{lanes}i32.v{lanes * QUAD}i8"
        total = pure_call(f"int32x{lanes}", name, total, _as_bytes(q, lanes), _as_bytes(a, lanes))
    return total


#: (lanes, sums, words of Q, words of A spread over the lanes) -> sums, by the instruction's name.
DOT_INSTRUCTIONS: dict[str, Callable[[int, Expr, list[Expr], list[Expr]], Expr]] = {
    "vpdpbusd": _vpdpbusd,
    "vpmaddubsw": _vpmaddubsw,
    "sdot": _sdot,
}


#: TVM takes every bfloat16 of an expression for a float32, so that instructions are reached through functions over int32.
BF16_LIBRARY = """
define linkonce_odr hidden <16 x i32> @bitblas_pair_bf16(ptr %a) alwaysinline {
  %v = load <32 x i16>, ptr %a, align 2
  %p = shufflevector <32 x i16> %v, <32 x i16> poison, <32 x i32> <ORDER>
  %r = bitcast <32 x i16> %p to <16 x i32>
  ret <16 x i32> %r
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr hidden <16 x float> @bitblas_dpbf16ps(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
""".replace("ORDER", ", ".join(f"i32 {i // 4 * 4 + i % 2 * 2 + i % 4 // 2}" for i in range(2 * LANES)))


@cache
def pair_activations() -> str:
    """Thirty-two bfloat16 side by side -> sixteen words, of elements k and k + 2."""

    def pair_of(A: tirx.Buffer, p: Expr) -> Expr:
        k = p // PAIR * QUAD + p % PAIR
        return join_pair(A[k].astype("float32"), A[k + PAIR].astype("float32"))

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, d: T.handle) -> None:
        A = T.match_buffer(a, (LANES * PAIR,), "bfloat16", offset_factor=1)
        D = T.match_buffer(d, (LANES,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0 : LANES * PAIR])
            T.writes(D[0:LANES])
            for i in T.serial(0, LANES):
                with T.sblock("activation"):
                    p = T.axis.remap("S", [i])
                    D[p] = pair_of(A, p)

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, d: T.handle) -> None:
        A = T.match_buffer(a, (LANES * PAIR,), "bfloat16", offset_factor=1)
        D = T.match_buffer(d, (LANES,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0 : LANES * PAIR])
            T.writes(D[0:LANES])
            D[T.ramp(T.int32(0), 1, LANES)] = T.call_pure_extern(
                "bitblas_pair_bf16", T.address_of(A[0]), dtype="int32x16"
            )

    return register("bitblas.pair_activations", meaning, implementation)


@cache
def dot_pairs() -> str:
    """C[lane] += Σ over the halves of A · half of P, for sixteen lanes: `vdpbf16ps`; subnormal numbers count as 0."""

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, p: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (1,), "int32", offset_factor=1)
        P = T.match_buffer(p, (LANES,), "int32", offset_factor=1)
        C = T.match_buffer(c, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:LANES], A[0:1], P[0:LANES])
            T.writes(C[0:LANES])
            for i, h in T.grid(LANES, PAIR):
                with T.sblock("matmul"):
                    lane, j = T.axis.remap("SR", [i, h])
                    C[lane] = C[lane] + half(A[0], j) * half(P[lane], j)

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, p: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (1,), "int32", offset_factor=1)
        P = T.match_buffer(p, (LANES,), "int32", offset_factor=1)
        C = T.match_buffer(c, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:LANES], A[0:1], P[0:LANES])
            T.writes(C[0:LANES])
            C[T.ramp(T.int32(0), 1, LANES)] = T.call_pure_extern(
                "bitblas_dpbf16ps",
                C.vload([0], dtype="float32x16"),
                T.broadcast(A[0], LANES),
                P.vload([0], dtype="int32x16"),
                dtype="float32x16",
            )

    return register("bitblas.dot_pairs", meaning, implementation)
