"""How a code becomes a float32, as scalar expressions: one function per kind of format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr

from ..formats import DataFormat


def float_of_bits(bits: int, threads: bool = False) -> Expr:
    """The float32 of a constant's bits, which TVM does not look into.

    For threads by a function of CUDA: TVM writes no C++ for the bits of a constant.
    """
    value = tirx.const(bits, "int32")
    return tirx.call_pure_extern("float32", "__int_as_float", value) if threads else tirx.reinterpret("float32", value)


def _mask(code: Expr, bits: int) -> Expr:
    return tirx.bitwise_and(code, tirx.const((1 << bits) - 1, "int32"))


def _select(code: Expr, values: Sequence[float], bit: int = 0) -> Expr:
    """A binary tree of selects over the bits of `code`, lowest bit at the root."""
    if len(values) == 1:
        return tirx.const(values[0], "float32")
    taken = tirx.bitwise_and(code, tirx.const(1 << bit, "int32")) != tirx.const(0, "int32")
    return tirx.Select(taken, _select(code, values[1::2], bit + 1), _select(code, values[0::2], bit + 1))


def _decode_uint(fmt: DataFormat, code: Expr) -> Expr:
    return _mask(code, fmt.bits).astype("float32")


def _decode_int(fmt: DataFormat, code: Expr) -> Expr:
    if fmt.bits == 1:
        return (_mask(code, 1) * 2 - 1).astype("float32")
    if fmt.bits == 8:
        return tirx.shift_right(tirx.shift_left(code, tirx.const(24, "int32")), tirx.const(24, "int32")).astype(
            "float32"
        )
    return (_mask(code, fmt.bits) - fmt.code_offset).astype("float32")


def _decode_codebook(fmt: DataFormat, code: Expr) -> Expr:
    return _select(code, fmt.codebook)


def _half(bits: Expr) -> Expr:
    return tirx.reinterpret("float16", bits.astype("uint16")).astype("float32")


def decode_float8(fmt: DataFormat, code: Expr, threads: bool = False) -> Expr:
    """The float32 value of a byte; see `bitblas.expr.MatmulExpr` for `threads`."""
    if fmt.name == "float8_e5m2":  # the upper byte of a float16
        return _half(tirx.shift_left(code, tirx.const(8, "int32")))
    # e4m3: exponent and mantissa moved to where float16 has them, whose bias is larger by 8
    magnitude = tirx.bitwise_and(code, tirx.const(0x7F, "int32"))
    sign = tirx.shift_left(tirx.bitwise_and(code, tirx.const(0x80, "int32")), tirx.const(8, "int32"))
    value = _half(tirx.bitwise_or(sign, tirx.shift_left(magnitude, tirx.const(7, "int32"))))
    nan = float_of_bits(0x7FC00000, threads)
    return tirx.Select(magnitude == 0x7F, nan, value * tirx.const(256.0, "float32"))


def _decode_float(fmt: DataFormat, code: Expr) -> Expr:
    if fmt.name == "float16":
        return _half(code)
    bits = tirx.shift_left(code, tirx.const(16, "int32")) if fmt.name == "bfloat16" else code
    return tirx.reinterpret("float32", bits)


_DECODERS: dict[str, Callable[[DataFormat, Expr], Expr]] = {
    "uint": _decode_uint,
    "int": _decode_int,
    "codebook": _decode_codebook,
    "float8": decode_float8,
    "float": _decode_float,
}


def decode(fmt: DataFormat, code: Expr) -> Expr:
    """The float32 value of an int32 `code`; for sub-byte formats the bits above the code may hold anything."""
    return _DECODERS[fmt.kind](fmt, code)
