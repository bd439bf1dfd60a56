"""Dense weights to quantized ones, rounded to the nearest code."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import packing
from ..dequantization import pack_zeros
from ..errors import ArgumentError
from ..formats import FORMATS, DataFormat, parse_format
from .unsigned import check_choice, constant_zeros
from .weight import SCALE_DTYPES, QuantizedWeight

#: Weights that are rounded at a time, so that temporaries stay small beside the whole.
_BLOCK_WEIGHTS = 1 << 18


def quantize(
    weight: torch.Tensor,
    W_dtype: str,
    group_size: int = -1,
    symmetric: bool | None = None,
    scale_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to the nearest code, each group with a scale of its own.

    With a the largest magnitude of a group, and its least and its largest number with 0 among them as l and h:

    - int, and uint with `symmetric`: s = a / (2^(b-1) - 1/2); for 2 bits s = a, so that ternary weights stay what they are;
      for int1 s is the mean magnitude, and the code the sign. uint has zero points, all 2^(b-1);
    - uint, and int without `symmetric`: s = (h - l) / (2^b - 1), and the zero point is the whole number nearest to -l / s
      (less 2^(b-1) for int, in the mode ``"original"``);
    - the others: a becomes the format's largest number.

    Scales are rounded up to `scale_dtype`, and weights divided by what is stored, so that a weight is at most s/2 from what it
    becomes in integer formats of 2 bits and more, and in uint1. A group of zeros has a scale of 1.

    Parameters
    ----------
    weight : torch.Tensor
        (N, K), any floating-point dtype.
    W_dtype : str
        uint1 to uint8, int1 to int8, nf4, fp4_e2m1, float8_e4m3 or float8_e5m2.
    group_size : int
        How many consecutive columns share a scale: a divisor of K; -1: all.
    symmetric : bool, optional
        None: uint formats not, all others are. uint1 cannot be, int1, codebooks and float8 have to be.
    scale_dtype : torch.dtype, optional
        float16, bfloat16 or float32. None: that of `weight`, or float32 where it is none of these.
    bias : torch.Tensor, optional
        (N,), kept as it is.

    Returns
    -------
    QuantizedWeight
        On the device of `weight`.

    Raises
    ------
    ArgumentError
        An argument that is not as above; a weight that is not finite, or whose scale `scale_dtype` cannot hold.
    ConfigError
        No format has that name.
    """
    n, k, group = _check_sizes(weight, group_size)
    fmt = parse_format(W_dtype)
    rule = _rule(fmt, symmetric)
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype in SCALE_DTYPES else torch.float32
    check_choice("scale_dtype", scale_dtype, SCALE_DTYPES)
    weight = weight.detach()
    packed = torch.empty((n, -(-k * fmt.bits // 8)), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((n, k // group), dtype=scale_dtype, device=weight.device)
    points = torch.empty((n, k // group), dtype=torch.uint8, device=weight.device) if rule.has_points else None
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    step = max(1, _BLOCK_WEIGHTS // k)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        grouped = weight[rows].to(wide).view(-1, k // group, group)
        low, high = _bounds(grouped)
        # where all is 0 a scale of 1 spares a division by 0; int1, which has no 0, needs one of 0
        scales[rows] = _round_up(rule.scale(grouped, low, high), scale_dtype, of_zeros=float(fmt.name != "int1"))
        held = scales[rows].to(wide).unsqueeze(2)
        if points is not None:
            points[rows] = (-low / held.squeeze(2)).round().clamp_(0, (1 << fmt.bits) - 1).to(torch.uint8)
        codes = rule.codes(grouped / held, None if points is None else points[rows].unsqueeze(2))
        packed[rows] = packing.pack_rows(codes.view(-1, k), fmt.bits)
    zeros, mode = _zeros(fmt, points, symmetric, scales)
    return QuantizedWeight(fmt.name, packed.view(torch.int8), k, scales, zeros, mode, bias=bias)


def _check_sizes(weight: torch.Tensor, group_size: int) -> tuple[int, int, int]:
    """N, K and how many columns share a scale."""
    if (
        not isinstance(weight, torch.Tensor)
        or not weight.is_floating_point()
        or weight.dim() != 2
        or not weight.numel()
    ):
        shown = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ArgumentError(f"weight is {shown}; expected a floating-point tensor (N, K)")
    n, k = weight.shape
    group = k if group_size == -1 else group_size
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group < 1 or k % group:
        raise ArgumentError(f"group_size is {group_size!r}; allowed: -1 and the divisors of K = {k}")
    return n, k, group


@dataclass(frozen=True)
class _Rule:
    """How weights become codes of a format.

    Attributes
    ----------
    scale : callable
        (grouped weights, least, largest) -> float64 (rows, groups), what the scale should be; 0 for a group of zeros.
    codes : callable
        (weights over scales, zero points or None) -> codes, uint8 of the same shape; may overwrite the weights.
    has_points : bool
        Whether zero points are chosen.
    """

    scale: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    codes: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    has_points: bool = False


def _rule(fmt: DataFormat, symmetric: bool | None) -> _Rule:
    if symmetric is not None and not isinstance(symmetric, bool):
        raise ArgumentError(f"symmetric is {symmetric!r}; allowed: None, True, False")
    if fmt.is_native:
        allowed = ", ".join(name for name, row in FORMATS.items() if not row.is_native)
        raise ArgumentError(f"W_dtype is {fmt.name}, which needs no scales; allowed: {allowed}")
    if symmetric is False and (not fmt.is_integer or fmt.name == "int1"):
        raise ArgumentError(f"symmetric is False; {fmt.name} has to be symmetric")
    if symmetric and fmt.name == "uint1":
        raise ArgumentError("symmetric is True; uint1 cannot be, int1 is")
    if fmt.codebook:
        return _Rule(_largest_to(max(map(abs, fmt.codebook))), _nearest_in(fmt))
    if fmt.kind == "float8":
        return _Rule(_largest_to(torch.finfo(getattr(torch, fmt.torch_name)).max), _float8_codes(fmt))
    if fmt.name == "int1":
        return _Rule(
            lambda grouped, low, high: grouped.abs().mean(2).double(), lambda x, points: (x >= 0).to(torch.uint8)
        )
    top, middle = (1 << fmt.bits) - 1, 1 << (fmt.bits - 1)
    flipped = middle if fmt.name == "int8" else 0  # which is two's complement

    def codes(x: torch.Tensor, points: torch.Tensor | None) -> torch.Tensor:
        found = x.round_().add_(middle if points is None else points).clamp_(0, top).to(torch.uint8)
        return found.bitwise_xor_(flipped) if flipped else found

    if symmetric or (symmetric is None and fmt.kind == "int"):
        return _Rule(_largest_to(1.0 if fmt.bits == 2 else middle - 0.5), codes)
    return _Rule(lambda grouped, low, high: (high.double() - low.double()) / top, codes, has_points=True)


def _largest_to(number: float) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda grouped, low, high: torch.maximum(-low, high).double() / number


def _nearest_in(fmt: DataFormat) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """Codes of the codebook's nearest values; of two that are equally near, those of the smaller one."""
    first = dict(
        zip(reversed(fmt.codebook), reversed(range(1 << fmt.bits)), strict=True)
    )  # of 0 and -0, which are equal, 0
    values = sorted(first)
    steps = [((a + b) / 2, first[b] - first[a]) for a, b in itertools.pairwise(values)]

    def nearest(x: torch.Tensor, points: torch.Tensor | None) -> torch.Tensor:
        codes = torch.full_like(x, first[values[0]])
        above = torch.empty_like(x)  # a float, into which torch compares four times as fast as into a bool
        for between, step in steps:
            codes.add_(torch.gt(x, between, out=above), alpha=step)
        return codes.to(torch.uint8)

    return nearest


def _float8_codes(fmt: DataFormat) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    dtype = getattr(torch, fmt.torch_name)
    largest = torch.finfo(dtype).max
    return lambda x, points: x.clamp_(-largest, largest).to(dtype).view(torch.uint8)


def _bounds(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight of each group, and 0."""
    low, high = grouped.amin(2), grouped.amax(2)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        wrong = grouped[~torch.isfinite(grouped)][0].item()
        raise ArgumentError(f"weight holds {wrong}; expected finite numbers")
    return low.clamp_(max=0), high.clamp_(min=0)


def _round_up(scale: torch.Tensor, dtype: torch.dtype, of_zeros: float) -> torch.Tensor:
    """The least numbers of `dtype` that are not below positive float64 ones; for 0 `of_zeros`."""
    rounded = scale.to(dtype)
    bits = rounded.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    rounded = torch.where(rounded.double() < scale, bits + 1, bits).view(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ArgumentError(
            f"scale_dtype is {dtype}, which cannot hold a scale of {float(scale.max()):.6g}, as the weight needs it; "
            f"allowed here: torch.float32 or torch.bfloat16"
        )
    return torch.where(scale == 0, of_zeros, rounded)


def _zeros(
    fmt: DataFormat, points: torch.Tensor | None, symmetric: bool | None, scales: torch.Tensor
) -> tuple[torch.Tensor | None, str]:
    """The zero points as they are held, and their mode."""
    if fmt.kind == "uint":
        if points is not None:
            return pack_zeros(points, fmt.bits), "quantized"
        n, groups = scales.shape
        return constant_zeros(1 << (fmt.bits - 1), n, groups, fmt.bits, scales.device), "quantized"
    if points is None:
        return None, "original"
    return (points.to(torch.int16) - (1 << (fmt.bits - 1))).to(scales.dtype), "original"
