"""Squares of a register's width, transposed in registers. Importing this imports TVM."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr


def exchanged_lanes(distance: int, upper: bool, lanes: int) -> list[int]:
    """Of two registers whose rows are `distance` apart, the lanes that make the lower or upper one of the next step.

    Those at an even multiple of `distance` are the lower register's, the others the upper one's, which count from `lanes` on.
    """
    move = distance if upper else 0
    return [x + move if not x & distance else x + move - distance + lanes for x in range(lanes)]


def exchanged(low: Expr, high: Expr, distance: int, upper: bool, lanes: int) -> Expr:
    """See `exchanged_lanes`."""
    return tirx.Shuffle([low, high], [tirx.const(x, "int32") for x in exchanged_lanes(distance, upper, lanes)])


def transpose_function(lanes: int) -> str:
    """LLVM IR of ``bitblas_transpose(from, pitch, to, pitch)``: a square of words of 32 bits, with its lines a pitch apart.

    In log2(lanes) steps, each of which exchanges the halves, the quarters, and so on, of pairs of registers.
    """
    vector, lines = f"<{lanes} x i32>", []
    names = [f"%v{i}" for i in range(lanes)]
    for i, name in enumerate(names):
        lines += [
            f"  %i{i} = mul i64 %from_pitch, {i}",
            f"  %p{i} = getelementptr i32, ptr %from, i64 %i{i}",
            f"  {name} = load {vector}, ptr %p{i}, align 4",
        ]
    distance = lanes // 2
    while distance:
        names = _exchange(names, distance, lines)
        distance //= 2
    for i, name in enumerate(names):
        lines += [
            f"  %j{i} = mul i64 %to_pitch, {i}",
            f"  %q{i} = getelementptr i32, ptr %to, i64 %j{i}",
            f"  store {vector} {name}, ptr %q{i}, align 4",
        ]
    head = "define linkonce_odr hidden void @bitblas_transpose(ptr %from, i64 %from_pitch, ptr %to, i64 %to_pitch) alwaysinline"
    return "\n".join([f"{head} {{", *lines, "  ret void", "}", ""])


def _exchange(names: Sequence[str], distance: int, lines: list[str]) -> list[str]:
    lanes = len(names)
    for i in range(lanes):
        places = ", ".join(f"i32 {x}" for x in exchanged_lanes(distance, bool(i & distance), lanes))
        low, high = names[i & ~distance], names[i | distance]
        vector = f"<{lanes} x i32>"
        lines.append(f"  %t{distance}_{i} = shufflevector {vector} {low}, {vector} {high}, {vector} <{places}>")
    return [f"%t{distance}_{i}" for i in range(lanes)]
