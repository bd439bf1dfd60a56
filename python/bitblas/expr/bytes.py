"""Products of bytes, four at a time, for a thread: `__dp4a` of words of activations and of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.ir import Expr

from ..formats import DataFormat
from ..layout import QUAD, stream_period
from .quads import offset, repeated
from .streams import join_bytes, word_code

#: Words whose products one expression adds up.
_DEPTH = 8


def _order(bits: int, q: Expr, j: int) -> Expr:
    """The k of byte j of word q, of both operands: codes that one shift and one mask give, where a byte holds whole codes."""
    if 8 % bits:
        return q * QUAD + j
    per_byte = 8 // bits
    return q // per_byte * stream_period(bits) + j * per_byte + q % per_byte


def activation_words(bits: int, given: Callable[[Expr, Expr], Expr], rows: Any, k: int) -> te.Tensor:
    """Block activation: four int8 activations in an int32, (rows, k / 4), in the order of `weight_words`."""

    def word(i: Expr, q: Expr) -> Expr:
        return join_bytes([given(i, _order(bits, q, j)) for j in range(QUAD)])

    return te.compute((rows, k // QUAD), word, name="activation")


def weight_words(fmt: DataFormat, words: te.Tensor, shape: tuple[int, int]) -> te.Tensor:
    """Block decode: the signed bytes of four codes plus `quads.offset` in an int32, (K / 4, padded N)."""
    bits, mask = fmt.bits, (1 << fmt.bits) - 1

    def word(q: Expr, n: Expr) -> Expr:
        if 8 % bits:
            parts = [
                tirx.bitwise_and(word_code(words, n, q * QUAD + j, bits), tirx.const(mask, "int32"))
                for j in range(QUAD)
            ]
            return join_bytes([part.astype("int8") for part in parts])
        per_byte = 8 // bits
        found = words[n, q // per_byte]
        if bits < 8:
            found = tirx.bitwise_and(tirx.shift_right(found, q % per_byte * bits), repeated(mask))
        elif offset(fmt, "s8s8"):
            found = tirx.bitwise_xor(found, repeated(0x80))
        # int1 is 2 code - 1
        return tirx.shift_left(found, tirx.const(1, "int32")) if bits == 1 and fmt.kind == "int" else found

    return te.compute((shape[0] // QUAD, shape[1]), word, name="decode")


def dot(pairs: list[tuple[Expr, Expr]]) -> Expr:
    """The sum of the products of the bytes of pairs of words, int32."""
    total: Expr = tirx.const(0, "int32")
    for a, b in pairs:
        total = tirx.call_pure_extern("int32", "__dp4a", a, b, total)
    return total


def dot_products(chunk: int, activation: te.Tensor, decoded: te.Tensor, rows: Any, shape: tuple[int, int]) -> te.Tensor:
    """Block matmul: sums of products over chunks of k, int32 (chunks, rows, padded N)."""
    per_chunk = chunk // QUAD
    depth = max(size for size in range(1, _DEPTH + 1) if per_chunk % size == 0)
    q = te.reduce_axis((0, per_chunk // depth), name="q")

    def product(c: Expr, i: Expr, n: Expr) -> Expr:
        first = c * per_chunk + q * depth
        return te.sum(dot([(activation[i, first + d], decoded[first + d, n]) for d in range(depth)]), axis=q)

    return te.compute((shape[0] // chunk, rows, shape[1]), product, name="matmul")


def dot_row_sum(chunk: int, activation: te.Tensor, rows: Any, k: int) -> te.Tensor:
    """Block row_sum: the sums of activations over chunks of k, int32 (rows, chunks)."""
    per_chunk = chunk // QUAD
    q = te.reduce_axis((0, per_chunk), name="q")
    return te.compute(
        (rows, k // chunk),
        lambda i, c: te.sum(dot([(activation[i, c * per_chunk + q], repeated(1))]), axis=q),
        name="row_sum",
    )
