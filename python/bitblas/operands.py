"""Random operands of calls of kernels, by what the kernels compute; copies of those that come from memory; and their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import packing
from .config import QUERY_BUCKETS, FlashAttenConfig, MatmulConfig, Sizes
from .errors import ArgumentError
from .layout import PackedLayout
from .machines import Card
from .measuring import CPU, num_copies
from .runtime import Kernels
from .schedule import AttentionProblem, Problem
from .target import Target

#: Seconds and calls that `time_kernels` takes at least.
MIN_SECONDS, MIN_CALLS = 0.05, 5
#: Bytes that the copies of what comes from memory may take.
ROTATED_BYTES = 256 << 20
#: An attention is measured with so many keys at least, and so many heads.
LEAST_KEYS, LEAST_HEADS = 1024, 8
#: On cards kernels of an attention may read so many bytes at once: rows of its operands begin at multiples of them.
_ROW_BYTES = 16


@dataclass(frozen=True)
class Call:
    """A call of kernels: operands with random contents, and room for the result.

    Attributes
    ----------
    m : int
        Rows: what a bucket is chosen by.
    inputs : tuple of torch.Tensor
        What a kernel takes before its output.
    from_memory : slice
        Those of them that come from memory in a model: a weight, or keys and values.
    out : torch.Tensor
        The output.
    """

    m: int
    inputs: tuple[torch.Tensor, ...]
    from_memory: slice
    out: torch.Tensor

    def to(self, device: torch.device) -> Call:
        """The same on a device."""
        return replace(self, inputs=tuple(_copy(t, device) for t in self.inputs), out=self.out.to(device))


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def draw_call(problem: Problem | AttentionProblem) -> Call:
    """A call of the kernels of a problem, on the CPU; the same each time, whatever the default device is."""
    with CPU:
        if isinstance(problem, AttentionProblem):
            return _draw_attention(problem.config, usual_sizes(problem.target, problem.m))
        return _draw_matmul(problem.config, problem.layout, problem.m)


def draw_attention(config: FlashAttenConfig, sizes: Sizes) -> Call:
    """As `draw_call`, for an attention of these sizes."""
    with CPU:
        return _draw_attention(config, sizes)


def usual_sizes(target: Target, seq_len: int) -> Sizes:
    """With what so many queries are measured: as many keys, at least 1024, and heads with keys of their own for all threads."""
    threads = target.card.num_sms if isinstance(target.card, Card) else torch.get_num_threads()
    heads = -(-LEAST_HEADS // threads) * threads
    return Sizes(1, heads, heads, seq_len, max(seq_len, LEAST_KEYS))


def choose_sizes(config: FlashAttenConfig, target: Target, wanted: Mapping[str, object]) -> Sizes:
    """The `wanted` sizes by name; of others the config's, and where that leaves them open `usual_sizes`, of 1024 queries.

    Raises
    ------
    ArgumentError
        A name or a size is not allowed, or contradicts the config.
    """
    for name, value in wanted.items():
        if name not in Sizes._fields:
            raise ArgumentError(f"{name!r} is no size of an attention; allowed: {', '.join(Sizes._fields)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} is {value!r}; it must be an integer of at least 1")
        given = getattr(config, name)
        if given not in (None, value):
            raise ArgumentError(f"{name} is {value}; this operator was built for {name} = {given}")
    known: dict[str, Any] = {name: wanted.get(name) or getattr(config, name) for name in Sizes._fields}
    usual = usual_sizes(target, known["seq_len"] or QUERY_BUCKETS[-1])
    heads = known["heads"] or usual.heads
    known["heads_kv"] = known["heads_kv"] or heads
    if heads % known["heads_kv"]:
        raise ArgumentError(f"heads_kv is {known['heads_kv']}; it must be a divisor of heads = {heads}")
    return usual._replace(**{name: value for name, value in known.items() if value is not None})


def _draw_attention(config: FlashAttenConfig, sizes: Sizes) -> Call:
    generator = torch.Generator().manual_seed(0)
    operands = (
        (sizes.q_shape(config), config.Q_dtype),
        (sizes.k_shape(config), config.K_dtype),
        (sizes.v_shape(config), config.V_dtype),
    )
    inputs = (_draw_rows(shape, getattr(torch, dtype), generator) for shape, dtype in operands)
    out = torch.empty(sizes.output_shape(config), dtype=getattr(torch, config.Out_dtype))
    return Call(sizes.rows, tuple(inputs), slice(1, 3), out)


def _draw_rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers, the rows along the last dimension as far apart as `_ROW_BYTES` asks."""
    *others, length = shape
    step = _ROW_BYTES // dtype.itemsize
    held = torch.zeros(*others, -(-length // step) * step, dtype=dtype)
    return held[..., :length].copy_(torch.randn(shape, generator=generator))


def _draw_matmul(config: MatmulConfig, layout: PackedLayout, m: int) -> Call:
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
    out = torch.empty(m, config.N, dtype=getattr(torch, config.out_dtype))
    return Call(m, (a, *operands), slice(1, 2), out)


def random_weight(config: MatmulConfig, layout: PackedLayout, generator: torch.Generator) -> torch.Tensor:
    """A packed weight of random finite values, flat."""
    fmt = config.format
    if fmt.is_native or fmt.kind == "float8":
        values = torch.randn(layout.N, layout.K, generator=generator).to(getattr(torch, fmt.torch_name))
        return packing.pack(values.view(packing.code_dtype(fmt)), layout).view(-1)
    return torch.randint(-128, 128, (layout.num_bytes,), dtype=torch.int8, generator=generator)


class Operands:
    """A call whose operands come from memory where they do in a model: copies of them are used in turn.

    Parameters
    ----------
    call : Call
        What is called, on the device where it is.
    cache : int, optional
        Bytes of the cache past which copies are rotated; this CPU's by default.
    """

    def __init__(self, call: Call, cache: int | None = None) -> None:
        self._call = call
        read = call.inputs[call.from_memory]
        size = sum(tensor.numel() * tensor.element_size() for tensor in read)
        count = num_copies(size, max(ROTATED_BYTES, 2 * (cache or 0)), cache)
        self.copies = [read, *(tuple(_copy(tensor, tensor.device) for tensor in read) for _ in range(count - 1))]
        self.out = call.out
        self._calls = 0

    def launch(self, kernels: Kernels, index: int | None = None) -> torch.Tensor:
        """Call kernels with the next copy, or the `index`-th; returns the result, which others overwrite."""
        if index is None:
            index, self._calls = self._calls, self._calls + 1
        operands = list(self._call.inputs)
        operands[self._call.from_memory] = self.copies[index % len(self.copies)]
        kernels.launch(self._call.m, operands, self.out)
        return self.out


def time_kernels(kernels: Kernels, call: Call) -> float:
    """Median seconds of a call, what comes from memory rotated through more bytes than a cache holds."""
    operands = Operands(call)
    for _ in range(2):
        operands.launch(kernels)
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < MIN_SECONDS:
        began = time.perf_counter()
        operands.launch(kernels)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
