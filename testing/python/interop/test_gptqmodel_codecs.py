"""`bitblas.codecs` on layers that GPTQModel packed: against the weight that its plain torch layers dequantize."""

from types import ModuleType

import pytest
import torch
from torch import nn

from bitblas.codecs import QuantizedWeight, from_awq, from_gptq_module

from .clients import import_client, require

require("gptqmodel")
pytestmark = pytest.mark.interop

N, K, GROUP = 64, 256, 32


def gptqmodel(module: str) -> ModuleType:
    return import_client(f"gptqmodel.{module}")


def draw(
    bits: int, sym: bool, least: int, act_order: bool
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A Linear whose weight lies on a grid, the grid's scales and zero points, (N, G), and the group of each column."""
    g_idx = torch.arange(K, dtype=torch.int32) // GROUP
    g_idx = g_idx[torch.randperm(K)] if act_order else g_idx
    codes = torch.randint(2**bits, (N, K))
    scales = (0.01 + 0.02 * torch.rand(N, K // GROUP)).to(torch.float16).to(torch.float32)
    zeros = torch.randint(least, 2**bits, (N, K // GROUP)).to(torch.float32)
    if sym:
        zeros = torch.full((N, K // GROUP), 2.0 ** (bits - 1))
    linear = nn.Linear(K, N)
    columns = g_idx.long()
    linear.weight.data = (codes - zeros[:, columns]) * scales[:, columns]
    return linear, scales, zeros, g_idx


def torch_layer(bits: int, sym: bool, least: int, act_order: bool) -> nn.Module:
    """GPTQModel's TorchLinear, packed by its own code, with zero points as they are (version 2)."""
    linear, scales, zeros, g_idx = draw(bits, sym, least, act_order)
    layer = gptqmodel("nn_modules.qlinear.torch").TorchLinear(
        bits=bits, group_size=GROUP, sym=sym, desc_act=act_order, in_features=K, out_features=N, bias=True
    )
    layer.pack_original(linear, scales, zeros, g_idx)
    return layer.eval()


def dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight of a TorchLinear, (N, K) float64, by its own dequantization: 20 bits, which float64 holds."""
    scales = layer.scales
    try:
        layer.scales = scales.to(torch.float64)
        weight = layer.dequantize_weight().T
    finally:
        layer.scales = scales
    assert weight.dtype is torch.float64
    return weight


def check(weight: QuantizedWeight, layer: nn.Module, expected: torch.Tensor, bits: int, sym: bool) -> None:
    assert weight.W_dtype == (f"int{bits}" if sym else f"uint{bits}")
    assert torch.equal(weight.dequantize(torch.float64), expected)
    assert torch.equal(weight.bias, layer.bias)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize(("sym", "least"), [(True, 0), (False, 1), (False, 0)], ids=["sym", "asym", "asym-zeros-of-0"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_both_versions(bits, sym, least, act_order):
    """Version 1 is what GPTQModel writes into a checkpoint: its own conversion, of whole words but for 3 bits."""
    layer = torch_layer(bits, sym, least, act_order)
    expected = dequantized(layer)
    check(from_gptq_module(layer, version=2), layer, expected, bits, sym)
    model = gptqmodel("utils.model")
    before = layer.qzeros.clone()
    config = gptqmodel("quantization").QuantizeConfig(bits=bits, group_size=GROUP)
    model.convert_gptq_v2_to_v1_format_module(layer, config)
    assert not torch.equal(layer.qzeros, before)
    check(from_gptq_module(layer, version=1), layer, expected, bits, sym)
    model.convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    assert torch.equal(layer.qzeros, before)


@pytest.mark.parametrize("zeros_mode", ["original", "quantized", "rescale"])
def test_zeros_modes(zeros_mode):
    layer = torch_layer(4, sym=False, least=0, act_order=True)
    weight, expected = from_gptq_module(layer, 2, zeros_mode), dequantized(layer)
    if zeros_mode != "rescale":
        check(weight, layer, expected, 4, sym=False)
    else:  # a zero point times a scale is rounded to float16
        magnitude = 15 * layer.scales.double().max()
        assert float((weight.dequantize(torch.float64) - expected).abs().max()) <= 2.0**-11 * magnitude


def test_awq():
    linear, scales, zeros, _ = draw(4, sym=False, least=0, act_order=False)
    options = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "in_features": K, "out_features": N}
    layer = gptqmodel("nn_modules.qlinear.torch_awq").AwqTorchLinear(bias=True, register_buffers=True, **options)
    layer.pack(linear.to(torch.float16), scales.to(torch.float16), zeros.to(torch.float16))
    dequantize = gptqmodel("quantization.awq.utils.packing_utils").dequantize_gemm
    expected = dequantize(layer.qweight, layer.qzeros, layer.scales.double(), bits=4, group_size=GROUP).T
    weight = from_awq(layer.qweight, layer.qzeros, layer.scales, bias=layer.bias.detach())
    check(weight, layer, expected, 4, sym=False)
