"""The largest magnitudes of rows of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.ir import Expr

from ..layout import LANES


def absmax_bits(
    value: Callable[[Expr, Expr], Expr], rows: Any, parts: int, size: int, threads: bool = False
) -> te.Tensor:
    """Blocks absmax_lanes, absmax: the bits of the largest magnitude in each part of a row, int32 (rows, parts).

    Without their sign the bits of float32 are ordered as the numbers are, infinity and NaN above all.

    Parameters
    ----------
    value : callable
        (row, k) -> float32.
    rows : Expr
        How many rows there are.
    parts, size : int
        Parts of a row, and consecutive k in each.
    threads : bool
        Whether threads share out a part as they like: it is not reduced to sixteen lanes first, and the bits are uint32.
    """
    dtype = "uint32" if threads else "int32"

    def bits(i: Expr, k: Expr) -> Expr:
        return tirx.bitwise_and(tirx.reinterpret(dtype, value(i, k)), tirx.const(0x7FFFFFFF, dtype))

    if size % LANES or threads:
        k = te.reduce_axis((0, size), name="k")
        return te.compute((rows, parts), lambda i, c: te.max(bits(i, c * size + k), axis=k), name="absmax")
    j = te.reduce_axis((0, size // LANES), name="j")
    lanes = te.compute(
        (rows, parts, LANES),
        lambda i, c, at: te.max(bits(i, c * size + j * LANES + at), axis=j),
        name="absmax_lanes",
    )
    lane = te.reduce_axis((0, LANES), name="lane")
    return te.compute((rows, parts), lambda i, c: te.max(lanes[i, c, lane], axis=lane), name="absmax")
