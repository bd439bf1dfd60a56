"""What is to be reached on a Hopper card, as rules over the cells of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bitblas.bench import Comparison

from .. import goals
from ..goals import Finding, Goal, Rule, over
from .cases import DENSE_CACHE, FP16, HEADLINE, SQUARES

#: 4-bit weights in groups of 128 beside float16; with zero points they are held to the same.
W4A16 = r"float16 x (int4 g128|uint4 g128 \+ zeros)"
#: The best that is published, at 4096 and at 16384, and the part of it that 16 rows keep.
BEST_SMALL, BEST_LARGE, KEPT = 2.4, 2.6, 0.95
LARGE = SQUARES[1:]


def over_variant(variant: str, peer: str) -> Callable[[Comparison], Finding]:
    """How many times as long a peer takes as a variant of ours."""

    def find(row: Comparison) -> Finding:
        own, other = row.timing(variant), row.timing(peer)
        if own is None or other is None or not own.seconds or not other.seconds:
            return Finding(None, f"no time of {variant if own is None or not own.seconds else peer}")
        return Finding(other.seconds / own.seconds, f"{other.seconds / own.seconds:.2f}×")

    return find


def _beside(group: str, rows: tuple[int, ...], least: float, shapes: tuple[tuple[int, int], ...]) -> Rule:
    return Rule(f"W4A16, {group}", W4A16, rows, least, f"≥ {least:.3g}× {FP16}", over(FP16), shapes)


RULES: tuple[Rule, ...] = (
    _beside("M=1", (1,), BEST_SMALL, (HEADLINE,)),
    _beside("M=1", (1,), BEST_LARGE, SQUARES[-1:]),
    _beside("M=16", (16,), KEPT * BEST_SMALL, (HEADLINE,)),
    _beside("M=16", (16,), KEPT * BEST_LARGE, SQUARES[-1:]),
    _beside("M=32", (32,), 2.0, LARGE),
    _beside("M=128", (128,), 0.97, SQUARES),
    _beside("M=256 to 1024", (256, 512, 1024), 0.85, SQUARES),
    _beside("M=4096", (4096,), 0.94, SQUARES),
    Rule(
        "W4A16, M=4096, dense_cache",
        W4A16,
        (4096,),
        0.97,
        f"≥ 0.97× {FP16}",
        over_variant(DENSE_CACHE, FP16),
        SQUARES,
    ),
    Rule("W2A8, M=1", "int8 x int2", (1,), 6.0, f"≥ 6× {FP16}", over(FP16), SQUARES[-1:]),
)


def judge(results: Iterable[tuple[str, Comparison]]) -> Iterator[Goal]:
    """Every rule on every cell that it speaks of, in the order of the rules."""
    return goals.judge(results, RULES)
