"""HQQ's own layer for BitBLAS, `hqq.backends.bitblas`, unmodified: against the weight that HQQ dequantizes."""

from types import ModuleType

import pytest
import torch
from torch import nn

from .clients import import_client, require

require("hqq")
pytestmark = pytest.mark.interop

N, K = 256, 512
ROWS = [(1,), (2,), (17,), (257,), (2, 5), (3, 1, 4)]


@pytest.fixture
def backend(monkeypatch) -> ModuleType:
    """hqq.backends.bitblas, without the operators of other tests."""
    module = import_client("hqq.backends.bitblas")
    monkeypatch.setattr(module.HQQLinearBitBlas, "ENG_CACHE", {})
    return module


@pytest.fixture
def quantize(backend):
    """Make an HQQLinear on the CPU."""
    quantization = import_client("hqq.core.quantize")

    def make(nbits: int, group_size: int | None, bias: bool = False, shape: tuple[int, int] = (N, K)) -> nn.Module:
        config = quantization.BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=1)
        linear = nn.Linear(shape[1], shape[0], bias=bias)
        return quantization.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")

    return make


def dequantized(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The weight of an HQQLinear, by HQQ's own dequantization in float64; the part of its zero points; its bias."""
    quantizer = import_client("hqq.core.quantize").Quantizer
    meta = {**layer.meta, "compute_dtype": torch.float64}
    weight = quantizer.dequantize(layer.W_q, meta)
    without_zeros = quantizer.dequantize(layer.W_q, {**meta, "zero": torch.zeros_like(meta["zero"])})
    assert weight.dtype is torch.float64
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return {"weight": weight, "zeros": without_zeros - weight, "bias": bias}


def activations(*rows: int, k: int = K) -> torch.Tensor:
    return torch.randn(*rows, k).to(torch.float16)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("nbits", [1, 2, 4])
def test_forward(backend, quantize, assert_close, nbits, group_size):
    layer = quantize(nbits, group_size, bias=group_size in (64, 256))
    own = dequantized(layer)
    patched = backend.patch_hqq_to_bitblas(layer, None)
    assert type(patched) is backend.HQQLinearBitBlas
    for rows in ROWS:
        x = activations(*rows)
        assert_close(patched(x), x, **own)


def test_one_group_for_a_row(backend, quantize, assert_close):
    layer = quantize(4, None, shape=(64, 256))
    own = dequantized(layer)
    patched = backend.patch_hqq_to_bitblas(layer, None)
    assert type(patched) is backend.HQQLinearBitBlas
    assert patched.group_size == 256
    x = activations(3, k=256)
    assert_close(patched(x), x, **own)


@pytest.mark.parametrize("nbits", [1, 2, 4])
def test_the_backend_dequantizes(backend, quantize, assert_close, nbits):
    """HQQ reads the weight back as the product with an identity matrix: K rows, each of one term."""
    layer = quantize(nbits, 64)
    own = dequantized(layer)
    read = backend.patch_hqq_to_bitblas(layer, None).dequantize()
    assert_close(read.T, torch.eye(K, dtype=torch.float16), **own)


def test_eight_bits(backend, quantize, assert_close, monkeypatch):
    """HQQ's table ends at four bits; gemlite's benchmarks add this row to it and skip the check of a layer."""
    monkeypatch.setitem(backend.HQQLinearBitBlas.BIT_TO_DTYPE, 8, "uint8")
    monkeypatch.setattr(backend.HQQLinearBitBlas, "check", lambda layer: True)
    monkeypatch.setattr(backend.HQQLinearBitBlas, "DEFAULT_BATCHSIZE", [1, 16])
    layer = quantize(8, 128, bias=True)
    own = dequantized(layer)
    patched = backend.patch_hqq_to_bitblas(layer, None)
    for rows in ROWS:
        x = activations(*rows)
        assert_close(patched(x), x, **own)


def test_layers_of_one_shape_share_an_operator(backend, quantize, assert_close):
    layers = [quantize(4, 64) for _ in range(2)]
    own = [dequantized(layer) for layer in layers]
    patched = [backend.patch_hqq_to_bitblas(layer, None) for layer in layers]
    assert patched[0].matmul_eng is patched[1].matmul_eng
    x = activations(4)
    for layer, reference in zip(patched, own, strict=True):
        assert_close(layer(x), x, **reference)


def test_the_bound_notices_one_wrong_code(backend, quantize, assert_close):
    layer = quantize(4, 64)
    own = dequantized(layer)
    patched = backend.patch_hqq_to_bitblas(layer, None)
    patched.W_q.view(torch.uint8)[0, 0] ^= 1
    x = activations(8)
    with pytest.raises(AssertionError, match="results are wrong"):
        assert_close(patched(x), x, **own)


class Model(nn.Module):
    """As much of a model as `prepare_for_inference` looks at."""

    device, dtype = torch.device("cpu"), torch.float16

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)


def test_prepare_for_inference(backend, quantize, assert_close):
    """What users of HQQ call: it replaces every layer of a model."""
    patching = import_client("hqq.utils.patching")
    layers = [quantize(4, 64, bias=True), quantize(2, 32, shape=(128, N))]
    own = [dequantized(layer) for layer in layers]
    model = Model(*layers)
    patching.prepare_for_inference(model, backend="bitblas")
    x = activations(7)
    for layer, reference in zip(model.layers, own, strict=True):
        assert type(layer) is backend.HQQLinearBitBlas
        out = layer(x)
        assert_close(out, x, **reference)
        x = out


def test_torch_compile(backend, quantize):
    """HQQ registers the call as an operator of torch, which is traced with a fake of it."""
    patched = backend.patch_hqq_to_bitblas(quantize(4, 64, bias=True), None)
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    x = activations(2, 5)
    with torch.no_grad():
        assert torch.equal(compiled(x), patched(x))
