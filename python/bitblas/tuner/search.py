"""Candidates -> build -> measure -> choose, bucket by bucket, within a time; what builds and what measures is handed in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..config import Config
from ..errors import BuildError, RemoteError
from ..logs import get_logger, progress
from ..plan import AnyPlan, make_plan
from ..schedule import RULES, Tiling, rank, select_rule
from ..target import Target
from . import SECONDS

#: Rounds that a choice other than the default takes at least, and rounds of a race at most.
MIN_ROUNDS, MAX_ROUNDS = 6, 12
#: Rounds after which a candidate leaves that is not faster than the default: that takes less than this part of its time.
PATIENCE_ROUNDS, _FASTER = 3, 0.999
#: A choice must be faster than the default by this much, and by this many standard errors of the median. Of equal tilings
#: whose times wander by 15 %, and one time in ten by 900 %, a race then takes another than the default once in a hundred.
MIN_GAIN, STANDARD_ERRORS = 0.01, 4.0
#: Noise below which more rounds are not worth their time.
FINE_NOISE = 0.02
#: How much slower than the best a candidate may be after the first round, the second, …; the last is for the rest.
LAGS = (1.25, 1.12, 1.06, 1.03)
#: The part of the time that is left which building may take.
BUILD_PART = 0.6
#: The part of a bucket's time in which candidates enter its race; the rest is for those that stay.
ENTRY_PART = 0.6


class LostError(Exception):
    """A candidate that cannot be built or run: it loses itself, and not the search."""


class Workbench(Protocol):
    """Builds candidates, each a plan of one kernel, and runs them."""

    def build(self, plans: Sequence[AnyPlan], go_on: Callable[[], bool]) -> Iterator[tuple[AnyPlan, str]]:
        """Build plans, several at once where that can be; yields each with what went wrong, or nothing.

        Where `go_on` is False no further one is begun, and those that were not are not yielded.
        """

    def turn(self, plan: AnyPlan, m: int, like: AnyPlan | None) -> list[float]:
        """Seconds of some calls with `m` rows, the first of which may be slower than the others for want of caches.

        The result must be that of `like`. Raises LostError.
        """


@dataclass(frozen=True)
class TunedBucket:
    """The outcome for one bucket.

    Attributes
    ----------
    tiling : Tiling
        The choice.
    seconds : tuple of (Tiling, float)
        Median seconds of a call of every candidate that was measured, the default first.
    default : Tiling or None
        What would be used without tuning.
    gain : float
        How many times as long the default takes, the median of the rounds; 1 where it is the choice.
    noise : float
        How far from 1 `gain` must be to count.
    rounds : int
        Rounds of the race.
    lost : tuple of (Tiling, str)
        Candidates that could not be built or run, and why.
    """

    tiling: Tiling
    seconds: tuple[tuple[Tiling, float], ...]
    default: Tiling | None = None
    gain: float = 1.0
    noise: float = 0.0
    rounds: int = 0
    lost: tuple[tuple[Tiling, str], ...] = ()

    def time_of(self, tiling: Tiling | None) -> float | None:
        """Median seconds of a candidate, where it was measured."""
        return dict(self.seconds).get(tiling) if tiling is not None else None

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "tiling": self.tiling.fields(),
            "default": None if self.default is None else self.default.fields(),
            "gain": self.gain,
            "noise": self.noise,
            "rounds": self.rounds,
            "candidates": [{"tiling": tiling.fields(), "seconds": seconds} for tiling, seconds in self.seconds],
            "lost": [{"tiling": tiling.fields(), "error": error} for tiling, error in self.lost],
        }


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes
    ----------
    buckets : dict of int to TunedBucket
        What was found; buckets that are not there keep their default.
    ended : str
        Why it ended before all buckets were measured; empty where it did not.
    seconds : float
        How long it took.
    interrupted : bool
        Whether it was Ctrl-C that ended it.
    """

    buckets: dict[int, TunedBucket]
    ended: str
    seconds: float
    interrupted: bool = False


def candidates(config: Config, target: Target, topk: int) -> dict[int, list[AnyPlan]]:
    """The likely `topk` tilings of each bucket's rule, each as a plan of one kernel: the default first, then the cheapest.

    Buckets share a plan where they share a tiling, as they will in the operator: it is for the largest of them.
    """
    usual = make_plan(config, target)
    offers: dict[int, list[tuple[str, Tiling]]] = {}
    largest: dict[tuple[str, Tiling], int] = {}
    for m in usual.config.buckets:
        problem = usual.problem_of(m)
        rule = select_rule(RULES, problem)
        offers[m] = [(rule.name, tiling) for tiling in rank(problem, rule.tilings(problem))[: max(1, topk)]]
        largest.update(dict.fromkeys(offers[m], m))
    plans = {key: make_plan(config.for_bucket(m), target, {m: key[1]}) for key, m in largest.items()}
    return {m: [plans[key] for key in keys] for m, keys in offers.items()}


