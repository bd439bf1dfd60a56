"""Timing candidates in turns, A B A B, so that what disturbs the machine disturbs all of them; wrong results have no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from ..measuring import take_turn

#: Before a turn, so that threads of the one before, which spin while they wait for more work, have gone to sleep: the CPU time
#: of a process showed that onnxruntime's do so for 44 ms, those of OpenMP for 10, OpenVINO's for 1.
SETTLE_SECONDS = 0.06
#: Timed calls that every candidate gets at least, unless fewer take this many seconds.
MIN_CALLS, ENOUGH_SECONDS = 5, 5.0


@dataclass(frozen=True)
class Verdict:
    """What a check says of a result.

    Attributes
    ----------
    error : float
        Largest distance from the reference, over the root mean square of the reference.
    right : bool
        Whether that is as close as this way of computing must come.
    """

    error: float
    right: bool


@dataclass(frozen=True)
class Candidate:
    """Something to be timed.

    Attributes
    ----------
    name : str
        What it is called in results.
    call : callable
        Takes the number of the call, by which it chooses among its copies of the weights, and returns the result.
    check : callable
        Judges a result.
    computes : str
        The arithmetic: what activations and products are held in.
    exact : bool
        Whether activations are used as they are given, not quantized on the way.
    repeats : int
        How many times a call does the work.
    copies : int
        Through how many copies of the weights the numbers of calls lead.
    captured : bool
        Whether a card's calls are captured in a graph, where nothing that a call keeps serves the next one.
    """

    name: str
    call: Callable[[int], object]
    check: Callable[[object], Verdict]
    computes: str
    exact: bool = True
    repeats: int = 1
    copies: int = 1
    captured: bool = True


@dataclass(frozen=True)
class Timing:
    """How a candidate did.

    Attributes
    ----------
    name, computes, exact
        Of the candidate.
    seconds : float or None
        Median seconds of doing the work once; None where a result was wrong.
    fastest : float or None
        The least of them.
    calls : int
        Timed calls.
    error : float
        Of the worse of the results that were checked, the first and the last.
    """

    name: str
    computes: str
    exact: bool
    seconds: float | None
    fastest: float | None
    calls: int
    error: float

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


@dataclass
class _Run:
    """A candidate at work."""

    candidate: Candidate
    settle: Callable[[float], None]
    index: int = 0
    result: object = None
    seconds: list[float] = field(default_factory=list)

    def call(self) -> None:
        self.result = self.candidate.call(self.index)
        self.index += 1

    @property
    def has_enough(self) -> bool:
        """Whether it was called as often as a median needs."""
        return len(self.seconds) >= MIN_CALLS or sum(self.seconds) * self.candidate.repeats >= ENOUGH_SECONDS

    def turn(self, clock: Callable[[], float]) -> None:
        """Call for one turn. The first call pays for what the others did to caches and thread pools and is not counted."""
        self.settle(SETTLE_SECONDS)
        self.seconds += [seconds / self.candidate.repeats for seconds in take_turn(self.call, clock)[1:]]


def side_by_side(
    candidates: Sequence[Candidate],
    seconds: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[float], None] = time.sleep,
) -> list[Timing]:
    """Time candidates in turns.

    Parameters
    ----------
    candidates : sequence of Candidate
        In the order of their turns.
    seconds : float
        How long to measure, for each candidate; more where `MIN_CALLS` take longer.
    clock : callable
        Seconds since some moment.
    settle : callable
        Waits before a turn.

    Returns
    -------
    list of Timing
        In the same order. A candidate whose first or last result is wrong has no time.
    """
    runs = [_Run(candidate, settle) for candidate in candidates]
    first: list[Verdict] = []
    for run in runs:
        run.call()
        first.append(run.candidate.check(run.result))
    live = [run for run, verdict in zip(runs, first, strict=True) if verdict.right]
    deadline = clock() + seconds * len(live)
    while live and (clock() < deadline or not all(run.has_enough for run in live)):
        for run in live:
            run.turn(clock)
    return [_timing(run, verdict) for run, verdict in zip(runs, first, strict=True)]


def _timing(run: _Run, first: Verdict) -> Timing:
    candidate, last = run.candidate, first
    if run.seconds:
        last = candidate.check(run.result)
    right = first.right and last.right
    return Timing(
        name=candidate.name,
        computes=candidate.computes,
        exact=candidate.exact,
        seconds=statistics.median(run.seconds) if right else None,
        fastest=min(run.seconds) if right else None,
        calls=len(run.seconds),
        error=max(first.error, last.error),
    )
