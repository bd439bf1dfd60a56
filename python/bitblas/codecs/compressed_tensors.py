"""Checkpoints of llm-compressor in the format "pack-quantized" of compressed-tensors, which vLLM reads."""

from __future__ import annotations

import torch

from ..dequantization import pack_zeros
from ..errors import ArgumentError
from .unsigned import check_choice, check_scales, check_words, row_bytes, sort_groups, weight_of_words
from .weight import QuantizedWeight, check_tensor
from .words import permute_codes

_BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def from_compressed(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape: torch.Tensor | tuple[int, int],
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
    bits: int = 4,
    bias: torch.Tensor | None = None,
    zeros_mode: str | None = None,
) -> QuantizedWeight:
    """Repack a linear layer of a "pack-quantized" checkpoint.

    Parameters
    ----------
    weight_packed : torch.Tensor
        int32 (N, ceil(K·bits/32)): value + 2^(bits-1), packed along K, little-endian.
    weight_scale : torch.Tensor
        (N, G), float16, bfloat16 or float32; (N, 1) for the strategy "channel", (1,) or (1, 1) for "tensor".
    weight_shape : torch.Tensor or tuple of int
        N and K.
    weight_zero_point : torch.Tensor, optional
        int32 (ceil(N·bits/32), G): zero point + 2^(bits-1), packed along N; or int8, of the shape of `weight_scale`: the zero
        points, -2^(bits-1) to 2^(bits-1) - 1, as the strategy "tensor" and older versions have them. None: symmetric.
    weight_g_idx : torch.Tensor, optional
        int32 or int64 (K,): the group of each column (actorder "group"); -1 everywhere means nothing.
    bits : int
        1 to 8.
    bias : torch.Tensor, optional
        (N,), any floating-point dtype.
    zeros_mode : str, optional
        As in `from_gptq`.

    Returns
    -------
    QuantizedWeight
        int{bits} without zero points where there are none or all are 0, else uint{bits}.

    Raises
    ------
    ArgumentError
        A shape, dtype or value that is not as above, or groups of unequal size.
    """
    check_choice("bits", bits, _BITS)
    n, k = _parse_shape(weight_shape)
    width = -(-k * bits // 32)
    check_words("weight_packed", weight_packed, f"({n}, {width})")
    check_tensor("weight_packed", weight_packed, (n, width), (torch.int32,))
    scales = _spread(weight_scale, n)
    groups = check_scales("weight_scale", scales, n, k, axis=1)
    zeros = None
    if weight_zero_point is not None:
        zeros = _zero_points(weight_zero_point, weight_scale, n, groups, bits)
    order = None
    if weight_g_idx is not None and not (isinstance(weight_g_idx, torch.Tensor) and bool((weight_g_idx == -1).all())):
        order = sort_groups("weight_g_idx", weight_g_idx, k, groups)
    if order is None:
        rows = weight_packed.clone(memory_format=torch.contiguous_format)
    else:
        rows = permute_codes(weight_packed.t(), order, bits)
    return weight_of_words(rows, k, bits, scales, zeros, zeros_mode, order, bias)


def _parse_shape(shape: torch.Tensor | tuple[int, int]) -> tuple[int, int]:
    values = shape.tolist() if isinstance(shape, torch.Tensor) else shape
    if not isinstance(values, (list, tuple)) or len(values) != 2 or not all(type(v) is int and v > 0 for v in values):
        raise ArgumentError(f"weight_shape is {values!r}; expected N and K, two integers of at least 1")
    return values[0], values[1]


def _spread(scale: torch.Tensor, n: int) -> torch.Tensor:
    """Scales (N, G), of the strategy "tensor" (a single one) and "channel" (N,), too."""
    if isinstance(scale, torch.Tensor) and scale.numel() == 1:
        return scale.reshape(1, 1).expand(n, 1)
    return scale.unsqueeze(1) if isinstance(scale, torch.Tensor) and scale.dim() == 1 else scale


def _zero_points(points: torch.Tensor, scale: torch.Tensor, n: int, groups: int, bits: int) -> torch.Tensor:
    """Packed zero points, int8 (G, ceil(N·bits/8))."""
    middle = 1 << (bits - 1)
    if isinstance(points, torch.Tensor) and points.dtype is torch.int8 and points.shape == scale.shape:
        low, high = (int(v) for v in torch.aminmax(points))
        if low < -middle or high >= middle:
            raise ArgumentError(
                f"weight_zero_point holds {low if low < -middle else high}; allowed: {-middle} to {middle - 1}"
            )
        return pack_zeros(_spread(points, n).to(torch.int16) + middle, bits)
    check_tensor("weight_zero_point", points, (-(-n * bits // 32), groups), (torch.int32,))
    return row_bytes(points.t().clone(memory_format=torch.contiguous_format), n, bits)
