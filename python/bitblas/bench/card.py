"""A matmul beside its peers on a graphics card: batches of launches in turns, and what the card does at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch.nn import functional

from ..cards import Batch, Stopwatch, batch_of, describe_card, take_batches
from ..measuring import rotate
from ..ops import Matmul
from .matmul import LIMITS, OURS, Comparison, Peer, Skipped, bytes_of, moved_bytes
from .timing import Candidate, Timing, Verdict
from .workload import Workload, draw_workload

#: Bytes that the copies of one candidate's weight may take at most, and the part of the card's memory.
MEMORY_CAP, MEMORY_PART = 4 << 30, 1 / 16
#: Batches that each candidate has at least, and batches and seconds of a turn; the first batch of a turn is not counted.
MIN_BATCHES, TURN_BATCHES, TURN_SECONDS = 9, 4, 4e-3
#: Side of the products, and bytes of the tensors, by which a card's best is measured.
PEAK_SIDE, READ_BYTES = 8192, 2 << 30
#: Activations of an int8 problem are multiplied with this for peers of float16, so that no result is beyond its range.
_SMALLER = 2.0**-8


@dataclass(frozen=True)
class CardMachine:
    """A graphics card, and the best that was seen of it.

    Attributes
    ----------
    name, capability, driver, cuda : str
        What it is, and with what it is driven.
    sms, l2_bytes, memory_bytes : int
        Its numbers.
    bandwidth : float or None
        Bytes read and written per second, by copying a tensor.
    peaks : dict of str to float
        Multiply-accumulates per second, by dtype of the operands, of torch's products.
    notes : tuple of str
        What stood in the way.
    """

    name: str
    capability: str
    driver: str
    cuda: str
    sms: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: float | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


def measure_card(
    stopwatch: Stopwatch, device: torch.device, driver: str = "", side: int = PEAK_SIDE, size: int = READ_BYTES
) -> CardMachine:
    """Measure bandwidth and peaks, some seconds' work.

    Parameters
    ----------
    stopwatch, device : Stopwatch, torch.device
        What measures, and where.
    driver : str
        What the driver calls itself, which torch does not tell.
    side, size : int
        Of the products, and bytes of the tensors.
    """
    facts = describe_card(device)
    size = min(size, int(str(facts["memory_bytes"])) // 8)
    peaks, notes = {}, []
    copied = _best(stopwatch, _copying(device, size))
    for name, make in products(device, side).items():
        try:
            peaks[name] = side**3 / _best(stopwatch, make())
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            notes.append(f"no peak of {name}: {str(error).splitlines()[0]}")
    rates = {"bandwidth": 2 * size / copied, "peaks": peaks, "notes": tuple(notes)}
    return CardMachine(**{**facts, "driver": driver, **rates})  # type: ignore[arg-type]


def _copying(device: torch.device, size: int) -> Callable[[int], object]:
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return lambda _: target.copy_(source)


def _best(stopwatch: Stopwatch, call: Callable[[int], object]) -> float:
    """Seconds of a call, the best of some batches."""
    return min(take_batches(batch_of(stopwatch, call, 1), least=MIN_BATCHES, seconds=0.1))


def products(device: torch.device, side: int) -> dict[str, Callable[[], Callable[[int], object]]]:
    """What makes torch's products of square matrices, by dtype; of random contents, since a card is faster on zeros."""

    def drawn(dtype: torch.dtype, size: float = 1.0) -> list[torch.Tensor]:
        return [(torch.randn(side, side, device=device) * size).to(dtype) for _ in range(2)]

    def floats(dtype: torch.dtype) -> Callable[[int], object]:
        a, b = drawn(dtype)
        return lambda _: torch.mm(a, b)

    def int8() -> Callable[[int], object]:
        a, b = drawn(torch.int8, 40.0)
        return lambda _: torch._int_mm(a, b.T)

    def float8() -> Callable[[int], object]:
        a, b = drawn(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        return lambda _: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)

    names = ("float16", "bfloat16", "float32")
    made = {name: partial(floats, getattr(torch, name)) for name in names}
    return {**made, "int8": int8, "float8_e4m3": float8}


# -- candidates ------------------------------------------------------------------------------------------------------------


def unit_on_card(op: Matmul) -> str:
    """By which dtype's products an operator is held on a card."""
    config = op.config
    if config.integer_products:
        return "int8"
    if config.A_dtype.startswith("float8"):
        return "float8_e4m3" if config.W_dtype.startswith("float8") else "float16"
    return config.A_dtype


def ours_on_card(op: Matmul, workload: Workload, budget: int, cache: int) -> Candidate:
    """Our operator, with an output of its own in each call, as a model calls it."""
    weights = rotate(op.transform_weight(workload.weight), budget, cache)
    a, extras = workload.a, workload.extras
    return Candidate(
        OURS,
        lambda index: op(a, weights[index % len(weights)], **extras),
        workload.check,
        unit_on_card(op),
        copies=len(weights),
    )


