"""Checkpoints of llm-compressor in the format "pack-quantized" of compressed-tensors, which vLLM reads."""

from __future__ import annotations

import torch

from .weight import QuantizedWeight


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
        int32 (ceil(N·bits/32), G): zero point + 2^(bits-1), packed along N. None: symmetric.
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
    raise NotImplementedError
