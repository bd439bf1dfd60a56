"""Codes out of a little-endian bit stream, byte by byte or in words of 32 bits."""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx
from tvm.ir import Expr

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


def stream_words(stream: te.Tensor, shape: tuple[int, int], column: Callable[[Expr], Expr]) -> te.Tensor:
    """Block words: int32 words (n, words of a row) of rows that are whole words; `column` is the row that n stands for."""
    row_bytes = shape[1] * WORD_BYTES

    def word(n: Expr, w: Expr) -> Expr:
        return join_bytes([stream[column(n) * row_bytes + w * WORD_BYTES + j] for j in range(WORD_BYTES)])

    return te.compute(shape, word, name="words")


def word_code(words: te.Tensor, n: Expr, k: Expr, bits: int) -> Expr:
    """Code k of row n, in the lowest bits of an int32; bits above a code of less than 8 bits may hold anything."""
    first = words[n, k * bits // 32]
    if bits == 32:
        return first
    shift = k * bits % 32
    code = tirx.shift_right(first, shift)
    if bits in (8, 16):
        return tirx.bitwise_and(code, tirx.const((1 << bits) - 1, "int32"))
    if 32 % bits == 0:
        return code
    # a code may end in the next word, which is shifted in two steps: by 32 at once would not be defined
    one, left = tirx.const(1, "int32"), 31 - shift
    begin = tirx.bitwise_and(code, tirx.shift_left(tirx.const(2, "int32"), left) - one)
    end = tirx.shift_left(tirx.shift_left(words[n, (k * bits + bits - 1) // 32], one), left)
    return tirx.Select(shift + bits > 32, tirx.bitwise_or(begin, end), code)
