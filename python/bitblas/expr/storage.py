"""How operands lie in memory: the dtype of a placeholder, an element as a float32, and a result as it is stored."""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

from ..config import MatmulConfig


def placed_dtype(dtype: str, threads: bool) -> str:
    """The dtype of an operand's placeholder: threads take the bits of bfloat16, which older cards have no type for."""
    return "uint16" if threads and dtype == "bfloat16" else dtype


def is_bits(element: Expr) -> bool:
    """Whether an element of an operand is the bits of a bfloat16."""
    return str(element.dtype if hasattr(element, "dtype") else element.ty) == "uint16"  # of te and of tirx


def widen(element: Expr) -> Expr:
    """An element of an operand as float32."""
    if not is_bits(element):
        return element.astype("float32")
    return tirx.reinterpret("float32", tirx.shift_left(element.astype("uint32"), tirx.const(16, "uint32")))


def _bfloat16_bits(value: Expr) -> Expr:
    """The bits of a float32, rounded to nearest even; one NaN for all of them, which rounding might make infinite."""
    bits, one = tirx.reinterpret("uint32", value), tirx.const(1, "uint32")
    even = tirx.bitwise_and(tirx.shift_right(bits, tirx.const(16, "uint32")), one)
    rounded = tirx.shift_right(bits + tirx.const(0x7FFF, "uint32") + even, tirx.const(16, "uint32"))
    nan = tirx.bitwise_and(bits, tirx.const(0x7FFFFFFF, "uint32")) > tirx.const(0x7F800000, "uint32")
    return tirx.Select(nan, tirx.const(0x7FC0, "uint32"), rounded).astype("uint16")


def finish(
    cfg: MatmulConfig,
    value: Expr,
    scale: Expr | None,
    row_scale: Expr | None,
    bias: Expr | None,
    threads: bool = False,
    as_bits: bool = False,
) -> Expr:
    """An element of the output, of the sum of its products: with what scales its whole column and row, and its bias.

    With `as_bits`, a bfloat16 is its bits, uint16.
    """
    dtype = cfg.sum_dtype
    factor = None if scale is None else scale.astype(cfg.scaling_dtype)
    if row_scale is not None:
        factor = times(factor, row_scale)
    if factor is not None:
        dtype = cfg.scaling_dtype
        value = value.astype(dtype) * factor
    if bias is not None:
        if dtype in ("int32", "int64"):  # wide enough that the sum saturates instead of wrapping
            dtype = "int64" if cfg.bias_dtype == "int32" else cfg.scaling_dtype
        value = value.astype(dtype) + (widen(bias) if is_bits(bias) else bias).astype(dtype)
    return store_as(value, dtype, cfg.out_dtype, threads, as_bits)


def times(factor: Expr | None, other: Expr) -> Expr:
    """A product, of which the first factor may be missing."""
    return other if factor is None else factor * other


def store_as(value: Expr, dtype: str, out_dtype: str, threads: bool, as_bits: bool = False) -> Expr:
    """Convert the accumulated `value` of `dtype`.

    To integers it rounds to nearest, ties to even, and saturates; to floats a NaN stays one. float64 goes by way of float32,
    which every machine can round to 16 bits.
    """
    if dtype == "float64" and out_dtype in ("float16", "bfloat16"):
        value = value.astype("float32")
    if out_dtype == "bfloat16" and as_bits:
        return _bfloat16_bits(value.astype("float32"))
    if out_dtype == "bfloat16" and not threads:  # rounding a NaN whose bits are all ones would carry into the sign
        value = value.astype("float32")
        nan = tirx.reinterpret("float32", tirx.const(0x7FC00000, "int32"))
        return tirx.Select(tirx.isnan(value), nan, value).astype(out_dtype)
    if out_dtype not in ("int8", "int32") or dtype == out_dtype:
        return value.astype(out_dtype)
    low, high = (-128, 127) if out_dtype == "int8" else (-(2**31), 2**31 - 1)
    if dtype.startswith("int"):
        return te.max(te.min(value, tirx.const(high, dtype)), tirx.const(low, dtype)).astype(out_dtype)
    # in float64 both ends are exact
    rounded = tirx.nearbyint(value.astype("float64"))
    whole = te.max(te.min(rounded, tirx.const(float(high), "float64")), tirx.const(float(low), "float64"))
    return whole.astype("int32").astype(out_dtype)
