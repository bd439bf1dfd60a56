"""Dense weights to quantized ones, rounded to the nearest code."""

from __future__ import annotations

import torch

from .weight import QuantizedWeight


def quantize(
    weight: torch.Tensor,
    W_dtype: str,
    group_size: int = -1,
    symmetric: bool | None = None,
    scale_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to the nearest code, each group with a scale of its own.

    Parameters
    ----------
    weight : torch.Tensor
        (N, K), any floating-point dtype.
    W_dtype : str
        uint1 to uint8, int1 to int8, nf4, fp4_e2m1, float8_e4m3 or float8_e5m2.
    group_size : int
        How many consecutive columns share a scale: a divisor of K; -1: all.
    symmetric : bool, optional
        None: as the format is, uint formats not and all others symmetric.
    scale_dtype : torch.dtype, optional
        float16, bfloat16 or float32. None: that of `weight`, or float32 where that is none of these.
    bias : torch.Tensor, optional
        (N,), kept as it is.

    Returns
    -------
    QuantizedWeight

    Raises
    ------
    ArgumentError
        An argument that is not as above; a weight that is not finite or whose scale `scale_dtype` cannot hold.
    """
    raise NotImplementedError
