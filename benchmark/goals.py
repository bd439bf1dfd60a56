"""What releases are to reach, as rules over the cells of a run, each with pass or fail."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from bitblas.bench import Comparison

from . import cases

TORCH, BF16 = "torch float32", "torch bfloat16"
ORT, OPENVINO = "onnxruntime MatMulNBits 0", "OpenVINO"
#: Those that multiply int8, by the start of their names; ggml's types are one library.
INT8_PEERS = ("onnxruntime MatMulNBits 4", "OpenVINO dynamic", "ggml", "torch _int_mm")


@dataclass(frozen=True)
class Goal:
    """One goal in one cell; `passed` is None where it could not be measured.

    Attributes
    ----------
    name, asked, measured : str
        The cell, what is to be reached, and what was.
    passed : bool or None
        Whether it is.
    group : str
        The goal, of which this is one cell; empty where it stands for itself.
    margin : float or None
        What was measured over what was asked, so that 1 and more passes.
    """

    name: str
    asked: str
    measured: str
    passed: bool | None
    group: str = ""
    margin: float | None = None

    @property
    def verdict(self) -> str:
        """In a word."""
        return {True: "pass", False: "**fail**", None: "not measured"}[self.passed]


@dataclass(frozen=True)
class Finding:
    """What a rule finds in a cell.

    Attributes
    ----------
    value : float or None
        The number that is compared with the limit; None where it was not measured.
    text : str
        The number and what it is of, or why there is none.
    complete : bool
        Whether all that it depends on was measured: else it can fail, but not pass.
    most : float
        What the number could be at most, if ours took no longer than what binds it takes.
    """

    value: float | None
    text: str
    complete: bool = True
    most: float = math.inf


def over(*peers: str) -> Callable[[Comparison], Finding]:
    """How many times as long the fastest of some peers, or families of them, takes.

    A peer that is not installed, or was not asked, might have been the fastest; one that does not serve the cell, or computes
    it wrong, is none.
    """

    def find(row: Comparison) -> Finding:
        speeds = {}
        for timing in row.timings[1:]:
            speed = row.speedup(timing.name)
            if speed is not None and any(_is_of(timing.name, peer) for peer in peers):
                speeds[timing.name] = speed
        away = [peer for peer in peers if not _is_known(row, peer)]
        if not speeds:
            return Finding(None, f"no time of {' or '.join(away)}" if away else "no peer serves it")
        name = min(speeds, key=lambda name: speeds[name])
        text = f"{speeds[name]:.2f}×" + (f" {name}" if len(peers) > 1 else "")
        bound = row.roofline()
        most = speeds[name] / bound[1] if bound else math.inf
        return Finding(speeds[name], text + (f", without {', '.join(away)}" if away else ""), not away, most)

    return find


def _is_of(name: str, peer: str) -> bool:
    """Whether a name is a peer's, or one of a family in `INT8_PEERS`."""
    return name == peer or (peer in INT8_PEERS and name.startswith(peer))


def _is_known(row: Comparison, peer: str) -> bool:
    """Whether a peer, or one of a family, took part or does not serve the cell."""
    skipped = [each for each in row.skipped if _is_of(each.name, peer)]
    if any(each.missing for each in skipped):
        return False
    return bool(skipped) or any(_is_of(timing.name, peer) for timing in row.timings[1:])


def of_roofline(row: Comparison) -> Finding:
    """The part of what binds the kernel: bandwidth, decoding or its unit."""
    found = row.roofline()
    if found is None or (row.m == 1 and "bandwidth" not in row.ceilings):
        return Finding(None, "no ceilings were measured")
    complete = row.m != 1 or any(name.startswith("decode") for name in row.ceilings)
    return Finding(found[1], f"{found[1]:.0%} of {found[0]}" + ("" if complete else ", no decode loop"), complete)


