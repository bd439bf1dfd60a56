"""Float activations as sums of signed bytes, for instructions that multiply integers: the slices of the Ozaki scheme."""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

_INFINITY = 0x7F800000
#: A balanced digit of base 256 is a byte minus this.
_HALF = 128


def _int32(value: int) -> Expr:
    return tirx.const(value, "int32")


def _power(bits: Expr, slices: int) -> Expr:
    """The exponent field of the power of two below 1.005 times a positive float, given and returned as an int32.

    The magnitude is below 2 / 1.005 times that power, which is what balanced digits reach. The power is never so small that a
    step, or a step's reciprocal, would not be a normal number: activations that are all below 2^-104 lose precision.
    """
    grown = tirx.reinterpret("float32", bits) * tirx.const(1.005, "float32")
    return te.max(tirx.shift_right(tirx.reinterpret("int32", grown), _int32(23)), _int32(8 * slices - 1))


def _power_of_two(exponent: Expr) -> Expr:
    return tirx.reinterpret("float32", tirx.shift_left(exponent, _int32(23)))


def step(bits: Expr, slices: int) -> Expr:
    """What the lowest digit counts, float32, where `bits` are those of the largest magnitude; NaN where that is not finite."""
    nan = tirx.reinterpret("float32", _int32(0x7FC00000))
    found = _power_of_two(_power(bits, slices) - (8 * slices - 2))
    return tirx.Select(bits >= _int32(_INFINITY), nan, found)


def digit(value: Expr, bits: Expr, index: Expr, slices: int) -> Expr:
    """Digit number `index` of a float32, the lowest first, as int8: value = step · Σ digit · 256^index, to half a step.

    Where the largest magnitude is not finite it may be any.
    """
    scaled = value * _power_of_two(254 + (8 * slices - 2) - _power(bits, slices))
    bias = sum(_HALF << (8 * place) for place in range(slices))
    bias -= (bias >> 31) << 32  # it wraps around, as the sum does
    # TVM does not vectorize its own nearbyint
    whole = tirx.call_llvm_pure_intrin("float32", "llvm.nearbyint", scaled).astype("int32") + _int32(bias)
    byte = tirx.bitwise_and(tirx.shift_right(whole, index * 8), _int32(255))
    return (byte - _HALF).astype("int8")


def join_slices(parts: list[Expr]) -> Expr:
    """Σ part · 256^index in float32, of int32 `parts`, the lowest first."""
    total = parts[-1].astype("float32")
    for part in reversed(parts[:-1]):
        total = total * tirx.const(256.0, "float32") + part.astype("float32")
    return total
