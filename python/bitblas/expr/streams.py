"""Codes out of a little-endian bit stream, byte by byte or in words of 32 bits."""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx
from tvm.ir import Expr

from ..layout import stream_period

WORD_BYTES = 4


def join_bytes(parts: list[Expr]) -> Expr:
    """The int32 made of little-endian int8 `parts`; unsigned below four bytes."""
    word: Expr | None = None
    for j, part in enumerate(parts):
        wide = tirx.bitwise_and(part.astype("int32"), tirx.const(255, "int32"))
        wide = tirx.shift_left(wide, tirx.const(8 * j, "int32")) if j else wide
        word = wide if word is None else tirx.bitwise_or(word, wide)
    return word


def stream_code(stream: te.Tensor, first: Expr, index: Expr, bits: int, size: int) -> Expr:
    """Code number `index` of the bit stream that begins at byte `first`; bits above the code may hold anything."""
    byte, shift = first + index * bits // 8, index * bits % 8
    parts = [stream[byte]]
    if 8 % bits:
        parts.append(stream[te.min(byte + 1, size - 1)])
    return tirx.shift_right(join_bytes(parts), shift)


def stream_words(stream: te.Tensor, rows: int, row_words: int, bits: int, column: Callable[[Expr], Expr]) -> te.Tensor:
    """Block words: int32 words of rows that are whole words, (n, words) or, where codes straddle words, (n, periods, words).

    A period is as many codes as are whole words; `column` gives the row of the stream that n stands for.
    """
    per_period = period_words(bits)

    def word(n: Expr, *at: Expr) -> Expr:
        return stream[column(n) * row_words + (at[0] if len(at) == 1 else at[0] * per_period + at[1])]

    shape = (row_words,) if per_period == 1 else (row_words // per_period, per_period)
    return te.compute((rows, *shape), word, name="words")


def period_words(bits: int) -> int:
    """The words of a period."""
    return bits * stream_period(bits) // 32


def word_code(words: te.Tensor, n: Expr, k: Expr, bits: int) -> Expr:
    """Code k of row n, in the lowest bits of an int32; bits above a code of less than 8 bits may hold anything."""
    whole, bit = k // stream_period(bits), k % stream_period(bits) * bits
    if bits == 32:
        return words[n, whole]
    if period_words(bits) == 1:
        code = tirx.shift_right(words[n, whole], bit)
        return tirx.bitwise_and(code, tirx.const((1 << bits) - 1, "int32")) if bits >= 8 else code
    # a code may end in the next word, which is shifted in two steps: by 32 at once would not be defined
    one, left = tirx.const(1, "int32"), 31 - bit % 32
    code = tirx.shift_right(words[n, whole, bit // 32], bit % 32)
    begin = tirx.bitwise_and(code, tirx.shift_left(tirx.const(2, "int32"), left) - one)
    end = tirx.shift_left(tirx.shift_left(words[n, whole, (bit + bits - 1) // 32], one), left)
    return tirx.Select(bit % 32 + bits > 32, tirx.bitwise_or(begin, end), code)
