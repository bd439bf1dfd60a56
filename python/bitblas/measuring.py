"""What every measurement needs: tensors that come from memory, turns of calls, what CPU it is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

#: A turn ends after this many seconds, but not before this many calls, the first of which is not counted; or after so many.
TURN_SECONDS, LEAST_CALLS, TURN_CALLS = 0.05, 3, 40
#: Bytes that are read to measure the bandwidth, and that the copies of a weight have together: so many times the last-level
#: cache, but not more. Caches keep a part of what is somewhat larger: here reading 32, 64, 96, 128, 256 MB in a circle, with a
#: cache of 32, gave 69, 43, 40, 34, 34 GB/s (medians of six).
READ_TIMES, READ_BYTES = 4, 1 << 30
#: Copies of a weight at most: the call costs more than what so small a weight could gain from a cache.
MAX_COPIES = 1024
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
CPU = torch.device("cpu")


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Size of the last-level cache that the first CPU sees; 0 where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for path in _CACHE.glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
        except (OSError, ValueError):
            continue
    return max(sizes)


def read_bytes(cache: int | None = None) -> int:
    """How many bytes to read in a circle so that they come from memory, past a cache of so many bytes, or this CPU's."""
    return min(READ_BYTES, READ_TIMES * max(16 << 20, cache_bytes() if cache is None else cache))


def num_copies(num_bytes: int, budget: int, cache: int | None = None) -> int:
    """How many copies of a weight come from memory when they are used in turn, within a budget of bytes; at least one."""
    wanted = -(-read_bytes(cache) // max(1, num_bytes))
    return max(1, min(wanted, MAX_COPIES, budget // max(1, num_bytes)))


def rotate(weight: torch.Tensor, budget: int, cache: int | None = None) -> list[torch.Tensor]:
    """Copies of a weight to be used in turn, so that each comes from memory as it does in a model; on its device."""
    count = num_copies(weight.numel() * weight.element_size(), budget, cache)
    return [weight, *(weight.clone() for _ in range(count - 1))]


def take_turn(
    call: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    least: int = LEAST_CALLS,
    seconds: float = TURN_SECONDS,
) -> list[float]:
    """Call for one turn of `seconds`, at least `least` times; the seconds of each call, the first one's included."""
    taken: list[float] = []
    while len(taken) < least or (sum(taken) < seconds and len(taken) < TURN_CALLS):
        began = clock()
        call()
        taken.append(clock() - began)
    return taken


def spoil(out: torch.Tensor) -> torch.Tensor:
    """Fill a tensor for results with what no kernel leaves there by accident: NaN, or other integers; returns it."""
    return out.fill_(float("nan")) if out.is_floating_point() else out.bitwise_not_()
