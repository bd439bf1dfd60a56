"""What this machine can do at best: bytes read and multiply-accumulates done per second, by C loops built on the spot."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, replace

import torch

from ..errors import BitBLASError
from ..measuring import READ_TIMES, cache_bytes, cpu_name, read_bytes
from ..target import host_features, host_target
from .ceilings import UNITS, Probes

#: Calls of which the best counts: of each loop in registers, and of reading.
_CALLS, _PASSES = 40, 8


@dataclass(frozen=True)
class Machine:
    """A machine, and the best that was seen of it.

    Attributes
    ----------
    cpu, isa : str
        The processor and its instruction sets.
    threads : int
        With which it was measured.
    cache_bytes : int
        Size of the last-level cache, 0 where it is not known.
    bandwidth : float or None
        Bytes read per second.
    fma, int8, bf16 : float or None
        Multiply-accumulates per second: of float32, of int8 in int32 (VNNI), of bfloat16 in float32. None where the CPU has
        no such instruction, or nothing could be measured.
    notes : tuple of str
        What stood in the way.
    """

    cpu: str
    isa: str
    threads: int
    cache_bytes: int
    bandwidth: float | None = None
    fma: float | None = None
    int8: float | None = None
    bf16: float | None = None
    notes: tuple[str, ...] = ()

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


def measure_machine(threads: int | None = None, probes: Probes | None = None) -> Machine:
    """Measure bandwidth and peaks, about a second's work.

    Parameters
    ----------
    threads : int, optional
        Default: torch's number.
    probes : Probes, optional
        The loops, where they are built already.

    Returns
    -------
    Machine
        With a note instead of numbers where there is no working C compiler.
    """
    threads = threads or torch.get_num_threads()
    try:
        isa = host_target().isa
    except BitBLASError:
        isa = ", ".join(sorted(host_features())) or platform.machine()
    machine = Machine(cpu_name(), isa, threads, cache_bytes(), notes=_load_note())
    try:
        return _measure(machine, probes or Probes())
    except (BitBLASError, OSError) as error:
        return replace(machine, notes=(*machine.notes, f"bandwidth and peaks were not measured: {error}"))


def _load_note() -> tuple[str, ...]:
    """A note where others use the CPUs: parallel loops wait for their last thread, and times grow out of proportion."""
    try:
        load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    except OSError:
        return ()
    if load < 0.5 * cpus:
        return ()
    return (f"the machine was busy: a load of {load:.1f} on {cpus} CPUs at the start; measure again when it is idle",)


def _measure(machine: Machine, probes: Probes) -> Machine:
    peaks: dict[str, float | None] = {}
    for name in UNITS:
        ceiling = probes.unit(name, machine.threads)
        peaks[name] = ceiling.rate(_CALLS) if ceiling else None
    size, notes = read_bytes(), machine.notes
    if size < READ_TIMES * machine.cache_bytes:
        notes += (
            f"bandwidth was read from {size >> 20} MB, not from {READ_TIMES} times the last-level cache of "
            f"{machine.cache_bytes >> 20} MB: a part may have come from there",
        )
    bandwidth = probes.bandwidth(size, machine.threads).rate(_PASSES)
    return replace(machine, bandwidth=bandwidth, fma=peaks["fma"], int8=peaks["int8"], bf16=peaks["bf16"], notes=notes)
