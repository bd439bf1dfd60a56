"""A matmul beside its peers: rotated weights, the same operands for all, and what each result says about the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch.nn import functional

from ..errors import ArgumentError
from ..ops import Matmul
from .machine import Machine, cache_bytes
from .timing import Candidate, Timing, side_by_side
from .workload import Workload, draw_workload

#: Bytes that the copies of one candidate's weight may take at most, and the part of the free memory for all of them.
MEMORY_CAP, MEMORY_PART = 1 << 30, 1 / 4
OURS = "bitblas"
#: More threads than this for each CPU are a slip of the pen.
_THREADS_PER_CPU = 16

#: How far a dense result may be from the reference, over its root mean square, by dtype.
_LIMITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Skipped:
    """A peer that did not take part, and why."""

    name: str
    reason: str


#: Makes a candidate of a workload; the number is how many bytes its copies of the weight may take.
Peer = Callable[[Workload, int], "Candidate | Skipped"]


@contextmanager
def use_threads(threads: int | None) -> Iterator[int]:
    """Give torch, and so our kernels, a number of threads inside of a `with` block; None leaves it as it is."""
    before = torch.get_num_threads()
    if threads is not None:
        if threads < 1:
            raise ArgumentError(f"threads is {threads}; it must be at least 1")
        most = _THREADS_PER_CPU * (os.cpu_count() or 1)
        if threads > most:
            raise ArgumentError(f"threads is {threads}; this machine has use for at most {most}")
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def num_copies(num_bytes: int, budget: int) -> int:
    """How many copies of a weight exceed the last-level cache, within a budget of bytes; at least one."""
    wanted = max(cache_bytes(), 32 << 20) // max(1, num_bytes) + 1
    return max(1, min(wanted, budget // max(1, num_bytes)))


def rotate(weight: torch.Tensor, budget: int) -> list[torch.Tensor]:
    """Copies of a weight to be used in turn, so that each comes from memory as it does in a model."""
    count = num_copies(weight.numel() * weight.element_size(), budget)
    return [weight, *(weight.clone() for _ in range(count - 1))]


@dataclass(frozen=True)
class Comparison:
    """One problem, timed.

    Attributes
    ----------
    workload : dict
        The config's fields, and m.
    m, macs, moved : int
        Rows of A; multiply-accumulates of a call; bytes that a call of ours has to read and write.
    threads : int
        Of all candidates.
    timings : tuple of Timing
        Ours first.
    skipped : tuple of Skipped
        Peers that did not take part.
    """

    workload: dict[str, object]
    m: int
    macs: int
    moved: int
    threads: int
    timings: tuple[Timing, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def ours(self) -> Timing:
        """The timing of our operator."""
        return self.timings[0]

    def timing(self, name: str) -> Timing | None:
        """The timing of a candidate that took part."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def speedup(self, name: str) -> float | None:
        """How many times as long a peer takes; None where it or ours has no time."""
        peer = self.timing(name)
        if peer is None or peer.seconds is None or self.ours.seconds is None:
            return None
        return peer.seconds / self.ours.seconds

    def bandwidth_fraction(self, machine: Machine) -> float | None:
        """How much of the machine's read bandwidth our operator uses."""
        if self.ours.seconds is None or not machine.bandwidth:
            return None
        return self.moved / self.ours.seconds / machine.bandwidth

    def fma_fraction(self, machine: Machine) -> float | None:
        """How much of the machine's peak of float32 multiply-accumulates our operator does."""
        if self.ours.seconds is None or not machine.fma:
            return None
        return self.macs / self.ours.seconds / machine.fma

    def fields(self, machine: Machine | None = None) -> dict[str, object]:
        """As JSON values."""
        found: dict[str, object] = {
            "workload": self.workload,
            "threads": self.threads,
            "timings": [{**t.fields(), "speedup_of_bitblas": self.speedup(t.name)} for t in self.timings],
            "skipped": [{"name": peer.name, "reason": peer.reason} for peer in self.skipped],
        }
        if machine is not None:
            found["bandwidth_fraction"] = self.bandwidth_fraction(machine)
            found["fma_fraction"] = self.fma_fraction(machine)
        return found


def compare(op: Matmul, m: int, peers: Sequence[Peer] = (), seconds: float = 0.5, seed: int = 0) -> Comparison:
    """Time an operator beside peers, on torch's present number of threads.

    Parameters
    ----------
    op : Matmul
        Ours.
    m : int
        Rows of A; a number that the operator takes.
    peers : sequence of Peer
        Whom to compare with.
    seconds : float
        How long to measure each candidate.
    seed : int
        Of the operands.
    """
    workload = draw_workload(op.config, m, seed)
    budget = min(MEMORY_CAP, int(psutil.virtual_memory().available * MEMORY_PART) // (1 + len(peers)))
    ours = _ours(op, workload, budget)
    made = [peer(workload, budget) for peer in peers]
    candidates = [ours, *(peer for peer in made if isinstance(peer, Candidate))]
    timings = side_by_side(candidates, seconds)
    operands = [workload.a, *workload.extras.values()]
    moved = op.layout.num_bytes + sum(t.numel() * t.element_size() for t in operands)
    moved += m * op.config.N * getattr(torch, op.config.out_dtype).itemsize
    return Comparison(
        workload={**op.config.fields(), "m": m},
        m=m,
        macs=m * op.config.N * op.config.K,
        moved=moved,
        threads=torch.get_num_threads(),
        timings=tuple(timings),
        skipped=tuple(peer for peer in made if isinstance(peer, Skipped)),
    )


def _ours(op: Matmul, workload: Workload, budget: int) -> Candidate:
    weights = rotate(op.transform_weight(workload.weight), budget)
    a, extras = workload.a, workload.extras
    out = torch.empty(workload.m, op.config.N, dtype=getattr(torch, op.config.out_dtype))
    return Candidate(
        OURS,
        lambda index: op(a, weights[index % len(weights)], **extras, output=out),
        workload.check,
        "int32" if op.config.integer_accumulation else "float32",
    )


def torch_dense(dtype: torch.dtype) -> Peer:
    """torch's `linear` on the dequantized weight, all in `dtype`."""
    text = str(dtype).removeprefix("torch.")

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        a, weights = workload.a.to(dtype), rotate(workload.dense(dtype), budget)
        bias = None if workload.bias is None else workload.bias.to(dtype)
        return Candidate(
            f"torch {text}",
            lambda index: functional.linear(a, weights[index % len(weights)], bias),
            lambda out: workload.check_within(out, _LIMITS[text]),
            text,
        )

    return make


def torch_int_mm(workload: Workload, budget: int) -> Candidate | Skipped:
    """torch's int8 matmul on the values of the weight, for int8 activations and no scale."""
    config, name = workload.config, "torch _int_mm"
    if config.A_dtype != "int8" or not config.format.is_integer or workload.scale is not None:
        return Skipped(name, "multiplies int8 by int8 without scales")
    dense = workload.dense(torch.float32)
    low, high = (float(end) for end in dense.aminmax())
    if low < -128 or high > 127 or workload.bias is not None or workload.zero_points is not None:
        return Skipped(name, "takes weights of int8 alone")
    weights = rotate(dense.to(torch.int8), budget)
    a = workload.a
    return Candidate(
        name,
        lambda index: torch._int_mm(a, weights[index % len(weights)].T),
        lambda out: workload.check_within(out, 0.0 if config.out_dtype == "int32" else _LIMITS["float16"]),
        "int32",
    )
