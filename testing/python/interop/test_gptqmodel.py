"""GPTQModel's own layers for BitBLAS, unmodified: against the weight that its plain torch layers dequantize."""

from types import ModuleType

import pytest
import torch
from torch import nn

import bitblas

from .clients import import_client, require

require("gptqmodel")
pytestmark = pytest.mark.interop

N, K = 256, 512
ROWS = [(1,), (2,), (17,), (257,), (2, 5), (3, 1, 4)]


def gptqmodel(module: str) -> ModuleType:
    return import_client(f"gptqmodel.{module}")


@pytest.fixture
def backend(monkeypatch, tmp_path) -> ModuleType:
    """gptqmodel.nn_modules.qlinear.bitblas, for this CPU.

    The first layer asks nvidia-smi what to compile for and stores it in two variables of the module. They are filled in
    here, as GPTQModel's own tests do; nothing else stands between the layers and a CPU.
    """
    module = gptqmodel("nn_modules.qlinear.bitblas")
    monkeypatch.setattr(module, "BITBLAS_TARGET", "llvm")
    monkeypatch.setattr(module, "BITBLAS_DATABASE_PATH", str(tmp_path / "database"))
    return module


def draw(
    bits: int, group_size: int, sym: bool, bias: bool, top: int | None = None
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A Linear whose weight lies on a grid, and the grid's scales and zero points, (N, groups).

    Parameters
    ----------
    top : int, optional
        Largest zero point.
    """
    groups = 1 if group_size == -1 else K // group_size
    codes = torch.randint(2**bits, (N, K))
    scales = (0.01 + 0.02 * torch.rand(N, groups)).to(torch.float16).to(torch.float32)
    zeros = torch.full((N, groups), 2.0 ** (bits - 1))
    if not sym:
        zeros = torch.randint((2**bits - 1 if top is None else top) + 1, (N, groups)).to(torch.float32)
    linear = nn.Linear(K, N, bias=bias)
    spread = [part.repeat_interleave(K // groups, dim=1) for part in (scales, zeros)]
    linear.weight.data = (codes - spread[1]) * spread[0]
    return linear, scales, zeros


def torch_layer(bits: int, group_size: int, sym: bool, bias: bool, top: int | None = None) -> nn.Module:
    """GPTQModel's TorchLinear, packed by its own code."""
    linear, scales, zeros = draw(bits, group_size, sym, bias, top)
    layer = gptqmodel("nn_modules.qlinear.torch").TorchLinear(
        bits=bits, group_size=group_size, sym=sym, desc_act=False, in_features=K, out_features=N, bias=bias
    )
    groups = torch.arange(K, dtype=torch.int32) // (K // scales.shape[1])
    layer.pack_original(linear, scales, zeros, groups)
    return layer.eval()


def dequantized(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The weight of a TorchLinear, by its own dequantization, the part of its zero points, and its bias.

    A float16 scale times a difference of codes has at most 20 bits, which float64 holds; the layer would round to float16.
    """
    scales, qzeros = layer.scales, layer.qzeros
    try:
        layer.scales = scales.to(torch.float64)
        weight = layer.dequantize_weight().T
        layer.qzeros = torch.zeros_like(qzeros)
        zeros = layer.dequantize_weight().T - weight
    finally:
        layer.scales, layer.qzeros = scales, qzeros
    assert weight.dtype is torch.float64
    return {"weight": weight, "zeros": zeros, "bias": None if layer.bias is None else layer.bias.detach()}


def bitblas_layer(backend: ModuleType, source: nn.Module, **options: object) -> nn.Module:
    """The BitblasLinear for a TorchLinear's tensors."""
    layer = backend.BitblasLinear(
        bits=source.bits,
        group_size=source.requested_group_size,
        desc_act=False,
        sym=source.sym,
        in_features=K,
        out_features=N,
        bias=source.bias is not None,
        **options,
    )
    layer.repack_from_gptq(source)
    return layer


def check(assert_close, layer: nn.Module, own: dict[str, torch.Tensor], dtype: torch.dtype = torch.float16) -> None:
    for rows in ROWS:
        x = torch.randn(*rows, K).to(dtype)
        out = layer(x)
        assert out.dtype is dtype
        assert_close(out, x, **own)


def test_the_version_is_accepted(backend):
    assert backend.BITBLAS_AVAILABLE
    assert backend.BitblasLinear.validate_once() == (True, None)


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4])
def test_forward(backend, assert_close, bits, sym, group_size):
    source = torch_layer(bits, group_size, sym, bias=group_size in (-1, 64))
    check(assert_close, bitblas_layer(backend, source), dequantized(source))


