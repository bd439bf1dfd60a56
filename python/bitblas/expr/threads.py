"""How a thread of a GPU makes a float32 of a code: no lanes, and few conversions, which such machines do slowly."""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx
from tvm.ir import Expr

from ..formats import DataFormat
from .decode import decode, decode_float8

#: The bits of 2^23, whose unit in the last place is 1: a whole number below 2^23 is or'd into them.
_MAGIC_BITS, _MAGIC = 0x4B000000, float(1 << 23)


def _int32(value: int) -> Expr:
    return tirx.const(value, "int32")


def thread_decoder(fmt: DataFormat) -> Callable[[Expr], Expr]:
    """A function from an int32 code to its float32 value; bits above a code of less than 8 bits may hold anything.

    Codebooks are a block of that name, float32 (entries,), that belongs into shared memory: a thread looks up what it needs.
    Other codes become values as `bitblas.expr.decode.decode` says, integers without a conversion.
    """
    if fmt.codebook:
        entries = len(fmt.codebook)
        table = te.compute((entries,), lambda at: decode(fmt, at), name="codebook")
        return lambda code: table[tirx.bitwise_and(code, _int32(entries - 1))]
    if fmt.kind == "float8":
        return lambda code: decode_float8(fmt, code, threads=True)
    return (lambda code: _integer(fmt, code)) if fmt.is_integer else (lambda code: decode(fmt, code))


def _integer(fmt: DataFormat, code: Expr) -> Expr:
    """2^23 plus the code, less 2^23 and the format's offset: exact, since both are whole numbers below 2^24."""
    offset = fmt.code_offset
    code = tirx.bitwise_and(code, _int32((1 << fmt.bits) - 1))
    if fmt.kind == "int" and fmt.bits == 1:
        code, offset = tirx.shift_left(code, _int32(1)), 1
    elif fmt.kind == "int" and fmt.bits == 8:
        code, offset = tirx.bitwise_xor(code, _int32(0x80)), 0x80
    value = tirx.reinterpret("float32", tirx.bitwise_or(code, _int32(_MAGIC_BITS)))
    return value - tirx.const(_MAGIC + offset, "float32")
