"""dequantize(W) as a matrix of its own, for cards: out[n, k] = (decode(W)[n, k] - zero[n, g]) · scale[n, g]."""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

from ..config import MatmulConfig
from ..layout import PackedLayout
from .codes import row_code, stream_code
from .decode import decode
from .threads import thread_decoder

_WORD = 32


def dense_func(config: MatmulConfig, layout: PackedLayout, name: str) -> tirx.PrimFunc:
    """Build the function (W, [scale], [zeros], dense), with the blocks value and dense.

    Arguments are those of `matmul_func`, W as uint32 where its rows are whole words; dense is (N, K) in A_dtype. Values are
    computed in float32 and rounded once (rescale: w · s - z).
    """
    in_words = layout.is_fragments or layout.row_bytes % 4 == 0
    size = layout.num_bytes // 4 if in_words else layout.num_bytes
    W = te.placeholder((size,), "uint32" if in_words else "int8", name="W")
    arguments = [W]
    n_groups, group = config.num_groups, config.group
    if config.with_scaling:
        S = te.placeholder(config.scale_shape, config.scale_dtype, name="S")
        arguments.append(S)
    if config.with_zeros:
        row_bytes = (config.N * config.format.bits + 7) // 8
        packed = (n_groups * row_bytes,)
        shape, dtype = (packed, "int8") if config.zeros_packed else ((config.N, n_groups), config.scale_dtype)
        Z = te.placeholder(shape, dtype, name="Z")
        arguments.append(Z)

    def decoded(code: Expr) -> Expr:
        # a table would have to be shared by a block
        return decode(config.format, code) if config.format.codebook else thread_decoder(config.format)(code)

    def zero(n: Expr, g: Expr) -> Expr:
        if not config.zeros_packed:
            return Z[n, g].astype("float32")
        bits = config.format.bits
        code = stream_code(Z, g * row_bytes, n, bits, n_groups * row_bytes)
        return tirx.bitwise_and(code, tirx.const((1 << bits) - 1, "int32")).astype("float32")

    def value(n: Expr, k: Expr) -> Expr:
        code = _word_code(layout, W, n, k) if in_words else row_code(layout, W, n, k)
        found = decoded(code)
        scale = (
            (S[0] if config.scale_per_tensor else S[n, k // group]).astype("float32") if config.with_scaling else None
        )
        shift = zero(n, k // group) if config.with_zeros else None
        if shift is not None and config.zeros_mode != "rescale":
            found, shift = found - shift, None
        found = found if scale is None else found * scale
        return found if shift is None else found - shift

    values = te.compute((config.N, config.K), lambda n, k: value(n, k).astype(config.A_dtype), name="value")
    dense = te.compute((config.N, config.K), lambda n, k: values[n, k], name="dense")
    return te.create_prim_func([*arguments, dense]).with_attr({"global_symbol": name})


def _word_code(layout: PackedLayout, W: te.Tensor, n: Expr, k: Expr) -> Expr:
    """The code of (n, k), int32; above those of a row-wise stream there may be anything."""
    if layout.is_fragments:
        code: Expr | None = None
        for plane in layout.planes:
            index, shift = layout.fragment_word(plane, n, k)
            part = _shifted(W[plane.offset // 4 + index], shift) & tirx.const((1 << plane.width) - 1, "int32")
            part = tirx.shift_left(part, tirx.const(plane.low_bit, "int32")) if plane.low_bit else part
            code = part if code is None else tirx.bitwise_or(code, part)
        return code
    first = k * layout.bits
    row, word, bit = n * (layout.row_bytes // 4), first // _WORD, first % _WORD
    low = _shifted(W[row + word], bit)
    if _WORD % layout.bits == 0:
        return low
    # the rest of a code that crosses a word; shifted in two steps, since one by 32 is not defined
    after = W[row + te.min(word + 1, layout.row_bytes // 4 - 1)].astype("int32")
    rest = tirx.shift_left(tirx.shift_left(after, _WORD - 1 - bit), tirx.const(1, "int32"))
    return tirx.bitwise_or(low, rest)


def _shifted(word: Expr, shift: Expr) -> Expr:
    return tirx.shift_right(word, shift.astype("uint32")).astype("int32")
