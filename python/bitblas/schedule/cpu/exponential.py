"""Powers of two of vectors, by a polynomial. Importing this imports TVM."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

#: By degree: coefficients of 2^f, ascending, for f in [-1/2, 1/2], of the least relative error, and that error.
COEFFICIENTS: dict[int, tuple[tuple[float, ...], float]] = {
    3: ((0.9999280729172343, 0.6932609864397807, 0.24261113279414462, 0.05517166876061115), 7.5e-5),
    4: (
        (0.9999992614376456, 0.6931218145594765, 0.24024744841444912, 0.05591786178211359, 0.009570101877584043),
        2.6e-6,
    ),
    5: (
        (
            1.000000071655301,
            0.6931469670628847,
            0.24022119720751497,
            0.05550713275065844,
            0.009675541502624101,
            0.0013276471959535355,
        ),
        7.5e-8,
    ),
}

#: Below it a result is 0: a polynomial that is a little below 1 would leave the normal numbers.
_LEAST = -125.0


def exp2(x: Expr, lanes: int, degree: int) -> Expr:
    """2^x in float32 vectors, for x <= 1; 0 below 2^-125, NaN for NaN.

    The relative error is that of the polynomial (`COEFFICIENTS`) and of two roundings.
    """
    dtype = f"float32x{lanes}"

    def vector(value: float) -> Expr:
        return tirx.Broadcast(tirx.const(value, "float32"), lanes)

    coefficients, _ = COEFFICIENTS[degree]
    whole = tirx.nearbyint(x)
    rest = x - whole
    value = vector(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * rest + vector(coefficient)
    exponent = tirx.shift_left(whole.astype(f"int32x{lanes}"), tirx.Broadcast(tirx.const(23, "int32"), lanes))
    power = tirx.reinterpret(dtype, tirx.reinterpret(f"int32x{lanes}", value) + exponent)
    return tirx.Select(x < vector(_LEAST), vector(0.0), power)
