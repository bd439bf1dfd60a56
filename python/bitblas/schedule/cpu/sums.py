"""Sums and maxima across the lanes of a register, as LLVM IR."""

from __future__ import annotations


def sum_functions(lanes: int) -> str:
    """LLVM IR of functions of vectors of float32.

    ``bitblas_add_lanes(from, to)`` adds up each of `lanes` vectors that lie one after the other, in log2(lanes) steps, each of
    which adds neighbours in pairs of registers; ``bitblas_largest(v)`` and ``bitblas_total(v)`` are of one vector.
    """
    vector, lines = f"<{lanes} x float>", []
    names = [f"%v{i}" for i in range(lanes)]
    for i, name in enumerate(names):
        lines += [
            f"  %p{i} = getelementptr float, ptr %from, i64 {i * lanes}",
            f"  {name} = load {vector}, ptr %p{i}, align 4",
        ]
    step = 0
    while len(names) > 1:
        pairs = zip(names[::2], names[1::2], strict=True)
        names = [_add_pair(f"{step}_{i}", low, high, lanes, lines) for i, (low, high) in enumerate(pairs)]
        step += 1
    lines.append(f"  store {vector} {names[0]}, ptr %to, align 4")
    add = "define linkonce_odr hidden void @bitblas_add_lanes(ptr %from, ptr %to) alwaysinline"
    kind = f"v{lanes}f32"
    return "\n".join(
        [
            *(f"{add} {{", *lines, "  ret void", "}"),
            f"declare float @llvm.vector.reduce.fmax.{kind}({vector})",
            f"declare float @llvm.vector.reduce.fadd.{kind}(float, {vector})",
            f"define linkonce_odr hidden float @bitblas_largest({vector} %v) alwaysinline {{",
            f"  %r = call float @llvm.vector.reduce.fmax.{kind}({vector} %v)",
            *("  ret float %r", "}"),
            f"define linkonce_odr hidden float @bitblas_total({vector} %v) alwaysinline {{",
            f"  %r = call reassoc float @llvm.vector.reduce.fadd.{kind}(float -0.0, {vector} %v)",
            *("  ret float %r", "}", ""),
        ]
    )


def _add_pair(name: str, low: str, high: str, lanes: int, lines: list[str]) -> str:
    """Neighbours of two registers, added: those of the first, then those of the second."""
    vector = f"<{lanes} x float>"
    for which in (0, 1):
        places = ", ".join(f"i32 {2 * x + which}" for x in range(lanes))
        lines.append(f"  %s{name}_{which} = shufflevector {vector} {low}, {vector} {high}, <{lanes} x i32> <{places}>")
    lines.append(f"  %a{name} = fadd {vector} %s{name}_0, %s{name}_1")
    return f"%a{name}"
