"""AWQ checkpoints in the GEMM format of AutoAWQ: nibbles along N, interleaved."""

from __future__ import annotations

import torch

from .weight import QuantizedWeight


def from_awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int = 4,
    bias: torch.Tensor | None = None,
    zeros_mode: str | None = None,
) -> QuantizedWeight:
    """Repack a linear layer of an AWQ checkpoint, version "gemm".

    Parameters
    ----------
    qweight : torch.Tensor
        int32 (K, N/8): nibbles of a word, the lowest first, belong to columns 0 2 4 6 1 3 5 7 of N.
    qzeros : torch.Tensor
        int32 (G, N/8): zero points, likewise.
    scales : torch.Tensor
        (G, N), float16, bfloat16 or float32.
    bits : int
        4: the format has no other.
    bias : torch.Tensor, optional
        (N,), any floating-point dtype.
    zeros_mode : str, optional
        As in `from_gptq`.

    Returns
    -------
    QuantizedWeight
        uint4, or int4 without zero points.

    Raises
    ------
    ArgumentError
        A shape, dtype or value that is not as above.
    """
    raise NotImplementedError
