"""Attention as it is defined: scores, their softmax, and the values that it weighs.

This is what the kernels have to compute, and not how: they look at some keys at a time, and hold no score for longer.
"""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

from ..config import FlashAttenConfig


def attention_func(config: FlashAttenConfig, name: str) -> tirx.PrimFunc:
    """The definition as a function of contiguous tensors.

    Blocks: `products` of queries and keys (batch, heads, seq_len, seq_len_kv); `scores`, scaled, -inf where a key is not
    seen; `maximum` of the keys of a query; `weight` = exp(score - maximum); `total`, their sum; `weighted`, the values
    times the weights; `out` = weighted / total, and 0 for a query that sees no key.

    Parameters
    ----------
    config : FlashAttenConfig
        What to compute; all sizes but `dim` and `dim_v` are symbolic.
    name : str
        The function's name.

    Returns
    -------
    tirx.PrimFunc
        Arguments Q, K, V, out: see `FlashAttenConfig`.
    """
    batch, heads, heads_kv, queries, keys = (
        te.var(size, "int64") for size in ("batch", "heads", "heads_kv", "seq_len", "seq_len_kv")
    )
    dim, dim_v = config.dim, config.dim_v
    k_shape = (batch, keys, heads_kv, dim) if config.layout == "nnn" else (batch, dim, heads_kv, keys)
    q = te.placeholder((batch, queries, heads, dim), config.Q_dtype, name="Q")
    k = te.placeholder(k_shape, config.K_dtype, name="K")
    v = te.placeholder((batch, keys, heads_kv, dim_v), config.V_dtype, name="V")
    group = tirx.floordiv(heads, heads_kv)
    square, row = (batch, heads, queries, keys), (batch, heads, queries)
    d = te.reduce_axis((0, dim), name="d")

    def product(b: Expr, h: Expr, i: Expr, j: Expr) -> Expr:
        head = tirx.floordiv(h, group)
        key = k[b, j, head, d] if config.layout == "nnn" else k[b, d, head, j]
        return te.sum(q[b, i, h, d].astype("float32") * key.astype("float32"), axis=d)

    products = te.compute(square, product, name="products")

    def score(b: Expr, h: Expr, i: Expr, j: Expr) -> Expr:
        value = products[b, h, i, j] * tirx.const(config.softmax_scale, "float32")
        if not config.is_causal:
            return value
        return tirx.Select(j <= i + (keys - queries), value, tirx.min_value("float32") - tirx.max_value("float32"))

    scores = te.compute(square, score, name="scores")
    j = te.reduce_axis((0, keys), name="j")
    maximum = te.compute(row, lambda b, h, i: te.max(scores[b, h, i, j], axis=j), name="maximum")
    weight = te.compute(square, lambda b, h, i, j: te.exp(scores[b, h, i, j] - maximum[b, h, i]), name="weight")
    n = te.reduce_axis((0, keys), name="n")
    total = te.compute(row, lambda b, h, i: te.sum(weight[b, h, i, n], axis=n), name="total")
    at = te.reduce_axis((0, keys), name="at")
    weighted = te.compute(
        (batch, queries, heads, dim_v),
        lambda b, i, h, e: te.sum(
            weight[b, h, i, at] * v[b, at, tirx.floordiv(h, group), e].astype("float32"), axis=at
        ),
        name="weighted",
    )
    out = te.compute(
        (batch, queries, heads, dim_v),
        lambda b, i, h, e: (
            weighted[b, i, h, e] / tirx.Select(total[b, h, i] > 0, total[b, h, i], tirx.const(1.0, "float32"))
        ).astype(config.Out_dtype),
        name="out",
    )
    return te.create_prim_func([q, k, v, out]).with_attr({"global_symbol": name})
