"""Random problems, never zeros, and what they must give: float64 from codes, scales and zeros, without the product's code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from ..config import LEAST_EPS, MatmulConfig
from ..measuring import CPU
from .timing import Verdict

#: Rows of the weight that are decoded at a time, so that no float64 copy of a whole weight is held.
_BLOCK_ROWS = 1024
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


@dataclass(frozen=True)
class Workload:
    """The operands of a call.

    Attributes
    ----------
    config : MatmulConfig
        The question.
    a : torch.Tensor
        (m, K) A_dtype.
    weight : torch.Tensor
        (N, K), as `Matmul.transform_weight` takes it.
    scale, zeros, bias : torch.Tensor or None
        As `Matmul` takes them.
    zero_points : torch.Tensor or None
        (N, K / g), the numbers that `zeros` holds.
    decoded : str
        The dtype to which the operator rounds decoded weights.
    """

    config: MatmulConfig
    a: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None
    decoded: str = "float32"

    @property
    def m(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def extras(self) -> dict[str, torch.Tensor]:
        """The operands beside A and W that the operator wants, by name."""
        rows = {"scale": self.scale, "zeros": self.zeros, "bias": self.bias}
        return {name: tensor for name, tensor in rows.items() if tensor is not None}

    def _values(self, first: int) -> torch.Tensor:
        """The float64 values of a block of rows."""
        block, fmt = self.weight[first : first + _BLOCK_ROWS], self.config.format
        if fmt.codebook:
            return torch.tensor(fmt.codebook, dtype=torch.float64, device=block.device)[block.to(torch.int64)]
        return block.to(torch.float64)

    def _per_k(self, tensor: torch.Tensor | None, first: int, default: float) -> torch.Tensor:
        """Numbers of the groups of a block of rows, for each k."""
        if tensor is None:
            return torch.tensor(default, dtype=torch.float64, device=self.weight.device)
        if tensor.dim() == 1:  # one for all
            return tensor.to(torch.float64)
        block = tensor[first : first + _BLOCK_ROWS].to(torch.float64)
        return block.repeat_interleave(self.config.group, dim=1)

    def _blocks(self, magnitude: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, float64 weights) of each block; with `magnitude` the sizes of the terms instead of their sum."""
        for first in range(0, self.config.N, _BLOCK_ROWS):
            q = self._values(first)
            s, z = self._per_k(self.scale, first, 1.0), self._per_k(self.zero_points, first, 0.0)
            if magnitude:
                q, s, z = q.abs(), s.abs(), -z.abs()
            yield first, q * s - z if self.config.zeros_mode == "rescale" else (q - z) * s

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The (N, K) weight that is meant, rounded to `dtype`."""
        out = torch.empty(self.config.N, self.config.K, dtype=dtype, device=self.weight.device)
        for first, block in self._blocks():
            out[first : first + len(block)] = block
        return out

    @cached_property
    def quantized(self) -> torch.Tensor:
        """float64 (m, K): what is left of A where the config quantizes it on the fly, else A; as the config documents it."""
        if self.config.dynamic_quantization is None:
            return self.a.to(torch.float64)
        a = self.a.to(torch.float32).unflatten(1, (self.config.activation_groups, -1))
        largest = a.abs().amax(dim=2, keepdim=True).clamp(min=self.config.activation_eps or LEAST_EPS)
        scale = largest / torch.tensor(127.0, device=a.device)  # by a number it would be multiplied with a reciprocal
        whole = (a / scale).round()  # ties to even
        return (whole.to(torch.float64) * scale.to(torch.float64)).flatten(1)

    def _product(self, a: torch.Tensor) -> torch.Tensor:
        out = torch.cat([a @ block.T for _, block in self._blocks()], dim=1)
        return out if self.bias is None else out + self.bias.to(torch.float64)

    @cached_property
    def expected(self) -> torch.Tensor:
        """The float64 (m, N) result of the exact activations."""
        return self._product(self.a.to(torch.float64))

    @cached_property
    def _ours(self) -> torch.Tensor:
        """The float64 (m, N) result of those that the operator multiplies."""
        return self.expected if self.config.dynamic_quantization is None else self._product(self.quantized)

    @cached_property
    def _bound(self) -> torch.Tensor:
        """How far a result of the operator may be: float32 sums of K products, and the rounding of the output.

        2·√K·2^-24·‖a‖·‖(|q| + |z|)·s‖ + u(out)·|ref|, by row and column; integers are exact. Where weights are rounded when
        they are decoded, 4·u(decoded)·‖a ∘ (|q| + |z|)·s‖ more, as of errors that are independent of each other.
        """
        config = self.config
        integers = config.integer_accumulation and self.scale is None and not config.activation_groups
        norms = torch.cat([block.norm(dim=1) for _, block in self._blocks(magnitude=True)])
        sums = self.a.to(torch.float64).norm(dim=1)[:, None] * norms * (2 * math.sqrt(config.K) * 2.0**-24)
        if integers:
            sums.zero_()
        elif self.decoded != "float32":
            sums += 4 * _ROUNDOFF[self.decoded] * self._term_norms()
        if config.out_dtype in ("int8", "int32"):
            return sums if integers else sums + 0.5
        return sums + _ROUNDOFF[config.out_dtype] * self._ours.abs() + _SMALLEST[config.out_dtype]

    def _term_norms(self) -> torch.Tensor:
        """(m, N): the Euclidean norm over k of the sizes of the terms that are added."""
        squares = self.a.to(torch.float64).square()
        return torch.cat([squares @ block.square().T for _, block in self._blocks(magnitude=True)], dim=1).sqrt()

    def error(self, out: torch.Tensor, expected: torch.Tensor | None = None) -> torch.Tensor:
        """float64 distances from a result, by default the expected one; infinite for NaN and for another shape."""
        expected = self.expected if expected is None else expected
        if tuple(out.shape) != tuple(expected.shape):
            return torch.full_like(expected, math.inf)
        if not out.is_floating_point():
            info = torch.iinfo(out.dtype)
            expected = expected.clamp(info.min, info.max)
        return (out.to(torch.float64) - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)

    def _verdict(self, error: torch.Tensor, allowed: torch.Tensor | float) -> Verdict:
        size = float(self.expected.square().mean().sqrt()) or 1.0
        return Verdict(float(error.max()) / size, bool((error <= allowed).all()))

    def check(self, out: object) -> Verdict:
        """Judge a result of the operator by its bound: where it quantizes A on the fly, by what that leaves of A."""
        assert isinstance(out, torch.Tensor)
        return self._verdict(self.error(out, self._ours), self._bound)

    def check_within(self, out: object, limit: float) -> Verdict:
        """Judge a peer's result: no element farther off than `limit` times the root mean square of the expected result."""
        assert isinstance(out, torch.Tensor)
        size = float(self.expected.square().mean().sqrt()) or 1.0
        return self._verdict(self.error(out), limit * size)

    def check_turned(self, outs: Sequence[torch.Tensor], limit: float) -> Verdict:
        """The worst verdict on results of copies of the weight of which the i-th begins with the last i rows."""
        verdicts = [self.check_within(out.roll(-index, -1), limit) for index, out in enumerate(outs)]
        return Verdict(max(verdict.error for verdict in verdicts), all(verdict.right for verdict in verdicts))


