"""Squares of a register's width, transposed in registers. Importing this imports TVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr


def exchanged(low: Expr, high: Expr, distance: int, upper: bool, lanes: int) -> Expr:
    """Of two registers whose rows are `distance` apart, the lower or upper one of the next step.

    Its lanes at an even multiple of `distance` are the lower register's, the others the upper one's.
    """
    move = distance if upper else 0
    places = [x + move if not x & distance else x + move - distance + lanes for x in range(lanes)]
    return tirx.Shuffle([low, high], [tirx.const(x, "int32") for x in places])


def transposed(rows: Sequence[Expr], lanes: int, bind: Callable[[Expr], Expr]) -> list[Expr]:
    """`lanes` vectors of `lanes` elements -> vector i of the elements i of all.

    In log2(lanes) steps, each of which exchanges the halves, the quarters, and so on, of pairs of registers; `bind` names an
    expression that is used twice.
    """
    found, distance = list(rows), lanes // 2
    while distance:
        found = [
            bind(exchanged(found[i & ~distance], found[i | distance], distance, bool(i & distance), lanes))
            for i in range(lanes)
        ]
        distance //= 2
    return found