def of_peak(unit: str) -> Callable[[Comparison], Finding]:
    """The part of a unit's peak that the problem's multiply-accumulates reach, whatever unit does them."""

    def find(row: Comparison) -> Finding:
        part = row.peak_fraction(unit)
        if part is None:
            return Finding(None, f"no {unit} peak was measured")
        text = f"{part:.0%} of {unit}"
        return Finding(part, text + (f", by {row.unit}" if row.unit != unit else ""))

    return find


def not_above(variant: str, both_ways: bool = False) -> Callable[[Comparison], Finding]:
    """The time of a variant over ours: 1 where they cost the same; with `both_ways` the lesser of that and its inverse."""

    def find(row: Comparison) -> Finding:
        ratio = row.speedup(variant)
        if ratio is None:
            return Finding(None, f"no time of {variant}")
        value = min(ratio, 1 / ratio) if both_ways else ratio
        return Finding(value, f"{1 / ratio:.2f} times as long as {variant}")

    return find


def torch_of_its_dtype(row: Comparison) -> Finding:
    """torch's linear on weights of the activations' dtype."""
    return over(f"torch {row.workload['A_dtype']}")(row)


@dataclass(frozen=True)
class Rule:
    """A goal for some cells.

    Attributes
    ----------
    group : str
        What it says.
    names : str
        A pattern for the whole name of the case.
    rows : tuple of int
        For these numbers of rows; empty: for all.
    least : float
        What `find` must at least give.
    asked : str
        The same in words.
    find : callable
        Measures a cell.
    shapes : tuple of (int, int)
        For these N and K.
    """

    group: str
    names: str
    rows: tuple[int, ...]
    least: float
    asked: str
    find: Callable[[Comparison], Finding]
    shapes: tuple[tuple[int, int], ...] = field(default=(cases.HEADLINE,))

    def applies(self, name: str, shape: tuple[int, int], m: int) -> bool:
        """Whether it says anything about a cell."""
        return bool(re.fullmatch(self.names, name)) and shape in self.shapes and (not self.rows or m in self.rows)

    def judge(self, name: str, row: Comparison) -> Goal:
        """The verdict on a cell."""
        place = f"{name}, {row.workload['N']} × {row.workload['K']}, M={row.m}"
        if row.ours.seconds is None:
            return Goal(place, self.asked, f"wrong result, off by {row.ours.error:.2g}", False, self.group, 0.0)
        found = self.find(row)
        if found.value is None:
            return Goal(place, self.asked, found.text, None, self.group)
        passed = found.value >= self.least and (found.complete or None)
        text = found.text + (f", {found.most:.2f} at its limit" if found.most < self.least else "")
        return Goal(place, self.asked, text, passed, self.group, found.value / self.least)


UINT4 = r"float(16|32) x uint4 g128 \+ zeros"
EXACT, INTEGERS = r"float16 x uint4 g128 \+ zeros", r"int8 x int[42]"
NARROW = r"float16 x (u?int[123]|nf4|fp4_e2m1) g128"
#: Neither one of the headline case nor int8: what has goals of its own.
OTHERS = rf"(?!{UINT4}|bfloat16 x uint4|int8 x u?int[24]).*(?<! on haswell)"
_MANY = (64, 128, 512, 2048)
_SOME = (16, 32, 64, 128, 512)

