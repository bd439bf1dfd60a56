"""A matmul beside its peers: rotated weights, the same operands for all, and what each result says about the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from torch.nn import functional

from ..errors import ArgumentError, BitBLASError
from ..measuring import read_bytes, rotate
from ..ops import Matmul
from .ceilings import Probes, products_of, unit_of
from .machine import Machine
from .timing import Candidate, Timing, side_by_side
from .workload import Workload, draw_workload

#: Bytes that the copies of one candidate's weight may take at most, and the part of the free memory for all of them.
MEMORY_CAP, MEMORY_PART = 1 << 30, 1 / 4
OURS = "bitblas"
#: More threads than this for each CPU are a slip of the pen.
_THREADS_PER_CPU = 16

#: How far a dense result may be from the reference, over its root mean square, by dtype.
LIMITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Skipped:
    """A peer that did not take part, and why; `missing` where it could, if it were installed."""

    name: str
    reason: str
    missing: bool = False


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
    weight_bytes, static_bytes : int
        Bytes of the codes that a call of ours reads, and with scales, zeros and bias: what a layer keeps in memory.
    ceilings : dict of str to float
        What the machine did in the same turns, per second: ``"bandwidth"`` bytes read, ``"fma"``, ``"int8"`` and ``"bf16"``
        multiply-accumulates of a unit, ``"decode …"`` bytes of weights (see `Probes`).
    unit : str
        The one of these units that our kernel uses.
    products : int
        How many of its multiply-accumulates make one of the problem's.
    """

    workload: dict[str, object]
    m: int
    macs: int
    moved: int
    threads: int
    timings: tuple[Timing, ...]
    skipped: tuple[Skipped, ...] = ()
    weight_bytes: int = 0
    static_bytes: int = 0
    ceilings: dict[str, float] = field(default_factory=dict)
    unit: str = "fma"
    products: int = 1

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

    def limits(self) -> dict[str, float]:
        """Seconds that a call of ours takes at least, by each ceiling that was measured."""
        work = {"bandwidth": self.moved, self.unit: self.macs * self.products}
        work |= {name: self.weight_bytes for name in self.ceilings if name.startswith("decode")}
        return {name: work[name] / rate for name, rate in self.ceilings.items() if name in work}

    def peak_fraction(self, unit: str) -> float | None:
        """The part of a unit's peak that our operator reaches, counting the problem's multiply-accumulates."""
        if self.ours.seconds is None or not self.ceilings.get(unit):
            return None
        return self.macs / self.ours.seconds / self.ceilings[unit]

    def roofline(self) -> tuple[str, float] | None:
        """What binds, and the part of it that our operator reaches; None where either was not measured."""
        limits = self.limits()
        if not limits or self.ours.seconds is None:
            return None
        name = max(limits, key=lambda name: limits[name])
        return name, limits[name] / self.ours.seconds

    def fields(self, machine: Machine | None = None) -> dict[str, object]:
        """As JSON values; `parse` reads them."""
        found: dict[str, object] = {
            "workload": self.workload,
            "threads": self.threads,
            "macs": self.macs,
            "moved": self.moved,
            "weight_bytes": self.weight_bytes,
            "static_bytes": self.static_bytes,
            "ceilings": self.ceilings,
            "unit": self.unit,
            "products": self.products,
            "timings": [{**t.fields(), "speedup_of_bitblas": self.speedup(t.name)} for t in self.timings],
            "skipped": [asdict(peer) for peer in self.skipped],
        }
        bound = self.roofline()
        if bound is not None:
            found["binds"], found["roofline_fraction"] = bound
        if machine is not None:
            found["bandwidth_fraction"] = self.bandwidth_fraction(machine)
            found["fma_fraction"] = self.fma_fraction(machine)
        return found

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> Comparison:
        """What `fields` gave.

        Raises
        ------
        KeyError, TypeError
            `found` is something else.
        """
        timings = [{k: v for k, v in timing.items() if k != "speedup_of_bitblas"} for timing in found["timings"]]
        return cls(
            workload=dict(found["workload"]),
            m=found["workload"]["m"],
            macs=found["macs"],
            moved=found["moved"],
            threads=found["threads"],
            timings=tuple(Timing(**timing) for timing in timings),
            skipped=tuple(Skipped(**peer) for peer in found["skipped"]),
            weight_bytes=found["weight_bytes"],
            static_bytes=found["static_bytes"],
            ceilings=dict(found["ceilings"]),
            unit=found["unit"],
            products=found["products"],
        )


