"""Two bfloat16 in an int32, for instructions that add two products of them at once."""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

from ..formats import DataFormat
from ..layout import QUAD, PackedLayout
from .decode import decode

#: bfloat16 in a word, and words for the four codes of a quad: word h holds codes h and h + 2.
PAIR = 2


def _int32(value: int) -> Expr:
    return tirx.const(value, "int32")


def join_pair(low: Expr, high: Expr) -> Expr:
    """The word of two float32 that bfloat16 represents exactly."""
    low_bits = tirx.bitwise_and(tirx.shift_right(tirx.reinterpret("int32", low), _int32(16)), _int32(0xFFFF))
    return tirx.bitwise_or(low_bits, tirx.bitwise_and(tirx.reinterpret("int32", high), _int32(-1 << 16)))


def half(word: Expr, place: Expr) -> Expr:
    """A word's lower (0) or upper (1) bfloat16, as float32."""
    return tirx.reinterpret("float32", tirx.shift_left(tirx.shift_right(word, place * 16), _int32(16)))


def pair_codes(layout: PackedLayout, words: list[te.Tensor], p: Expr, n: Expr) -> Expr:
    """The codes of (n, k) and (n, k + 2), k = p // 2 · 4 + p % 2, in the lowest bits of a word's halves.

    From the words of each plane of the layout "dots". Bits above a code may hold anything.
    """
    found: Expr | None = None
    for plane, word in zip(layout.planes, words, strict=True):
        fields = plane.codes_per_word // QUAD
        q = p // PAIR
        part = tirx.shift_right(word[q // fields, n], q % fields * plane.width + p % PAIR * 8)
        if len(layout.planes) > 1:
            part = tirx.bitwise_and(part, _int32(((1 << plane.width) - 1) * 0x10001))
        part = tirx.shift_left(part, _int32(plane.low_bit)) if plane.low_bit else part
        found = part if found is None else tirx.bitwise_or(found, part)
    return found


def decode_pair(fmt: DataFormat, word: Expr) -> Expr:
    """The values of the codes in the halves of a word, as bfloat16."""
    return join_pair(decode(fmt, word), decode(fmt, tirx.shift_right(word, _int32(16))))
