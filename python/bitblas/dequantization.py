"""Codes, scales and zero points to values, in torch: what is decoded outside of kernels."""

from __future__ import annotations

import torch

from . import packing
from .formats import DataFormat

#: Rows of a weight that are decoded at a time, so that what is float32 stays small beside the weight.
BLOCK_ROWS = 512


def unpack_zeros(zeros: torch.Tensor, n: int, bits: int) -> torch.Tensor:
    """Packed zero points, (groups, ceil(n·bits/8)) bytes, as (n, groups) uint8."""
    return packing.unpack_rows(zeros.contiguous().view(torch.uint8), n, bits).T


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, groups) integers 0 .. 2^bits - 1 as int8 (groups, ceil(n·bits/8)), packed along n; the inverse of `unpack_zeros`."""
    return packing.pack_rows(zeros.T.to(torch.uint8).contiguous(), bits).contiguous().view(torch.int8)


def code_values(codes: torch.Tensor, fmt: DataFormat) -> torch.Tensor:
    """What codes stand for, in float32: (N, K) of `packing.code_dtype(fmt)` -> (N, K)."""
    if fmt.codebook:
        return torch.tensor(fmt.codebook, dtype=torch.float32, device=codes.device)[codes.int()]
    return packing.decode_codes(codes, fmt).to(torch.float32, copy=True)


def dequantize(
    codes: torch.Tensor,
    fmt: DataFormat,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    zeros_mode: str = "original",
) -> torch.Tensor:
    """The values of weights, computed in float32.

    Parameters
    ----------
    codes : torch.Tensor
        (N, K) codes of `packing.code_dtype(fmt)`.
    fmt : DataFormat
        Their format.
    scales : torch.Tensor, optional
        (N, K / g), any floating-point dtype.
    zeros : torch.Tensor, optional
        (N, K / g), any dtype; for `"quantized"` as `unpack_zeros` returns them, too.
    zeros_mode : str
        ``"original"`` and ``"quantized"``: (w - z)·s; ``"rescale"``: w·s - z.

    Returns
    -------
    torch.Tensor
        (N, K) float32.
    """
    values = code_values(codes, fmt)
    groups = next((t.shape[1] for t in (scales, zeros) if t is not None), 1)
    grouped = values.view(codes.shape[0], groups, codes.shape[1] // groups)
    shift = None if zeros is None else zeros.float().unsqueeze(2)
    if shift is not None and zeros_mode != "rescale":
        grouped = grouped.sub_(shift)
    if scales is not None:
        grouped = grouped.mul_(scales.float().unsqueeze(2))
    if shift is not None and zeros_mode == "rescale":
        grouped = grouped.sub_(shift)
    return grouped.view(codes.shape)
