"""BitLinear a second time: what its documents say, in numpy and float64, and layers to compare with that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

import bitblas
import reference

#: Each way to share a scale, for a K that 16 divides.
SCHEMES = ("ai8pc_wpt", "ai8pc_wpc", "ai8pc_wpg16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
U32 = reference.ROUNDOFF["float32"]


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff of a dtype."""
    return reference.ROUNDOFF[str(dtype).removeprefix("torch.")]


def sharing(quant_type: str, k: int) -> int | None:
    """How many consecutive weights of a row share a scale; None: all weights."""
    way = quant_type.removeprefix("ai8pc_")
    if way == "wpt":
        return None
    return k if way == "wpc" else int(way.removeprefix("wpg") or 128)


def absmean(weight: torch.Tensor, quant_type: str, eps: float) -> np.ndarray:
    """max(mean |W|, eps) as float64, (1, 1) or (N, K / group)."""
    sizes, group = weight.detach().double().abs().numpy(), sharing(quant_type, weight.shape[1])
    means = sizes.mean(keepdims=True) if group is None else sizes.reshape(len(sizes), -1, group).mean(2)
    return np.maximum(means, np.float64(np.float32(eps)))


def spread(scale: np.ndarray, shape: torch.Size | tuple[int, int]) -> np.ndarray:
    """A scale for each weight."""
    full = np.broadcast_to(scale, (shape[0], scale.shape[1]))
    return np.repeat(full, shape[1] // scale.shape[1], axis=1)


def codes(weight: torch.Tensor, quant_type: str, eps: float) -> np.ndarray:
    """clamp(rint(W / t), -1, 1) as float64 (N, K)."""
    ratio = weight.detach().double().numpy() / spread(absmean(weight, quant_type, eps), weight.shape)
    return np.clip(np.rint(ratio), -1, 1)


def held(weight: torch.Tensor, quant_type: str, eps: float) -> np.ndarray:
    """The scale in the dtype in which a layer holds it, as float64."""
    scale = torch.from_numpy(absmean(weight, quant_type, eps)).float()
    return (scale if quant_type.endswith("wpt") else scale.to(weight.dtype)).double().numpy()


@dataclass(frozen=True)
class Expected:
    """What a layer computes, in float64.

    Attributes
    ----------
    output : torch.Tensor
        (m, N), before it is rounded to the layer's dtype.
    allowed : torch.Tensor
        (m, N): how far from `output` a result may be: the roundings of t, s, their product and its product with the sum, of a
        sum of floats where groups have scales, of the bias' addition, and of the output.
    steps, whole, weight : torch.Tensor
        s (m, 1), q (m, K) and w·t (N, K).
    """

    output: torch.Tensor
    allowed: torch.Tensor
    steps: torch.Tensor
    whole: torch.Tensor
    weight: torch.Tensor


def expect(layer: bitblas.BitLinear, x: torch.Tensor) -> Expected:
    """What a layer in training makes of (m, K) activations, from its parameters."""
    weight, bias = layer.weight.detach(), layer.bias
    q, s = reference.quantize(x.detach(), 1, layer.eps)
    steps, whole = torch.from_numpy(s[:, 0].astype(np.float64)), torch.from_numpy(q[:, 0].astype(np.float64))
    dense = torch.from_numpy(
        codes(weight, layer.quant_type, layer.eps) * spread(held(weight, layer.quant_type, layer.eps), weight.shape)
    )
    scaled = whole @ dense.T * steps
    if "wpg" in layer.quant_type:
        error = (2 * math.sqrt(weight.shape[1]) + 8) * U32 * (whole.abs() @ dense.abs().T * steps)
    else:
        error = 8 * U32 * scaled.abs()
    out = scaled if bias is None else scaled + bias.detach().double()
    name = str(x.dtype).removeprefix("torch.")
    allowed = error + (U32 + reference.ROUNDOFF[name]) * out.abs() + reference._HALF_SUBNORMAL[name] + 2.0**-149
    return Expected(out, allowed, steps, whole, dense)


def assert_right(out: torch.Tensor, expected: Expected) -> None:
    """Fail where a result is farther from what is expected than rounding explains; NaN is, always."""
    wrong = ~((out.detach().double() - expected.output).abs() <= expected.allowed)
    assert out.shape == expected.output.shape
    assert not wrong.any(), (int(wrong.sum()), out[wrong][:4], expected.output[wrong][:4], expected.allowed[wrong][:4])


def clear(layer: bitblas.BitLinear) -> bool:
    """Whether no weight is so near to a tie that a rounding of the mean decides."""
    ratio = layer.weight.detach().double().numpy() / spread(
        absmean(layer.weight, layer.quant_type, layer.eps), layer.weight.shape
    )
    return float(np.abs(np.abs(ratio)[..., None] - [0.5, 1.5]).min()) > 1e-5


def make(
    N: int = 32,
    K: int = 64,
    quant_type: str = "ai8pc_wpt",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = True,
    eps: float = 1e-6,
) -> bitblas.BitLinear:
    """A layer in training with random parameters, none of them at a tie."""
    generator = torch.Generator().manual_seed(seed)
    layer = bitblas.BitLinear(K, N, bias, eps, quant_type, dtype=dtype)
    for _ in range(100):
        with torch.no_grad():
            layer.weight.copy_(0.05 * torch.randn(N, K, generator=generator))
            if bias:
                layer.bias.copy_(torch.randn(N, generator=generator))
        if clear(layer):
            return layer
    raise AssertionError("no draw without ties")


def rows(m: int = 5, K: int = 64, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Random activations (m, K), of a magnitude of their own in each row."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-2, 2, (m, 1), generator=generator)
    return (torch.randn(m, K, generator=generator) * sizes).to(dtype)


def state_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a state_dict."""
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states have equal names, dtypes and values."""
    return first.keys() == second.keys() and all(
        first[name].dtype is second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