def compare(
    op: Matmul,
    m: int,
    peers: Sequence[Peer] = (),
    seconds: float = 0.5,
    seed: int = 0,
    probes: Probes | None = None,
) -> Comparison:
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
    probes : Probes, optional
        Loops that show what binds, to be timed in turns with the rest.
    """
    workload = draw_workload(op.config, m, seed)
    budget = min(MEMORY_CAP, int(psutil.virtual_memory().available * MEMORY_PART) // (1 + len(peers)))
    ours = _ours(op, workload, budget)
    made = [peer(workload, budget) for peer in peers]
    candidates = [ours, *(peer for peer in made if isinstance(peer, Candidate))]
    bounds = probes.of(op, m, read_bytes(), torch.get_num_threads()) if probes else []
    # the ceilings stand beside our kernel, and not behind the peers
    timings = side_by_side([ours, *(bound.candidate() for bound in bounds), *candidates[1:]], seconds)
    by_bound = zip(bounds, timings[1 : 1 + len(bounds)], strict=True)
    return Comparison(
        workload={**op.config.fields(), "m": m},
        m=m,
        macs=m * op.config.N * op.config.K,
        moved=moved_bytes(op, workload),
        threads=torch.get_num_threads(),
        timings=(timings[0], *timings[1 + len(bounds) :]),
        skipped=tuple(peer for peer in made if isinstance(peer, Skipped)),
        weight_bytes=op.layout.num_bytes,
        static_bytes=op.layout.num_bytes + bytes_of(workload.extras.values()),
        ceilings={bound.name: bound.work / timing.seconds for bound, timing in by_bound if timing.seconds},
        unit=unit_of(op, m),
        products=products_of(op, m),
    )


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moved_bytes(op: Matmul, workload: Workload) -> int:
    """Bytes that a call has to read and write."""
    read = op.layout.num_bytes + bytes_of([workload.a, *workload.extras.values()])
    return read + workload.m * op.config.N * getattr(torch, op.config.out_dtype).itemsize


def _ours(op: Matmul, workload: Workload, budget: int, name: str = OURS) -> Candidate:
    weights = rotate(op.transform_weight(workload.weight), budget)
    a, extras = workload.a, workload.extras
    out = torch.empty(workload.m, op.config.N, dtype=getattr(torch, op.config.out_dtype))
    quantizes = getattr(op.config, "dynamic_quantization", None)
    products = products_of(op, workload.m)
    computes = {"int8": "int32", "bf16": "bfloat16 in, float32 sums"}.get(unit_of(op, workload.m), "float32")
    computes = f"float32 in {products} slices of int8" if products > 1 else computes
    return Candidate(
        name,
        lambda index: op(a, weights[index % len(weights)], **extras, output=out),
        workload.check,
        f"int8 by {quantizes}" if quantizes else computes,
        exact=not quantizes,
    )


def own_variant(name: str, **changes: object) -> Peer:
    """Ours under a config that differs in some fields, on operands of its own: what such a difference costs.

    Parameters
    ----------
    name : str
        What the candidate is called.
    changes
        Fields of MatmulConfig.
    """

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        try:
            config = replace(workload.config, **changes)  # type: ignore[arg-type]
            op = Matmul(config)
        except BitBLASError as error:
            return Skipped(name, str(error))
        return _ours(op, draw_workload(config, workload.m), budget, name)

    return make


def torch_dense(dtype: torch.dtype) -> Peer:
    """torch's `linear` on the dequantized weight, all in `dtype`."""
    text = str(dtype).removeprefix("torch.")

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        a, weights = workload.a.to(dtype), rotate(workload.dense(dtype), budget)
        bias = None if workload.bias is None else workload.bias.to(dtype)
        return Candidate(
            f"torch {text}",
            lambda index: functional.linear(a, weights[index % len(weights)], bias),
            lambda out: workload.check_within(out, LIMITS[text]),
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
        lambda out: workload.check_within(out, 0.0 if config.out_dtype == "int32" else LIMITS["float16"]),
        "int32",
    )
