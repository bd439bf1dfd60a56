"""What a deployed BitLinear computes, in torch, with gradients that pass roundings as if they were not there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ..codecs.ternary import TernaryScheme, to_ternary


def ternary_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scheme: TernaryScheme, eps: float
) -> torch.Tensor:
    """y = (q · wᵀ) · (t · s) + bias, computed in float32; see `BitLinear`.

    Parameters
    ----------
    x : torch.Tensor
        (..., K) in the dtype of `weight`.
    weight : torch.Tensor
        (N, K), float32, float16 or bfloat16.
    bias : torch.Tensor or None
        (N,).
    scheme : TernaryScheme
        Which weights share t.
    eps : float
        The least mean magnitude of weights, and the least largest one of a row of activations.

    Returns
    -------
    torch.Tensor
        (..., N) in the dtype of `x`.
    """
    values, weights = x.float(), weight.float()
    step = row_steps(values, eps)
    q = _straight_through(values / step, torch.round)
    scale = scheme.scale(weights, eps)
    w = _straight_through(weights / scheme.spread(scale), to_ternary)
    scale = scheme.held(scale, x.dtype)
    if scheme.group in (None, -1):  # integers that float32 sums exactly
        y = functional.linear(q, w) * (scale.view(-1) * step)
    else:
        y = functional.linear(q, w * scheme.spread(scale)) * step
    return (y if bias is None else y + bias.float()).to(x.dtype)


def row_steps(values: torch.Tensor, eps: float) -> torch.Tensor:
    """s = max(max |x|, eps) / 127 of each row of float32 activations: (..., K) to (..., 1), without a gradient."""
    # by a number it would be multiplied with a reciprocal
    most = torch.full((), 127.0, device=values.device)
    return values.detach().abs().amax(-1, keepdim=True).clamp(min=eps) / most


def _straight_through(value: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A rounded value, exactly, with the gradient of the value."""
    held = value.detach()
    return rounding(held) + (value - held)
