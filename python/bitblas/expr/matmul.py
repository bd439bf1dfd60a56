"""out = A · dequantize(W)ᵀ + bias as named blocks over logical indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx
from tvm.ir import Expr

from ..config import MatmulConfig
from ..formats import parse_format
from ..layout import LANES, QUAD, PackedLayout, stream_period
from .absmax import absmax_bits
from .bytes import activation_words, dot_products, dot_row_sum, weight_words
from .codes import fragment_code, lane_code, row_code
from .decode import decode, decode_float8
from .factors import Factors
from .pairs import PAIR, decode_pair, half, join_pair, pair_codes
from .quads import needs_row_sum, offset, quad, quad_byte
from .quantize import Quantizer, quantizer
from .slices import digit, join_slices, step
from .storage import finish, placed_dtype, times, widen
from .streams import WORD_BYTES, join_bytes, stream_words, word_code
from .threads import thread_decoder


@dataclass(frozen=True)
class MatmulExpr:
    """What the expression is built from.

    With chunks c of consecutive k, and g(c) the group of a chunk::

        activation[i, k]    = float32(A[min(i, m - 1), k])
        row_sum[i, c]       = Σ_k in c  activation[i, k]
        decode[k, n]        = value of the code of (n, k), without scale and zero point
        matmul[c, i, n]     = Σ_k in c  activation[i, k] · decode[k, n]
        accumulate[i, n]    = Σ_c (matmul[c, i, n] - row_sum[i, c] · zero[g(c), n]) · scale[g(c), n]
        epilogue[i, n]      = out_dtype(accumulate[i, n] + bias[n])

    (rescale: matmul · scale - row_sum · zero.) Chunks are summed in `config.sum_dtype`; pure integer sums
    are scaled at the end. With a `dot`, all up to the sum of a chunk are integers::

        activation[i, k]    = A[min(i, m - 1), k], int8
        decode[q, n]        = the codes of (n, 4 q .. 4 q + 3), plus `quads.offset`, in the bytes of an int32
        matmul[c, i, n]     = Σ_q in c Σ_j  activation[i, 4 q + j] · byte j of decode[q, n]
                              (and accumulate subtracts row_sum[i, c] · offset)

    and float activations are cut into `slices` digits of base 256, each a signed byte, with a step for each chunk of a row (see
    `bitblas.expr.slices`)::

        absmax[i, c]        = max_k in c  |A[i, k]|
        step[i, c]          = what the lowest digit counts
        activation[i, l, k] = digit l of A[i, k]
        matmul[c, i, l, n]  = Σ_q in c Σ_j  activation[i, l, 4 q + j] · byte j of decode[q, n]
                              (and accumulate joins the sums of the digits, times step[i, c])

    Where A is quantized on the fly, `activation` holds the whole numbers of `quantize.Quantizer`, and their scale multiplies a
    group's sum in accumulate, or, for the whole row, the sum of all in epilogue.

    Attributes
    ----------
    config : MatmulConfig
        The question.
    layout : PackedLayout
        Where the weights' bits lie.
    row_multiple, lane_multiple : int
        Rows, and blocks of 16 columns, are computed in multiples of these; what lies beyond M and N repeats the last row
        and column and is not stored.
    chunk : int
        How many consecutive k are summed in float32 before a group's scale, or the sum of chunks, takes over. Divides the
        group; where there is one group the last chunk may reach beyond K, with activations of 0.
    dot : str
        How integer products are summed: see `bitblas.schedule.Tiling`.
    slices : int
        Bytes into which an activation is cut for a `dot`; 0 where it is an int8 itself.
    split_k : int
        Parts of the chunks that are summed by themselves: accumulate[s, i, n] and its copy part[s, i, n], which threads can
        share out; join[i, n] sums them.
    chunk_multiple : int
        Chunks are counted in multiples of this: those beyond the last repeat it, and add nothing.
    threads : bool
        Whether each number is computed by a thread of its own, instead of by a lane: reductions of a row are not cut into
        sixteen lanes, `lane_multiple` counts columns, A is copied as it is (`held`), words of a row-wise bit stream
        are loaded whole (`words`), codebooks are tables (`codebook`), and rounding is the target's own.
    """

    config: MatmulConfig
    layout: PackedLayout
    row_multiple: int
    lane_multiple: int
    chunk: int
    dot: str = ""
    slices: int = 0
    split_k: int = 1
    chunk_multiple: int = 1
    threads: bool = False

    @property
    def sums_integers(self) -> bool:
        """Whether products are integers, and their sums over a chunk int32."""
        return self.dot in ("u8s8", "s8s8")

    @property
    def whole_words(self) -> bool:
        """Whether a chunk begins and ends with whole words."""
        return self.chunk % self.layout.unit == 0

    @property
    def padded_k(self) -> int:
        """K, rounded up to whole chunks."""
        return _round_up(self.config.K, self.chunk)

    @property
    def padded_n(self) -> int:
        """N, rounded up to whole tiles."""
        return _round_up(self.config.N, self.lane_multiple if self.threads else LANES * self.lane_multiple)

    @property
    def factors(self) -> Factors:
        """Its scales and zero points."""
        return Factors(self.config, self.padded_n, self.threads)

    @property
    def streams_words(self) -> bool:
        """Whether threads read a row-wise bit stream in words of 32 bits: rows and chunks begin and end with them."""
        packed = self.threads and self.layout.name == "packed" and self.padded_k == self.config.K
        return (
            packed
            and self.config.K % stream_period(self.layout.bits) == 0
            and self.chunk % stream_period(self.layout.bits) == 0
        )


def _round_up(value: Any, multiple: int) -> Any:
    return (value + multiple - 1) // multiple * multiple


def matmul_func(expr: MatmulExpr, name: str) -> tirx.PrimFunc:
    """Build the function (A, W, [scale], [zeros], [bias], out).

    Shapes and dtypes: A (m, K) `config.activation_dtype` with any m; W int8 (bytes of the layout,), or the same as int32 where
    `streams_words`; scale `config.scale_shape` and zeros (N, K/g) in `config.scale_dtype`, or zeros int8
    (K/g · ceil(N·b/8),) where packed;
    bias (N,) `config.bias_dtype`; out (m, N) out_dtype.
    """
    cfg = expr.config
    m = te.var("m")
    rows = _round_up(m, expr.row_multiple)
    A = te.placeholder((m, cfg.K), placed_dtype(cfg.activation_dtype, expr.threads), name="A")
    W = te.placeholder((expr.layout.num_bytes,), "int8", name="W")
    if expr.streams_words:  # the same bytes: a compiled operator does not look at dtypes
        W = te.placeholder((expr.layout.num_bytes // WORD_BYTES,), "int32", name="W")
    arguments = [A, W]

    quantized = quantizer(cfg, A, rows, expr.threads) if cfg.activation_groups else None
    given = _given(expr, A, quantized, rows)
    steps, activation = _sliced(expr, given, rows) if expr.slices else (None, _activation(expr, given, rows))
    multiply = _pair_products if expr.dot == "bf16" else _dots if expr.dot else _products
    partial = multiply(expr, W, activation, rows)
    scale = zero = None
    if cfg.with_scaling:
        S, scale = expr.factors.scale()
        arguments.append(S)
    if cfg.with_zeros:
        Z, zero = expr.factors.zero()
        arguments.append(Z)
    row_sum = None
    if needs_row_sum(cfg, expr.dot):
        row_sum = _row_sum(expr, given if expr.dot == "bf16" else activation, rows)
    bias = None
    if cfg.with_bias:
        bias = te.placeholder((cfg.N,), placed_dtype(cfg.bias_dtype, expr.threads), name="bias")
        arguments.append(bias)
    # what scales a whole row waits for the sum of all chunks; so does a column's scale where that sum is one of integers
    row_scale = quantized.scale if quantized is not None and cfg.activation_groups == 1 else None
    group_scale = quantized.scale if quantized is not None and cfg.activation_groups > 1 else None
    column_scale, scale = (scale, None) if cfg.integer_accumulation else (None, scale)
    accumulated = _accumulate(expr, rows, _Sums(partial, row_sum, steps, scale, zero, group_scale))

    def epilogue(i: Expr, n: Expr) -> Expr:
        factor = None if column_scale is None else column_scale[0, n]
        row_factor = None if row_scale is None else row_scale[i, 0]
        return finish(
            cfg,
            accumulated[i, n],
            factor,
            row_factor,
            None if bias is None else bias[n],
            expr.threads,
            as_bits=expr.threads,
        )

    out = te.compute((m, cfg.N), epilogue, name="epilogue")
    func = te.create_prim_func([*arguments, out])
    return func.with_attr({"global_symbol": name})


def _given(expr: MatmulExpr, A: te.Tensor, quantized: Quantizer | None, rows: Expr) -> Callable[[Expr, Expr], Expr]:
    """Elements of A: float32, or int8 where they are; rows beyond M repeat the last, k beyond K are 0."""
    cfg, dtype = expr.config, "int8" if expr.sums_integers and not expr.slices else "float32"
    fmt = parse_format(cfg.A_dtype)

    def element(i: Expr, k: Expr) -> Expr:
        return A[te.min(i, A.shape[0] - 1), k]

    def convert(found: Expr, i: Expr, k: Expr) -> Expr:
        if quantized is not None:
            return quantized.quantize(widen(found), i, k).astype(dtype)
        if fmt.kind == "float8":
            return decode_float8(fmt, found.astype("int32"), expr.threads)
        return found.astype(dtype) if dtype == "int8" else widen(found)

    def value(i: Expr, k: Expr) -> Expr:
        return convert(element(i, k), i, k)

    def padded(i: Expr, k: Expr) -> Expr:
        return tirx.Select(k < cfg.K, value(i, te.min(k, cfg.K - 1)), tirx.const(0, dtype))

    if not expr.threads:
        return value if expr.padded_k == cfg.K else padded

    def copied(i: Expr, k: Expr) -> Expr:
        if expr.padded_k == cfg.K:
            return element(i, k)
        return tirx.Select(k < cfg.K, element(i, te.min(k, cfg.K - 1)), tirx.const(0, A.dtype))

    held = te.compute((rows, expr.padded_k), copied, name="held")
    return lambda i, k: convert(held[i, k], i, k)


def _activation(expr: MatmulExpr, given: Callable[[Expr, Expr], Expr], rows: Expr) -> te.Tensor:
    """Block activation: float32 or int8, (rows, K), pairs of bfloat16, (rows, K / 2), or words of int8, (rows, K / 4)."""
    if expr.dot and expr.threads:
        return activation_words(expr.layout.bits, given, rows, expr.padded_k)
    if expr.dot != "bf16":
        return te.compute((rows, expr.padded_k), given, name="activation")

    def pair(i: Expr, p: Expr) -> Expr:
        k = p // PAIR * QUAD + p % PAIR
        return join_pair(given(i, k), given(i, k + PAIR))

    return te.compute((rows, expr.padded_k // PAIR), pair, name="activation")


def _sliced(expr: MatmulExpr, given: Callable[[Expr, Expr], Expr], rows: Expr) -> tuple[te.Tensor, te.Tensor]:
    """Blocks absmax_lanes, absmax, step, activation: steps, (rows, chunks), and digits, int8 (rows, slices, K)."""
    chunk, chunks, slices = expr.chunk, expr.padded_k // expr.chunk, expr.slices
    bits = absmax_bits(given, rows, chunks, chunk)
    steps = te.compute((rows, chunks), lambda i, c: step(bits[i, c], slices), name="step")
    digits = te.compute(
        (rows, slices, expr.padded_k),
        lambda i, at, k: digit(given(i, k), bits[i, k // chunk], at, slices),
        name="activation",
    )
    return steps, digits


def _products(expr: MatmulExpr, W: te.Tensor, activation: te.Tensor, rows: Expr) -> te.Tensor:
    """Blocks words*, unpack, decode, matmul: sums of float32 products over chunks, (chunks, rows, padded N)."""
    chunk, decoded = expr.chunk, _decoded(expr, W)
    kk = te.reduce_axis((0, chunk), name="kk")
    return te.compute(
        (expr.padded_k // chunk, rows, expr.padded_n),
        lambda c, i, n: te.sum(activation[i, c * chunk + kk] * decoded[c * chunk + kk, n], axis=kk),
        name="matmul",
    )


def _dots(expr: MatmulExpr, W: te.Tensor, activation: te.Tensor, rows: Expr) -> te.Tensor:
    """Blocks words*, decode, matmul: sums of int32 products over chunks, (chunks, rows[, slices], padded N)."""
    shape: tuple[Any, ...] = (expr.padded_k, expr.padded_n)
    if expr.threads:
        decoded = weight_words(expr.config.format, _stream_words(expr, W), shape)
        return dot_products(expr.chunk, activation, decoded, rows, shape)
    words = [_words(expr, W, index) for index in range(len(expr.layout.planes))]
    quads = te.compute(
        (expr.padded_k // QUAD, expr.padded_n),
        lambda q, n: quad(expr.config.format, expr.layout, expr.dot, words, q, n),
        name="decode",
    )
    chunk, per_chunk = expr.chunk, expr.chunk // QUAD
    q, j = te.reduce_axis((0, per_chunk), name="q"), te.reduce_axis((0, QUAD), name="j")

    def product(c: Expr, *row_and_n: Expr) -> Expr:
        *row, n = row_and_n
        a = activation[(*row, c * chunk + q * QUAD + j)].astype("int32")
        return te.sum(a * quad_byte(quads[c * per_chunk + q, n], j, expr.dot), axis=[q, j])

    shape = (expr.padded_k // chunk, *_row_shape(expr, rows), expr.padded_n)
    return te.compute(shape, product, name="matmul")


def _pair_products(expr: MatmulExpr, W: te.Tensor, activation: te.Tensor, rows: Expr) -> te.Tensor:
    """Blocks words*, unpack, decode, matmul: sums of bfloat16 products over chunks, float32 (chunks, rows, padded N)."""
    words = [_words(expr, W, index) for index in range(len(expr.layout.planes))]
    shape = (expr.padded_k // PAIR, expr.padded_n)
    unpacked = te.compute(shape, lambda p, n: pair_codes(expr.layout, words, p, n), name="unpack")
    pairs = te.compute(shape, lambda p, n: decode_pair(expr.config.format, unpacked[p, n]), name="decode")
    per_chunk = expr.chunk // PAIR
    p, j = te.reduce_axis((0, per_chunk), name="p"), te.reduce_axis((0, PAIR), name="j")

    def product(c: Expr, i: Expr, n: Expr) -> Expr:
        a, w = activation[i, c * per_chunk + p], pairs[c * per_chunk + p, n]
        return te.sum(half(a, j) * half(w, j), axis=[p, j])

    return te.compute((expr.padded_k // expr.chunk, rows, expr.padded_n), product, name="matmul")


def _row_shape(expr: MatmulExpr, rows: Expr) -> tuple[Any, ...]:
    """Rows of activations: each row, or each slice of each row."""
    return (rows, expr.slices) if expr.slices else (rows,)


def _decoded(expr: MatmulExpr, W: te.Tensor) -> te.Tensor:
    """Blocks words*, unpack, decode: (K, padded N) float32."""
    cfg, layout, fmt = expr.config, expr.layout, expr.config.format
    if expr.streams_words:
        stream = _stream_words(expr, W)
        unpacked = te.compute(
            (expr.padded_k, expr.padded_n), lambda k, n: word_code(stream, n, k, layout.bits), name="unpack"
        )
    elif layout.name == "packed":
        unpacked = te.compute(
            (expr.padded_k, expr.padded_n),
            lambda k, n: row_code(
                layout, W, expr.factors.column(n), te.min(k, cfg.K - 1) if expr.padded_k > cfg.K else k
            ),
            name="unpack",
        )
    elif layout.is_fragments:
        unpacked = te.compute(
            (expr.padded_k, expr.padded_n),
            lambda k, n: fragment_code(
                layout, W, expr.factors.column(n), te.min(k, cfg.K - 1) if expr.padded_k > cfg.K else k
            ),
            name="unpack",
        )
    else:
        words = [_words(expr, W, index) for index in range(len(layout.planes))]
        unpacked = te.compute(
            (expr.padded_k, expr.padded_n),
            lambda k, n: lane_code(layout, words, expr.whole_words, n, k),
            name="unpack",
        )
    decoder = thread_decoder(fmt) if expr.threads else lambda code: decode(fmt, code)
    return te.compute((expr.padded_k, expr.padded_n), lambda k, n: decoder(unpacked[k, n]), name="decode")


def _stream_words(expr: MatmulExpr, W: te.Tensor) -> te.Tensor:
    """Block words, of a row-wise bit stream."""
    layout = expr.layout
    return stream_words(W, expr.padded_n, layout.row_bytes // WORD_BYTES, layout.bits, lambda n: expr.factors.column(n))


def _words(expr: MatmulExpr, W: te.Tensor, index: int) -> te.Tensor:
    """Block words{index}: int32 words of one plane of the lane layout, (words along K, padded N).

    Where chunks of k do not end with a word, the first dimension is k itself: a chunk's words would not be an affine range.
    """
    cfg, plane = expr.config, expr.layout.planes[index]
    per_lane = cfg.K // plane.codes_per_word

    def word(u: Expr, n: Expr) -> Expr:
        block = n // LANES
        if expr.padded_n != cfg.N:
            block = te.min(block, cfg.N // LANES - 1)
        u = u if expr.whole_words else u // plane.codes_per_word
        if expr.padded_k != cfg.K:
            u = te.min(u, per_lane - 1)
        first = plane.offset + ((block * per_lane + u) * LANES + n % LANES) * plane.word_bytes
        return join_bytes([W[first + j] for j in range(plane.word_bytes)])

    words_along_k = expr.padded_k // (plane.codes_per_word if expr.whole_words else 1)
    return te.compute((words_along_k, expr.padded_n), word, name=f"words{index}")


def _row_sum(expr: MatmulExpr, activation: Callable[..., Expr], rows: Expr) -> te.Tensor:
    """Σ of a chunk of a row; over 16 lanes first, where it divides, because a float sum may not be reordered later."""
    chunk, chunks = expr.chunk, expr.padded_k // expr.chunk
    if expr.dot and expr.threads:
        return dot_row_sum(chunk, activation, rows, expr.padded_k)
    dtype, shape = "int32" if expr.sums_integers else "float32", _row_shape(expr, rows)
    if chunk % LANES or expr.threads:
        k = te.reduce_axis((0, chunk), name="k")
        return te.compute(
            (*shape, chunks),
            lambda *at: te.sum(activation(*at[:-1], at[-1] * chunk + k).astype(dtype), axis=k),
            name="row_sum",
        )
    j = te.reduce_axis((0, chunk // LANES), name="j")
    lanes = te.compute(
        (*shape, chunks, LANES),
        lambda *at: te.sum(activation(*at[:-2], at[-2] * chunk + j * LANES + at[-1]).astype(dtype), axis=j),
        name="row_sum_lanes",
    )
    lane = te.reduce_axis((0, LANES), name="lane")
    return te.compute((*shape, chunks), lambda *at: te.sum(lanes[(*at, lane)], axis=lane), name="row_sum")


@dataclass(frozen=True)
class _Sums:
    """What chunks are summed from: products, and what belongs to a row, or to a column, of a chunk."""

    partial: te.Tensor
    row_sum: te.Tensor | None
    steps: te.Tensor | None
    scale: te.Tensor | None
    zero: te.Tensor | None
    activation_scale: te.Tensor | None


def _accumulate(expr: MatmulExpr, rows: Expr, sums: _Sums) -> te.Tensor:
    """Sum the chunks of the reduction, each with the zero point and the scale of its group."""
    cfg, zero = expr.config, sums.zero
    groups = cfg.num_groups if cfg.is_grouped else 1
    chunks_per_group = expr.padded_k // groups // expr.chunk
    chunks = expr.padded_k // expr.chunk // expr.split_k
    padded_chunks = _round_up(chunks, expr.chunk_multiple)
    axis = te.reduce_axis((0, padded_chunks), name="c")
    dtype = cfg.sum_dtype
    total = _row_total(expr, rows, sums) if expr.slices and zero is not None else sums.row_sum

    def term(c: Expr, i: Expr, n: Expr) -> Expr:
        value, g = _chunk_sum(expr, sums, c, i, n).astype(dtype), c // chunks_per_group if groups > 1 else 0
        factor = None if sums.scale is None else sums.scale[g, n].astype(dtype)
        shift = None
        if zero is not None and total is not None:
            # a chunk's product fits into the dtype that its sum has
            exact = "int32" if expr.sums_integers else "float32"
            held = exact if cfg.integer_accumulation else dtype
            shift = (total[i, c].astype(held) * zero[g, n].astype(held)).astype(dtype)
        if shift is not None and factor is not None and cfg.zeros_mode == "rescale":
            value, factor = value * factor - shift, None
        elif shift is not None:
            value = value - shift
        if sums.activation_scale is not None:
            factor = times(factor, sums.activation_scale[i, g])
        return value if factor is None else value * factor

    def some_term(c: Expr, i: Expr, n: Expr) -> Expr:
        return tirx.Select(c < chunks, term(te.min(c, chunks - 1), i, n), tirx.const(0, dtype))

    shape = (rows, expr.padded_n)
    if expr.split_k == 1:
        found = term if padded_chunks == chunks else some_term
        return te.compute(shape, lambda i, n: te.sum(found(axis, i, n), axis=axis), name="accumulate")
    sums_of_parts = te.compute(
        (expr.split_k, *shape),
        lambda s, i, n: te.sum(term(s * chunks + axis, i, n), axis=axis),
        name="accumulate",
    )
    parts = te.compute((expr.split_k, *shape), lambda s, i, n: sums_of_parts[s, i, n], name="part")
    s = te.reduce_axis((0, expr.split_k), name="s")
    return te.compute(shape, lambda i, n: te.sum(parts[s, i, n], axis=s), name="join")


def _chunk_sum(expr: MatmulExpr, sums: _Sums, c: Expr, i: Expr, n: Expr) -> Expr:
    """The sum of a chunk's products, without what the bytes of a `dot` hold beyond the values of weights."""
    added = offset(expr.config.format, expr.dot) if expr.dot else 0

    def part(*row: Any) -> Expr:
        value = sums.partial[(c, *row, n)]
        return value - sums.row_sum[(*row, c)] * added if added and sums.row_sum is not None else value

    if sums.steps is None:
        return part(i)
    return join_slices([part(i, at) for at in range(expr.slices)]) * sums.steps[i, c]


def _row_total(expr: MatmulExpr, rows: Expr, sums: _Sums) -> te.Tensor:
    """Block row_total: the sum of a chunk of a row of sliced activations, float32 (rows, chunks)."""
    row_sum, steps = sums.row_sum, sums.steps
    assert row_sum is not None
    assert steps is not None

    def total(i: Expr, c: Expr) -> Expr:
        return join_slices([row_sum[i, at, c] for at in range(expr.slices)]) * steps[i, c]

    return te.compute((rows, expr.padded_k // expr.chunk), total, name="row_total")
