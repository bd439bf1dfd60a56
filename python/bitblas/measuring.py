"""What every measurement needs: random operands of kernels, weights that come from memory, turns of calls, what CPU it is."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import packing
from .config import MatmulConfig
from .layout import PackedLayout
from .runtime import Kernels

#: A turn ends after this many seconds, but not before this many calls, the first of which is not counted; or after so many.
TURN_SECONDS, LEAST_CALLS, TURN_CALLS = 0.05, 3, 40
#: Bytes that are read to measure the bandwidth, and that the copies of a weight have together: so many times the last-level
#: cache, but not more. Caches keep a part of what is somewhat larger: here reading 32, 64, 96, 128, 256 MB in a circle, with a
#: cache of 32, gave 69, 43, 40, 34, 34 GB/s (medians of six).
READ_TIMES, READ_BYTES = 4, 1 << 30
#: Seconds and calls that `time_kernels` takes at least.
MIN_SECONDS, MIN_CALLS = 0.05, 5
#: Bytes that the copies of a weight may take there.
ROTATED_BYTES = 256 << 20
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


def random_operands(
    config: MatmulConfig, layout: PackedLayout, m: int, device: torch.device = CPU
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A (m, K), and the operands that a kernel takes after it, with random contents, for the config of kernels.

    They are the same on every device, since they are drawn on the CPU.
    """
    with CPU:  # whatever the default device is
        a, operands = _random_operands(config, layout, m)
    return a.to(device), [operand.to(device) for operand in operands]


def _random_operands(config: MatmulConfig, layout: PackedLayout, m: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if config.A_dtype == "int8":
        a = torch.randint(-127, 128, (m, config.K), dtype=torch.int8, generator=generator)
    else:
        a = torch.randn(m, config.K, generator=generator).to(getattr(torch, config.held_dtype))
        a = a.view(getattr(torch, config.activation_dtype))
    operands = [random_weight(config, layout, generator)]
    dtype = getattr(torch, config.scale_dtype)
    if config.with_scaling:
        operands.append((torch.rand(config.scale_shape, generator=generator) * 0.01).to(dtype))
    if config.with_zeros:
        bits = config.format.bits
        size = config.num_groups * ((config.N * bits + 7) // 8)
        if config.zeros_packed:
            operands.append(torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator))
        else:
            operands.append(torch.randint(0, 1 << bits, (config.N, config.num_groups), generator=generator).to(dtype))
    if config.with_bias:
        operands.append(torch.zeros(config.N, dtype=getattr(torch, config.bias_dtype)))
    return a, operands


def random_weight(config: MatmulConfig, layout: PackedLayout, generator: torch.Generator) -> torch.Tensor:
    """A packed weight of random finite values, flat."""
    fmt = config.format
    if fmt.is_native or fmt.kind == "float8":
        values = torch.randn(layout.N, layout.K, generator=generator).to(getattr(torch, fmt.torch_name))
        return packing.pack(values.view(packing.code_dtype(fmt)), layout).view(-1)
    return torch.randint(-128, 128, (layout.num_bytes,), dtype=torch.int8, generator=generator)


class Operands:
    """Random operands of a config's kernels for `m` rows, with rotated weights, and room for the result.

    Parameters
    ----------
    config : MatmulConfig
        Of an operator or of its kernels.
    layout : PackedLayout
        Of the weights.
    m : int
        Rows.
    device : torch.device
        Where they lie.
    cache : int, optional
        Bytes of the cache past which weights are rotated; this CPU's by default.
    """

    def __init__(
        self,
        config: MatmulConfig,
        layout: PackedLayout,
        m: int,
        device: torch.device = CPU,
        cache: int | None = None,
    ) -> None:
        self.a, (weight, *self.rest) = random_operands(config.kernel, layout, m, device)
        self.weights = rotate(weight, max(ROTATED_BYTES, 2 * (cache or 0)), cache)
        self.out = torch.empty(m, config.N, dtype=getattr(torch, config.out_dtype), device=device)
        self.m = m
        self._calls = 0

    def launch(self, kernels: Kernels, index: int | None = None) -> torch.Tensor:
        """Call kernels with the next copy of the weight, or the `index`-th; returns the result, which others overwrite."""
        if index is None:
            index, self._calls = self._calls, self._calls + 1
        weight = self.weights[index % len(self.weights)]
        kernels.launch(self.m, [self.a, weight, *self.rest], self.out)
        return self.out


def spoil(out: torch.Tensor) -> torch.Tensor:
    """Fill a tensor for results with what no kernel leaves there by accident: NaN, or other integers; returns it."""
    return out.fill_(float("nan")) if out.is_floating_point() else out.bitwise_not_()


def time_kernels(kernels: Kernels, config: MatmulConfig, layout: PackedLayout, m: int) -> float:
    """Median seconds of a call with `m` rows, weights rotated through more bytes than a cache holds."""
    operands = Operands(config, layout, m)
    for _ in range(2):
        operands.launch(kernels)
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < MIN_SECONDS:
        began = time.perf_counter()
        operands.launch(kernels)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