def tiling_of(plan: AnyPlan) -> Tiling:
    """The tiling of a candidate."""
    return plan.kernels[0].tiling


@dataclass
class Race:
    """Candidates of one bucket, measured in rounds that all of them take part in, the slower half leaving after each.

    Attributes
    ----------
    m : int
        Rows.
    default : AnyPlan
        What a challenger must beat.
    turn : callable
        Measures a candidate: see `Workbench.turn`.
    lost : callable
        Told of a candidate that failed, and why.
    """

    m: int
    default: AnyPlan
    turn: Callable[[AnyPlan, int, AnyPlan | None], list[float]]
    lost: Callable[[AnyPlan, str], None]
    live: list[AnyPlan] = field(default_factory=list)
    times: dict[AnyPlan, list[float]] = field(default_factory=dict)
    rounds: int = 0

    def run(
        self,
        entrants: Sequence[AnyPlan],
        enter: Callable[[], bool],
        go_on: Callable[[], bool],
        step: Callable[[], None],
    ) -> None:
        """Race until there is nothing left to learn, or no time to learn it in.

        Where `enter` is False no further entrant takes its first turn; `step` is called for each.
        """
        self.live = list(entrants)
        for plan in entrants:
            if self.times and not enter():  # what was not reached has no time
                self.live = [one for one in self.live if one in self.times]
                break
            step()
            self._measure(plan)
        self.rounds = 1
        self._drop()
        while self._open(go_on):
            first = self.rounds % len(self.live)
            for plan in self.live[first:] + self.live[:first]:
                self._measure(plan)
            self.rounds += 1
            self._drop()
            if not go_on():
                self._drop(most=1)

    def _measure(self, plan: AnyPlan) -> None:
        like = next((one for one in [self.default, *self.times] if one in self.times and one != plan), None)
        try:
            taken = self.turn(plan, self.m, like)
        except LostError as error:
            self.live.remove(plan)
            self.times.pop(plan, None)
            self.lost(plan, str(error))
        else:
            self.times.setdefault(plan, []).append(statistics.median(taken[1:] or taken))

    def _open(self, go_on: Callable[[], bool]) -> bool:
        challengers = [plan for plan in self.live if plan != self.default]
        if not challengers or self.rounds >= MAX_ROUNDS or (self.default not in self.live and len(self.live) < 2):
            return False
        if self.rounds < MIN_ROUNDS:
            return True
        gain, noise = self.compare(min(challengers, key=self.score))
        undecided = noise > FINE_NOISE and 1 < gain <= 1 + 2 * noise
        return go_on() and (len(challengers) > 1 or undecided)

    def _drop(self, most: int | None = None) -> None:
        """Let the slower half of the challengers go, and whoever lags behind the best."""
        challengers = sorted((plan for plan in self.live if plan != self.default), key=self.score)
        keep = most or max(1, -(-len(challengers) // 2))
        allowed = LAGS[min(self.rounds, len(LAGS)) - 1] * min((self.score(plan) for plan in self.live), default=1.0)
        if self.default in self.live and self.rounds >= PATIENCE_ROUNDS:
            allowed = min(allowed, _FASTER)
        kept = [plan for plan in challengers[:keep] if self.score(plan) <= allowed]
        self.live = [plan for plan in self.live if plan == self.default or plan in kept]

    def score(self, plan: AnyPlan) -> float:
        """A candidate's time as a part of the default's, the median of the rounds; seconds where the default has none."""
        return statistics.median(own / other for own, other in self._pairs(plan))

    def _pairs(self, plan: AnyPlan) -> list[tuple[float, float]]:
        """The times of a candidate and the default in the rounds that both took part in: what disturbs one disturbs both."""
        own = self.times[plan]
        return list(zip(own, self.times.get(self.default, [1.0] * len(own)), strict=False))

    def compare(self, plan: AnyPlan) -> tuple[float, float]:
        """How many times as long the default takes, and how far from 1 that must be to count."""
        if plan == self.default or self.default not in self.times:
            return 1.0, 0.0
        ratios = [other / own for own, other in self._pairs(plan)]
        gain = statistics.median(ratios)
        deviation = 1.4826 * statistics.median(abs(ratio - gain) for ratio in ratios)
        return gain, MIN_GAIN + STANDARD_ERRORS * 1.2533 * deviation / len(ratios) ** 0.5

    def best(self) -> AnyPlan:
        """The fastest of those that stayed."""
        return min((plan for plan in self.live if plan in self.times), key=self.score)

    def outcome(self, lost: Mapping[AnyPlan, str]) -> TunedBucket | None:
        """What the rounds so far say: the default unless another is clearly faster; None where nothing was measured."""
        if not any(plan in self.times for plan in self.live):
            return None
        best = self.best()
        gain, noise = self.compare(best)
        if self.default in self.times and (self.rounds < MIN_ROUNDS or gain <= 1 + noise):
            best, gain = self.default, 1.0
        return TunedBucket(
            tiling=tiling_of(best),
            seconds=tuple(
                (tiling_of(plan), statistics.median(self.times[plan]))
                for plan in sorted(self.times, key=lambda plan: plan != self.default)
            ),
            default=tiling_of(self.default),
            gain=gain,
            noise=noise,
            rounds=self.rounds,
            lost=tuple((tiling_of(plan), error) for plan, error in lost.items()),
        )


class _Search:
    """A search at work."""

    def __init__(self, bench: Workbench, clock: Callable[[], float], seconds: float) -> None:
        self.bench, self.clock = bench, clock
        self.began = clock()
        self.deadline = self.began + seconds
        self.built: set[AnyPlan] = set()
        self.lost: dict[AnyPlan, str] = {}  # for every bucket
        self.race: Race | None = None
        self.lost_here: dict[AnyPlan, str] = {}

    def bucket(self, m: int, plans: list[AnyPlan], buckets_left: int, step: Callable[[str], None]) -> TunedBucket:
        """Build what is not there yet, and race."""
        self.race, self.lost_here = None, {plan: self.lost[plan] for plan in plans if plan in self.lost}
        missing = [plan for plan in plans if plan not in self.built and plan not in self.lost]
        until = self.clock() + BUILD_PART * max(0.0, self.deadline - self.clock())
        for plan, error in self.bench.build(missing, lambda: self.clock() < until):
            step(f"building for m={m}")
            if error:
                self.lost[plan] = error
                self._lose(m, plan, error)
            else:
                self.built.add(plan)
        entrants = [plan for plan in plans if plan in self.built and plan not in self.lost]
        self.race = Race(m, plans[0], self.bench.turn, lambda plan, error: self._lose(m, plan, error))
        now = self.clock()
        share = max(0.0, self.deadline - now) / buckets_left
        self.race.run(
            entrants,
            enter=lambda: self.clock() < now + ENTRY_PART * share,
            go_on=lambda: self.clock() < now + share,
            step=lambda: step(f"m={m}"),
        )
        found = self.race.outcome(self.lost_here)
        if found is None:
            reasons = "\n".join(dict.fromkeys(self.lost_here.values()))
            raise BuildError(f"tuning: none of {len(plans)} tilings for m={m} could be built and run", output=reasons)
        return found

    def _lose(self, m: int, plan: AnyPlan, error: str) -> None:
        self.lost_here[plan] = error
        get_logger().warning("tuning lost %s for m=%d: %s", tiling_of(plan), m, error)

    def cut_short(self) -> TunedBucket | None:
        """What is known of the bucket that was being measured when something came between: nothing without its default."""
        if self.race is None or self.race.default not in self.race.times:
            return None
        return self.race.outcome(self.lost_here)


def tune(
    config: Config,
    target: Target,
    topk: int,
    bench: Workbench,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    keep: Callable[[Mapping[int, TunedBucket]], None] = lambda found: None,
) -> Tuned:
    """Race the likely tilings of each bucket's rule, and choose another than the default where it is clearly faster.

    Parameters
    ----------
    config, target : Config, Target
        What to tune.
    topk : int
        Candidates of a bucket, at least 1.
    bench : Workbench
        Builds and measures.
    seconds : float
        How long to take, about: the buckets share it, small m first, and what one leaves over serves the next ones. A
        bucket that the time does not reach keeps its default; the first is always measured.
    clock : callable
        Seconds since some moment.
    keep : callable
        Given all that was found when the search ends, also when it ends by an exception, and there is something.

    Returns
    -------
    Tuned
        After Ctrl-C, or where another machine no longer answers, what was found until then.

    Raises
    ------
    BuildError
        Not one candidate of a bucket could be built and run.
    KeyboardInterrupt, RemoteError
        … and no default has been measured.
    """
    plans = candidates(config, target, topk)
    search = _Search(bench, clock, seconds)
    found: dict[int, TunedBucket] = {}
    total = len(dict.fromkeys(plan for row in plans.values() for plan in row)) + sum(map(len, plans.values()))
    ended, interrupted = "", False
    try:
        with progress(f"tuning {config.describe()}", total) as step:
            for index, (m, row) in enumerate(plans.items()):
                if index and clock() >= search.deadline:
                    ended = f"{seconds:g} s were over"
                    break
                found[m] = search.bucket(m, row, len(plans) - index, step)
    except (KeyboardInterrupt, RemoteError) as error:
        m = search.race.m if search.race is not None else -1
        partial = search.cut_short()
        if partial is not None and m not in found:
            found[m] = partial
        if not found:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        ended = "it was interrupted" if interrupted else str(error)
    finally:
        if found:
            keep(found)
    return Tuned(found, ended, clock() - search.began, interrupted)
