"""Tensor intrinsics that find the values of codes in tables."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...expr.decode import decode
from ...expr.pairs import decode_pair
from ...formats import parse_format
from ...layout import LANES
from .intrinsics import pure_call, register


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
    return _sixteen_codes(
        f"bitblas.{instruction}_{format_name}",
        "float32",
        lambda code: decode(fmt, code),
        lambda codes: find(fmt.code_values, codes),
        lanes,
    )


def _sixteen_codes(
    name: str, dtype: str, value: Callable[[Expr], Expr], find: Callable[[Expr], Expr], lanes: int
) -> str:
    """An intrinsic that turns sixteen words of codes into `dtype`: `value` of each is `find` of `lanes` of them at once."""

    @T.prim_func(s_tir=True)
    def meaning(U: T.Buffer((LANES,), "int32", offset_factor=1), D: T.Buffer((LANES,), dtype, offset_factor=1)) -> None:
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
        D = B.match_buffer(d, (LANES,), dtype, offset_factor=1)
        with B.sblock("root"):
            B.reads(U[0:LANES])
            B.writes(D[0:LANES])
            for first in range(0, LANES, lanes):
                B.buffer_store(D, find(U.vload([first], f"int32x{lanes}")), [B.ramp(first, 1, lanes)])
    return register(name, meaning, builder.get())


def _table(values: Sequence[float], lanes: int) -> Expr:
    """A constant register of `values`, repeated where there are fewer."""
    entries = [tirx.const(values[i % len(values)], "float32") for i in range(lanes)]
    return tirx.Shuffle(entries, [tirx.const(i, "int32") for i in range(lanes)])


def _vpermps_512(values: Sequence[float], codes: Expr) -> Expr:
    """The lowest 4 bits of an index count: no mask is needed, since the table repeats."""
    return pure_call("float32x16", "llvm.x86.avx512.permvar.sf.512", _table(values, 16), codes)


def _vpermps_256(values: Sequence[float], codes: Expr) -> Expr:
    """The lowest 3 bits of an index count; the fourth chooses between two tables, by the sign of a float."""
    low, high = values[:8], values[8:]
    found = pure_call("float32x8", "llvm.x86.avx2.permps", _table(low, 8), codes)
    if not high:
        return found
    upper = pure_call("float32x8", "llvm.x86.avx2.permps", _table(high, 8), codes)
    sign = tirx.reinterpret("float32x8", tirx.shift_left(codes, tirx.Broadcast(tirx.const(28, "int32"), 8)))
    return pure_call("float32x8", "llvm.x86.avx.blendv.ps.256", found, upper, sign)


def _tbl(values: Sequence[float], codes: Expr) -> Expr:
    """Sixteen floats are 64 bytes, which one instruction looks up: a code becomes the indices of its four bytes."""

    def spread(value: int) -> Expr:
        return tirx.Broadcast(tirx.const(value, "int32"), 4)

    parts = [tirx.reinterpret("int8x16", _table(values[i : i + 4], 4)) for i in range(0, LANES, 4)]
    indices = tirx.bitwise_and(codes, spread(LANES - 1)) * spread(0x04040404) + spread(0x03020100)
    found = pure_call("int8x16", "llvm.aarch64.neon.tbl4.v16i8", *parts, tirx.reinterpret("int8x16", indices))
    return tirx.reinterpret("float32x4", found)


#: (values of a table, codes) -> values of the codes, and lanes of a register, by the instruction's name.
LOOKUPS: dict[str, tuple[Callable[[Sequence[float], Expr], Expr], int]] = {
    "vpermps_512": (_vpermps_512, 16),
    "vpermps_256": (_vpermps_256, 8),
    "tbl": (_tbl, 4),
}


@cache
def look_up_pairs(format_name: str) -> str:
    """Decode thirty-two codes of at most 5 bits to bfloat16, two to a word: `vpermw`, which minds 5 bits of each half."""
    fmt = parse_format(format_name)
    entries = [bfloat16_bits(fmt.code_values[i % len(fmt.code_values)]) for i in range(32)]
    table = [entries[i] | entries[i + 1] << 16 for i in range(0, 32, 2)]

    values = tirx.Shuffle(
        [tirx.const(word - (word >> 31 << 32), "int32") for word in table],
        [tirx.const(i, "int32") for i in range(LANES)],
    )

    def find(words: Expr) -> Expr:
        both = (tirx.reinterpret("int16x32", part) for part in (values, words))
        return tirx.reinterpret("int32x16", pure_call("int16x32", "llvm.x86.avx512.permvar.hi.512", *both))

    return _sixteen_codes(
        f"bitblas.look_up_pairs_{format_name}", "int32", lambda word: decode_pair(fmt, word), find, LANES
    )


def bfloat16_bits(value: float) -> int:
    """The bits of a value that bfloat16 represents exactly."""
    return int.from_bytes(struct.pack("<f", value), "little") >> 16
