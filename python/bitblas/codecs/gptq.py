"""GPTQ checkpoints, of AutoGPTQ and GPTQModel: words along K, act-order, zero points stored minus one or not."""

from __future__ import annotations

import torch

from .weight import QuantizedWeight


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    bits: int = 4,
    version: int = 1,
    sym: bool | None = None,
    bias: torch.Tensor | None = None,
    zeros_mode: str | None = None,
) -> QuantizedWeight:
    """Repack a linear layer of a GPTQ checkpoint.

    Parameters
    ----------
    qweight : torch.Tensor
        int32 (K·bits/32, N): codes packed along K, little-endian.
    qzeros : torch.Tensor
        int32 (G, N·bits/32): zero points packed along N.
    scales : torch.Tensor
        (G, N), float16, bfloat16 or float32.
    g_idx : torch.Tensor, optional
        int32 or int64 (K,): the group of each column. In order it says nothing; else (act-order) columns are sorted by it.
    bits : int
        2, 3, 4 or 8.
    version : int
        1: zero points are stored minus one (checkpoint_format "gptq"); 2: as they are ("gptq_v2").
    sym : bool, optional
        True: all zero points have to be 2^(bits-1).
    bias : torch.Tensor, optional
        (N,), any floating-point dtype.
    zeros_mode : str, optional
        ``"quantized"``, ``"original"`` or ``"rescale"``. None: no zero points and an int format where all of them are
        2^(bits-1), else ``"quantized"``.

    Returns
    -------
    QuantizedWeight
        uint{bits}, or int{bits} without zero points.

    Raises
    ------
    ArgumentError
        A shape, dtype or value that is not as above, or groups of unequal size.
    """
    raise NotImplementedError


def from_gptq_module(module: torch.nn.Module, version: int = 1, zeros_mode: str | None = None) -> QuantizedWeight:
    """Repack a QuantLinear of AutoGPTQ or GPTQModel: a module with `qweight`, `qzeros`, `scales`, `bits`, and `g_idx` and `bias`.

    `g_idx` and `bias` may be absent or None. The other parameters, and what is raised, as in `from_gptq`.
    """
    raise NotImplementedError
