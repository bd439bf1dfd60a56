"""Tensor intrinsics: for each a scalar meaning and a vector implementation, side by side."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ..expr.decode import decode
from ..expr.matmul import join_bytes, stream_code
from ..expr.pairs import PAIR, decode_pair, half, join_pair
from ..expr.quads import quad_byte
from ..formats import parse_format
from ..layout import LANES, QUAD

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
def look_up(instruction: str, format_name: str) -> str:
    """Decode sixteen codes of at most 4 bits in a table that registers hold; bits above the code may hold anything.

    Parameters
    ----------
    instruction : str
        A row of `LOOKUPS`.
    format_name : str
        The codes' format.
    """
    fmt = parse_format(format_name)
    find, lanes = LOOKUPS[instruction]

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

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("implementation")
        u, d = B.arg("u", B.handle()), B.arg("d", B.handle())
        U = B.match_buffer(u, (LANES,), "int32", offset_factor=1)
        D = B.match_buffer(d, (LANES,), "float32", offset_factor=1)
        with B.sblock("root"):
            B.reads(U[0:LANES])
            B.writes(D[0:LANES])
            for first in range(0, LANES, lanes):
                found = find(fmt.code_values, U.vload([first], f"int32x{lanes}"))
                B.buffer_store(D, found, [B.ramp(first, 1, lanes)])
    return _register(f"bitblas.{instruction}_{format_name}", meaning, builder.get())


def _table(values: Sequence[float], lanes: int) -> Expr:
    """A constant register of `values`, repeated where there are fewer."""
    entries = [tirx.const(values[i % len(values)], "float32") for i in range(lanes)]
    return tirx.Shuffle(entries, [tirx.const(i, "int32") for i in range(lanes)])


def _vpermps_512(values: Sequence[float], codes: Expr) -> Expr:
    """The lowest 4 bits of an index count: no mask is needed, since the table repeats."""
    return _pure("float32x16", "llvm.x86.avx512.permvar.sf.512", _table(values, 16), codes)


def _vpermps_256(values: Sequence[float], codes: Expr) -> Expr:
    """The lowest 3 bits of an index count; the fourth chooses between two tables, by the sign of a float."""
    low, high = values[:8], values[8:]
    found = _pure("float32x8", "llvm.x86.avx2.permps", _table(low, 8), codes)
    if not high:
        return found
    upper = _pure("float32x8", "llvm.x86.avx2.permps", _table(high, 8), codes)
    sign = tirx.reinterpret("float32x8", tirx.shift_left(codes, tirx.Broadcast(tirx.const(28, "int32"), 8)))
    return _pure("float32x8", "llvm.x86.avx.blendv.ps.256", found, upper, sign)


def _tbl(values: Sequence[float], codes: Expr) -> Expr:
    """Sixteen floats are 64 bytes, which one instruction looks up: a code becomes the indices of its four bytes."""

    def spread(value: int) -> Expr:
        return tirx.Broadcast(tirx.const(value, "int32"), 4)

    parts = [tirx.reinterpret("int8x16", _table(values[i : i + 4], 4)) for i in range(0, LANES, 4)]
    indices = tirx.bitwise_and(codes, spread(LANES - 1)) * spread(0x04040404) + spread(0x03020100)
    found = _pure("int8x16", "llvm.aarch64.neon.tbl4.v16i8", *parts, tirx.reinterpret("int8x16", indices))
    return tirx.reinterpret("float32x4", found)


#: (values of a table, codes) -> values of the codes, and lanes of a register, by the instruction's name.
LOOKUPS: dict[str, tuple[Callable[[Sequence[float], Expr], Expr], int]] = {
    "vpermps_512": (_vpermps_512, 16),
    "vpermps_256": (_vpermps_256, 8),
    "tbl": (_tbl, 4),
}


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
    return _register(f"bitblas.unpack_zeros_{bits}", meaning, builder.get())


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
    return _register(f"bitblas.{instruction}_{vector_lanes}_{dot}_{depth}", described, builder.get())


def _as_bytes(word: Expr, lanes: int) -> Expr:
    return tirx.reinterpret(f"int8x{lanes * QUAD}", word)


def _pure(dtype: str, name: str, *arguments: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


def _vpdpbusd(lanes: int, total: Expr, quads: list[Expr], activations: list[Expr]) -> Expr:
    """Unsigned times signed bytes, four products a lane, exactly."""
    name = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
    for q, a in zip(quads, activations, strict=True):
        total = _pure(f"int32x{lanes}", name, total, _as_bytes(q, lanes), _as_bytes(a, lanes))
    return total


def _vpmaddubsw(lanes: int, total: Expr, quads: list[Expr], activations: list[Expr]) -> Expr:
    """Unsigned times signed bytes in pairs, which saturate at 16 bits; the caller sees to it that they never do."""
    wide = lanes == 16
    pairs = "llvm.x86.avx512.pmaddubs.w.512" if wide else "llvm.x86.avx2.pmadd.ub.sw"
    widen = "llvm.x86.avx512.pmaddw.d.512" if wide else "llvm.x86.avx2.pmadd.wd"
    halves: Expr | None = None
    for q, a in zip(quads, activations, strict=True):
        products = _pure(f"int16x{lanes * 2}", pairs, _as_bytes(q, lanes), _as_bytes(a, lanes))
        halves = products if halves is None else halves + products
    ones = tirx.Broadcast(tirx.const(1, "int16"), lanes * 2)
    return total + _pure(f"int32x{lanes}", widen, halves, ones)


def _sdot(lanes: int, total: Expr, quads: list[Expr], activations: list[Expr]) -> Expr:
    """Signed bytes, four products a lane, exactly."""
    for q, a in zip(quads, activations, strict=True):
        name = f"llvm.aarch64.neon.sdot.v{lanes}i32.v{lanes * QUAD}i8"
        total = _pure(f"int32x{lanes}", name, total, _as_bytes(q, lanes), _as_bytes(a, lanes))
    return total


#: (lanes, sums, words of Q, words of A spread over the lanes) -> sums, by the instruction's name.
DOT_INSTRUCTIONS: dict[str, Callable[[int, Expr, list[Expr], list[Expr]], Expr]] = {
    "vpdpbusd": _vpdpbusd,
    "vpmaddubsw": _vpmaddubsw,
    "sdot": _sdot,
}


def _register(name: str, meaning: tirx.PrimFunc, implementation: tirx.PrimFunc) -> str:
    TensorIntrin.register(name, meaning, implementation, override=True)
    return name


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

    return _register("bitblas.pair_activations", meaning, implementation)


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

    return _register("bitblas.dot_pairs", meaning, implementation)


@cache
def look_up_pairs(format_name: str) -> str:
    """Decode thirty-two codes of at most 5 bits to bfloat16, two to a word: `vpermw`, which minds 5 bits of each half."""
    fmt = parse_format(format_name)
    entries = [bfloat16_bits(fmt.code_values[i % len(fmt.code_values)]) for i in range(32)]
    table = [entries[i] | entries[i + 1] << 16 for i in range(0, 32, 2)]

    def pair_of(word: Expr) -> Expr:
        return decode_pair(fmt, word)

    @T.prim_func(s_tir=True)
    def meaning(
        U: T.Buffer((LANES,), "int32", offset_factor=1), D: T.Buffer((LANES,), "int32", offset_factor=1)
    ) -> None:
        with T.sblock("root"):
            T.reads(U[0:LANES])
            T.writes(D[0:LANES])
            for i in T.serial(0, LANES):
                with T.sblock("decode"):
                    lane = T.axis.remap("S", [i])
                    D[lane] = pair_of(U[lane])

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("implementation")
        u, d = B.arg("u", B.handle()), B.arg("d", B.handle())
        U = B.match_buffer(u, (LANES,), "int32", offset_factor=1)
        D = B.match_buffer(d, (LANES,), "int32", offset_factor=1)
        with B.sblock("root"):
            B.reads(U[0:LANES])
            B.writes(D[0:LANES])
            values = tirx.Shuffle(
                [tirx.const(word - (word >> 31 << 32), "int32") for word in table],
                [tirx.const(i, "int32") for i in range(LANES)],
            )
            found = _pure(
                "int16x32",
                "llvm.x86.avx512.permvar.hi.512",
                tirx.reinterpret("int16x32", values),
                tirx.reinterpret("int16x32", U.vload([0], "int32x16")),
            )
            B.buffer_store(D, tirx.reinterpret("int32x16", found), [B.ramp(0, 1, LANES)])
    return _register(f"bitblas.look_up_pairs_{format_name}", meaning, builder.get())


def bfloat16_bits(value: float) -> int:
    """The bits of a value that bfloat16 represents exactly."""
    return int.from_bytes(struct.pack("<f", value), "little") >> 16