def dense_on_card(dtype: torch.dtype, cache: int) -> Peer:
    """torch's `linear` on the dequantized weight, all in `dtype`: cuBLAS."""
    text = str(dtype).removeprefix("torch.")

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        smaller = _SMALLER if workload.config.held_dtype == "int8" and dtype is torch.float16 else 1.0
        a = (workload.a.to(torch.float32) * smaller).to(dtype)
        weights = rotate(workload.dense(dtype), budget, cache)
        bias = None if workload.bias is None else (workload.bias.to(torch.float32) * smaller).to(dtype)

        def check(out: object) -> Verdict:
            assert isinstance(out, torch.Tensor)
            return workload.check_within(out.to(torch.float64) / smaller, LIMITS[text])

        return Candidate(
            f"torch {text}",
            lambda index: functional.linear(a, weights[index % len(weights)], bias),
            check,
            text,
            copies=len(weights),
        )

    return make


# -- turns -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A candidate, what it is timed by, and what came of it."""

    candidate: Candidate
    verdict: Verdict | None = None
    problem: str = ""
    batch: Batch | None = None
    seconds: list[float] = field(default_factory=list)

    def begin(self, stopwatch: Stopwatch) -> None:
        """Look at the first result; time only what is right."""
        self.verdict = self.candidate.check(self.candidate.call(0))
        if self.verdict.right:
            self.batch = batch_of(stopwatch, self.candidate.call, self.candidate.copies, self.candidate.captured)

    def take_turn(self) -> None:
        if self.batch is not None:
            self.seconds += take_batches(self.batch, TURN_BATCHES, TURN_SECONDS)[1:]

    def timing(self) -> Timing:
        first = self.verdict or Verdict(float("inf"), False)
        last = self.candidate.check(self.batch.result[0]) if self.batch and self.batch.result else first
        right = first.right and last.right and bool(self.seconds)
        return Timing(
            name=self.candidate.name,
            computes=self.candidate.computes,
            exact=self.candidate.exact,
            seconds=statistics.median(self.seconds) if right else None,
            fastest=min(self.seconds) if right else None,
            calls=len(self.seconds),
            error=max(first.error, last.error),
        )


def turns_on_card(
    candidates: Sequence[Candidate],
    stopwatch: Stopwatch,
    seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing | Skipped]:
    """Time candidates in turns, A B A B.

    Parameters
    ----------
    candidates : sequence of Candidate
        In the order of their turns; the first is ours.
    stopwatch : Stopwatch
        Times batches of launches.
    seconds : float
        How long to measure, for each candidate.
    clock : callable
        Seconds since some moment.

    Returns
    -------
    list of Timing or Skipped
        In the same order. A candidate whose first or last result is wrong has no time; another's that raises is skipped.

    Raises
    ------
    RuntimeError
        The first candidate cannot be run.
    """
    runs = [_Run(candidate) for candidate in candidates]
    for run in runs:
        try:
            run.begin(stopwatch)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            if run is runs[0]:
                raise
            run.problem = (
                f"this torch or this card cannot: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            )
    live = [run for run in runs if run.batch is not None]
    deadline = clock() + seconds * len(live)
    while live and (clock() < deadline or any(len(run.seconds) < MIN_BATCHES for run in live)):
        for run in live:
            run.take_turn()
    return [Skipped(run.candidate.name, run.problem) if run.problem else run.timing() for run in runs]


def compare_on_card(
    op: Matmul,
    m: int,
    peers: Sequence[Peer],
    stopwatch: Stopwatch,
    machine: CardMachine,
    device: torch.device,
    seconds: float = 0.2,
    seed: int = 0,
) -> Comparison:
    """Time an operator beside peers on a card; see `compare`.

    Parameters
    ----------
    op : Matmul
        Ours.
    m : int
        Rows of A.
    peers : sequence of Peer
        Whom to compare with.
    stopwatch, machine, device : Stopwatch, CardMachine, torch.device
        What measures, what was measured of it, and where.
    seconds : float
        How long to measure each candidate.
    seed : int
        Of the operands.

    Raises
    ------
    RuntimeError
        Ours cannot be run.
    """
    workload = draw_workload(op.config, m, seed, device)
    if op.config.A_dtype in ("float16", "bfloat16") and not op.config.format.is_native:
        workload = replace(workload, decoded=op.config.A_dtype)
    budget = min(MEMORY_CAP, int(machine.memory_bytes * MEMORY_PART))
    made = [peer(workload, budget) for peer in peers]
    candidates = [each for each in made if isinstance(each, Candidate)]
    skipped = [each for each in made if isinstance(each, Skipped)]
    found = turns_on_card([ours_on_card(op, workload, budget, machine.l2_bytes), *candidates], stopwatch, seconds)
    ceilings = {"bandwidth": machine.bandwidth} if machine.bandwidth else {}
    unit = unit_on_card(op)
    ceilings |= {unit: machine.peaks[unit]} if unit in machine.peaks else {}
    return Comparison(
        workload={**op.config.fields(), "m": m},
        m=m,
        macs=m * op.config.N * op.config.K,
        moved=moved_bytes(op, workload),
        threads=0,
        timings=tuple(each for each in found if isinstance(each, Timing)),
        skipped=(*skipped, *(each for each in found if isinstance(each, Skipped))),
        weight_bytes=op.layout.num_bytes,
        static_bytes=op.layout.num_bytes + bytes_of(workload.extras.values()),
        ceilings=ceilings,
        unit=unit,
    )
