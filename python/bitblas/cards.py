"""Measuring on a graphics card: which one, and launches timed there, so that what a call costs the host hides nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from . import operands
from .errors import UnsupportedError
from .machines import Card
from .measuring import LEAST_CALLS, TURN_CALLS, TURN_SECONDS
from .operands import MIN_CALLS, MIN_SECONDS, Call, Operands
from .runtime import Kernels
from .target import Target, device_arch, runs_on

#: Seconds that the launches of one batch take together, about: long beside the two events that time them.
BATCH_SECONDS = 1e-3
#: A batch holds no more copies of a weight than fit into so many seconds, and no more launches than this.
LONGEST_BATCH_SECONDS, MOST_LAUNCHES = 2e-2, 4096
#: Launches of which the least tells how many a batch needs.
_TRIALS = 3


def device_of(target: Target) -> torch.device:
    """Where kernels for a target run: the CPU; the current CUDA device where it can, else the first that can.

    Raises
    ------
    UnsupportedError
        No device of this machine runs code for the target.
    """
    if target.kind != "cuda":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    order = sorted(range(count), key=lambda index: index != torch.cuda.current_device())
    for index in order:
        if runs_on(target.arch, device_arch(index)):
            return torch.device("cuda", index)
    raise UnsupportedError(f"there is no CUDA device for {target}")


def describe_card(device: torch.device) -> dict[str, object]:
    """What a device is, as JSON values."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "sms": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "memory_bytes": facts.total_memory,
        "cuda": torch.version.cuda,
    }


def cache_bytes_of(target: Target) -> int | None:
    """Bytes of the cache that a measurement has to go round, on a card; None on CPUs, which are asked for theirs."""
    return target.card.l2_bytes if isinstance(target.card, Card) else None


@dataclass(frozen=True)
class Batch:
    """Launches that are timed together.

    Attributes
    ----------
    run : callable
        Does all of them and returns the seconds they took.
    count : int
        How many they are.
    result : list of one object
        What the last of them returned; its memory is written again by each run.
    """

    run: Callable[[], float]
    count: int
    result: list[object] = field(default_factory=list)


class Stopwatch(Protocol):
    """What times launches: a card, or what a test puts in its place."""

    def prepare(self, call: Callable[[int], object], count: int, captured: bool = True) -> Batch:
        """Make `count` launches, numbered from 0, one batch; with what each costs the host where they are not captured."""

    def once(self, call: Callable[[int], object]) -> float:
        """Seconds of one launch, with all that a call costs."""


class CardClock:
    """CUDA events around CUDA graphs, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def prepare(self, call: Callable[[int], object], count: int, captured: bool = True) -> Batch:
        """See `Stopwatch`."""
        if not captured:
            return self._eager(call, count)
        self.once(call)  # what is loaded by the first call cannot be loaded while a graph is captured
        graph, result = torch.cuda.CUDAGraph(), list[object]()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self._stream):
            for index in range(count):
                result[:] = [call(index)]
        return Batch(lambda: self._timed(graph.replay), count, result)

    def _eager(self, call: Callable[[int], object], count: int) -> Batch:
        result = list[object]()

        def work() -> None:
            for index in range(count):
                result[:] = [call(index)]

        return Batch(lambda: self._timed(work), count, result)

    def once(self, call: Callable[[int], object]) -> float:
        """See `Stopwatch`."""
        return self._timed(lambda: call(0))

    def _timed(self, work: Callable[[], object]) -> float:
        first, last = self._events
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self.device))
            first.record()
            work()
            last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


def batch_of(stopwatch: Stopwatch, call: Callable[[int], object], copies: int, captured: bool = True) -> Batch:
    """A batch of launches that goes through all copies of a weight, as often as makes it long beside what times it.

    Where one round of the copies takes longer than is worth the wait, it goes through a part of them: what takes so long
    gains nothing from a cache.
    """
    seconds = max(1e-7, min(stopwatch.once(call) for _ in range(_TRIALS)))
    wanted = -(-BATCH_SECONDS // seconds)
    whole = max(1, min(-(-wanted // copies) * copies, MOST_LAUNCHES // copies * copies or copies))
    return stopwatch.prepare(call, int(min(whole, max(1, LONGEST_BATCH_SECONDS // seconds))), captured)


def take_batches(batch: Batch, least: int = LEAST_CALLS, seconds: float = TURN_SECONDS) -> list[float]:
    """Run a batch for one turn of `seconds`, at least `least` times; the seconds of a launch in each."""
    taken: list[float] = []
    while len(taken) < least or (sum(taken) * batch.count < seconds and len(taken) < TURN_CALLS):
        taken.append(batch.run() / batch.count)
    return taken


def time_on(target: Target, kernels: Kernels, call: Call, stopwatch: Stopwatch | None = None) -> float:
    """Median seconds of a call where the kernels run: on a card without what a call costs the host.

    Parameters
    ----------
    stopwatch : Stopwatch, optional
        Default: the card's.

    Raises
    ------
    UnsupportedError
        No device of this machine runs code for the target.
    """
    if target.kind != "cuda":
        return operands.time_kernels(kernels, call)
    device = device_of(target) if stopwatch is None else torch.device("cpu")
    held = Operands(call.to(device), cache_bytes_of(target))
    batch = batch_of(stopwatch or CardClock(device), lambda index: held.launch(kernels, index), len(held.copies))
    return statistics.median(take_batches(batch, MIN_CALLS, MIN_SECONDS))
