"""Powers of two of vectors, by a polynomial. Importing this imports TVM."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

#: By degree: coefficients of 2^f, ascending, for f in [-1/2, 1/2], of the least relative error, and that error. Degree 6
#: gives exactly 1 for 0, and its values in float32 are wrong by at most 1.1e-7.
COEFFICIENTS: dict[int, tuple[tuple[float, ...], float]] = {
    3: ((0.9999280729172343, 0.6932609864397807, 0.24261113279414462, 0.05517166876061115), 7.5e-5),
    6: (
        (
            1.0,
            0.6931472028551099,
            0.24022647913626408,
            0.05550332471010917,
            0.009618437357670014,
            0.0013398874465294563,
            0.00015353362017709384,
        ),
        2.0e-9,
    ),
}

#: That of powers which stay in float32.
FULL_DEGREE = 6

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