def draw_workload(config: MatmulConfig, m: int, seed: int = 0, device: torch.device = CPU) -> Workload:
    """Draw operands whose results have a size of about 1, where there are scales to bring them there.

    Parameters
    ----------
    config : MatmulConfig
        What is to be computed.
    m : int
        Rows of A.
    seed : int
        The same seed gives the same operands on one kind of device.
    device : torch.device
        Where they are drawn, and lie.
    """
    with device:
        a = _draw_activations(config, m, torch.Generator(device).manual_seed(seed + m))
        return Workload(config, a, *_draw_operands(replace(config, M=1), seed, device))


def _draw_activations(config: MatmulConfig, m: int, generator: torch.Generator) -> torch.Tensor:
    if config.held_dtype == "int8":
        top = _largest_activation(config)
        return torch.randint(-top, top + 1, (m, config.K), dtype=torch.int8, generator=generator)
    return torch.randn(m, config.K, generator=generator).to(getattr(torch, config.held_dtype))


def _largest_activation(config: MatmulConfig) -> int:
    return 7 if config.A_dtype == "int4" else 127


@lru_cache(maxsize=2)  # of a case and of a variant that is timed beside it
def _draw_operands(config: MatmulConfig, seed: int, device: torch.device) -> tuple[Any, ...]:
    """Weight, scale, zeros, bias and zero points, the same for any number of rows; the last are kept."""
    generator = torch.Generator(device).manual_seed(seed)
    a_size = 0.58 * _largest_activation(config) if config.held_dtype == "int8" else 1.0
    weight, w_size = _draw_weight(config, generator)
    dtype, shape = getattr(torch, config.scale_dtype), (config.N, config.num_groups)
    scale = zeros = points = bias = None
    if config.with_scaling:
        size = 1 / (a_size * w_size * math.sqrt(config.K))
        scale = ((0.5 + torch.rand(config.scale_shape, generator=generator)) * size).to(dtype)
    if config.with_zeros:
        low, high = config.format.value_range
        whole = torch.randint(low, high + 1, shape, generator=generator)
        points = whole.to(dtype)
        if config.zeros_mode == "rescale" and scale is not None:
            points = (whole * scale.float()).to(dtype)
        zeros = _pack_rows(whole.T, config.format.bits) if config.zeros_packed else points
    if config.with_bias:
        bias = torch.randn(config.N, generator=generator).mul(3).to(getattr(torch, config.out_dtype))
    return weight, scale, zeros, bias, points


def _draw_weight(config: MatmulConfig, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """The weight, and about the root mean square of its values."""
    fmt, shape = config.format, (config.N, config.K)
    if fmt.is_integer:
        low, high = fmt.value_range
        if fmt.bits == 1 and low < 0:
            return torch.randint(0, 2, shape, dtype=torch.int8, generator=generator) * 2 - 1, 1.0
        dtype = torch.int8 if low < 0 else torch.uint8
        return torch.randint(low, high + 1, shape, dtype=dtype, generator=generator), max(1.0, high * 0.58)
    if fmt.codebook:
        size = math.sqrt(sum(value * value for value in fmt.codebook) / len(fmt.codebook))
        return torch.randint(0, len(fmt.codebook), shape, dtype=torch.uint8, generator=generator), size
    size = 1.0 if fmt.kind == "float8" else 1 / math.sqrt(config.K)
    return (torch.randn(shape, generator=generator) * size).to(getattr(torch, fmt.torch_name)), size


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(R, C) codes -> int8 (R, ceil(C·bits/8)), a little-endian bit stream per row."""
    planes = (codes.cpu().numpy()[..., None] >> np.arange(bits)) & 1
    stream = planes.astype(np.uint8).reshape(codes.shape[0], -1)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int8)).to(codes.device)