@pytest.mark.parametrize(
    ("sym", "top"),
    [
        pytest.param(False, 15, id="asym-zeros-to-15"),
        pytest.param(
            False,
            255,
            id="asym",
            marks=pytest.mark.xfail(
                strict=True, raises=AssertionError, reason="gptqmodel: unpack_gptq_qzeros masks 8-bit zeros with 0xF"
            ),
        ),
        pytest.param(
            True,
            None,
            id="sym",
        ),
    ],
)
def test_eight_bits(backend, assert_close, sym, top):
    source = torch_layer(8, 64, sym, bias=True, top=top)
    check(assert_close, bitblas_layer(backend, source), dequantized(source))


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_bfloat16(backend, assert_close, sym):
    """The layer computes in float16 and rounds at its border."""
    source = torch_layer(4, 64, sym, bias=True)
    layer = bitblas_layer(backend, source, dtype=torch.bfloat16)
    check(assert_close, layer, dequantized(source), torch.bfloat16)


def test_awq(backend, assert_close):
    linear, scales, zeros = draw(4, 64, sym=False, bias=True)
    options = {"bits": 4, "group_size": 64, "sym": False, "desc_act": False, "in_features": K, "out_features": N}
    source = gptqmodel("nn_modules.qlinear.torch_awq").AwqTorchLinear(bias=True, register_buffers=True, **options)
    source.pack(linear.to(torch.float16), scales.to(torch.float16), zeros.to(torch.float16))
    layer = gptqmodel("nn_modules.qlinear.bitblas_awq").AWQBitBlasKernel(bias=True, **options)
    layer.repack_from_awq(source)

    dequantize = gptqmodel("quantization.awq.utils.packing_utils").dequantize_gemm
    parts = {"scales": source.scales.to(torch.float64), "bits": 4, "group_size": 64}
    weight = dequantize(source.qweight, source.qzeros, **parts).T
    without_zeros = dequantize(source.qweight, torch.zeros_like(source.qzeros), **parts).T
    check(assert_close, layer, {"weight": weight, "zeros": without_zeros - weight, "bias": source.bias.detach()})


def test_convert_to_bitblas(backend, assert_close):
    """What GPTQModel calls when it loads a model: layers are made on the meta device and replace the others."""
    convert = gptqmodel("utils.bitblas").convert_to_bitblas
    quantization = gptqmodel("quantization")
    config = quantization.QuantizeConfig(bits=4, group_size=64, sym=False, desc_act=False)
    sources = [torch_layer(4, 64, sym=False, bias=bias) for bias in (True, False)]
    own = [dequantized(source) for source in sources]
    model = convert(nn.ModuleList(sources), type(sources[0]), config, sym=False, desc_act=False, repack=True)
    for layer, reference in zip(model, own, strict=True):
        assert type(layer) is backend.BitblasLinear
        check(assert_close, layer, reference)


def test_a_state_dict_comes_back(backend):
    source = torch_layer(4, 64, sym=False, bias=True)
    layer = bitblas_layer(backend, source)
    other = bitblas_layer(backend, torch_layer(4, 64, sym=False, bias=True))
    x = torch.randn(3, K).to(torch.float16)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.slow
def test_a_tuned_operator_is_stored_and_found(backend, assert_close):
    cache = bitblas.cache.global_operator_cache
    cache.clear()
    source = torch_layer(4, 64, sym=True, bias=False)
    tuned = bitblas_layer(backend, source, enable_tuning=True, opt_features=[1])
    assert cache.get(tuned.bitblas_matmul.config) is tuned.bitblas_matmul
    check(assert_close, tuned, dequantized(source))

    cache.clear()
    found = bitblas_layer(backend, source, enable_tuning=False, opt_features=[1])
    assert cache.get(found.bitblas_matmul.config) is found.bitblas_matmul
    check(assert_close, found, dequantized(source))
    assert torch.equal(found.qweight, tuned.qweight)


def test_the_bound_notices_one_wrong_code(backend, assert_close):
    source = torch_layer(4, 64, sym=True, bias=False)
    layer = bitblas_layer(backend, source)
    layer.qweight.view(torch.uint8)[0, 0] ^= 1
    with pytest.raises(AssertionError, match="results are wrong"):
        check(assert_close, layer, dequantized(source))
