"""Where a code is found in the words or bytes of a weight, as scalar expressions."""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

from ..layout import UNIT, PackedLayout
from .streams import join_bytes, stream_code


def row_code(layout: PackedLayout, W: te.Tensor, n: Expr, k: Expr) -> Expr:
    """The code of (n, k) of a row-wise bit stream."""
    if layout.bits >= 8:
        step = layout.bits // 8
        return join_bytes([W[n * layout.row_bytes + k * step + j] for j in range(step)])
    return stream_code(W, n * layout.row_bytes, k, layout.bits, layout.num_bytes)


def lane_code(layout: PackedLayout, words: list[te.Tensor], whole_words: bool, n: Expr, k: Expr) -> Expr:
    """The code of (n, k) in its lowest bits; the top plane is not masked, `decode` does that."""
    code: Expr | None = None
    for plane, word in zip(layout.planes, words, strict=True):
        if plane.width >= 8:
            return word[k, n]
        part = tirx.shift_right(word[k // UNIT if whole_words else k, n], k % UNIT * plane.width)
        if plane is not layout.planes[-1] and plane.low_bit + plane.width < layout.bits:
            part = tirx.bitwise_and(part, tirx.const((1 << plane.width) - 1, "int32"))
        part = tirx.shift_left(part, tirx.const(plane.low_bit, "int32")) if plane.low_bit else part
        code = part if code is None else tirx.bitwise_or(code, part)
    return code


def fragment_code(layout: PackedLayout, W: te.Tensor, n: Expr, k: Expr) -> Expr:
    """The code of (n, k) of a layout for tensor cores, nothing above it."""
    code: Expr | None = None
    for plane in layout.planes:
        index, shift = layout.fragment_word(plane, n, k)
        first = plane.offset + index * plane.word_bytes
        # a code never crosses a byte, since its plane's width divides 8
        part = tirx.shift_right(join_bytes([W[first + shift // 8]]), shift % 8)
        part = tirx.bitwise_and(part, tirx.const((1 << plane.width) - 1, "int32"))
        part = tirx.shift_left(part, tirx.const(plane.low_bit, "int32")) if plane.low_bit else part
        code = part if code is None else tirx.bitwise_or(code, part)
    return code