RULES: tuple[Rule, ...] = (
    # the first releases
    Rule("uint4 beside torch", UINT4, (1,), 5.0, f"≥ 5× {TORCH}", over(TORCH)),
    Rule("uint4 beside torch", UINT4, (16,), 1.5, f"≥ 1.5× {TORCH}", over(TORCH)),
    Rule("uint4 beside torch", UINT4, (128, 512), 1.0, f"≥ 1× {TORCH}", over(TORCH)),
    Rule("uint4 beside onnxruntime", r"float32 x uint4 g128 \+ zeros", (1,), 2.5, f"≥ 2.5× {ORT}", over(ORT)),
    Rule("other formats beside torch", OTHERS, (1,), 1.0, f"≥ 1× {TORCH}", over(TORCH)),
    Rule("other formats beside torch", OTHERS, (128,), 0.5, f"≥ 0.5× {TORCH}", over(TORCH)),
    Rule("AVX2 alone", f"{UINT4} on haswell", (1,), 2.0, f"≥ 2× {TORCH}", over(TORCH)),
    Rule("AVX2 alone", f"{UINT4} on haswell", (128,), 0.8, f"≥ 0.8× {TORCH}", over(TORCH)),
    Rule("int8 × int8", "int8 x int8", _SOME, 1.0, "≥ 1× torch _int_mm", over("torch _int_mm")),
    # exact activations
    Rule("exact uint4, M=1: roofline", EXACT, (1,), 0.85, "≥ 85 % of what binds", of_roofline, cases.SHAPES),
    Rule("exact uint4, M=1: onnxruntime", EXACT, (1,), 2.5, f"≥ 2.5× {ORT}", over(ORT), cases.SHAPES),
    Rule("exact uint4, M ≥ 16: peak", EXACT, _SOME, 0.85, "≥ 85 % of the FMA peak", of_peak("fma"), cases.SHAPES),
    Rule("exact uint4, M ≥ 16: torch", EXACT, _SOME, 1.3, f"≥ 1.3× {TORCH}", over(TORCH), cases.SHAPES),
    Rule("exact uint4, M ≥ 16: OpenVINO", EXACT, _SOME, 1.15, f"≥ 1.15× {OPENVINO}", over(OPENVINO), cases.SHAPES),
    Rule("bfloat16 × uint4", r"bfloat16 x uint4 g128 \+ zeros", (), 1.0, f"≥ 1× {BF16}", over(BF16), cases.SHAPES),
    Rule(
        "float16 as fast as float32",
        EXACT,
        (),
        1 / 1.05,
        "within 5 %",
        not_above(cases.FLOAT32_VARIANT, both_ways=True),
    ),
    Rule("1 to 3 bits, nf4, fp4, M=1: roofline", NARROW, (1,), 0.8, "≥ 80 % of what binds", of_roofline, cases.SHAPES),
    Rule(
        "small layers",
        r"(float16|bfloat16|float32) x uint4 g128 \+ zeros",
        (),
        1.0,
        "≥ 1× torch of the same dtype",
        torch_of_its_dtype,
        cases.SMALL_SHAPES,
    ),
    # int8 activations
    Rule(
        "int8 × 4 and 2 bits, M ≥ 64: peak",
        INTEGERS,
        _MANY,
        0.85,
        "≥ 85 % of the VNNI peak",
        of_peak("int8"),
        cases.SHAPES,
    ),
    Rule("int8 × 4 and 2 bits, M ≥ 64: best peer", INTEGERS, _MANY, 2.0, "≥ 2×", over(*INT8_PEERS), cases.SHAPES),
    Rule(
        "int8 × 4 and 2 bits, M < 64: best peer",
        INTEGERS,
        (1, 2, 4, 8, 16, 32),
        1.3,
        "≥ 1.3×",
        over(*INT8_PEERS),
        cases.SHAPES,
    ),
    Rule("scales in groups, int8 × int4", "int8 x int4 g128", (), 1 / 1.1, "≤ 10 %", not_above(cases.PLAIN_VARIANT)),
)


def judge(results: Iterable[tuple[str, Comparison]], rules: Iterable[Rule] = RULES) -> Iterator[Goal]:
    """Every rule on every cell that it speaks of, in the order of the rules."""
    kept = list(results)
    for rule in rules:
        for name, row in kept:
            if rule.applies(name, shape_of(row), row.m):
                yield rule.judge(name, row)


def shape_of(row: Comparison) -> tuple[int, int]:
    """N and K of a cell."""
    return int(str(row.workload["N"])), int(str(row.workload["K"]))


def concerned(found: Iterable[cases.Case]) -> list[cases.Case]:
    """The cases with the rows that a rule speaks of."""
    kept = []
    for each in found:
        rows = tuple(m for m in each.rows if any(rule.applies(each.name, each.shape, m) for rule in RULES))
        if rows:
            kept.append(replace(each, rows=rows))
    return kept
