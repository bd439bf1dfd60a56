"""`bitblas.codecs` on layers that compressed-tensors packed: against the weight that it decompresses itself."""

import pytest
import torch

from bitblas.codecs import from_compressed

from .clients import import_client, require

require("compressed_tensors")
pytestmark = pytest.mark.interop

N, GROUP = 33, 32


def scheme_of(bits: int, strategy: str, symmetric: bool) -> object:
    """A QuantizationScheme for weights alone."""
    quantization = import_client("compressed_tensors.quantization")
    weights = quantization.QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy=strategy,
        group_size=GROUP if strategy == "group" else None,
    )
    return quantization.QuantizationScheme(targets=["Linear"], weights=weights)


def draw(k: int, bits: int, strategy: str, symmetric: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state_dict of a Linear with the parameters of its quantization: a weight that lies on their grid."""
    rows, groups = {"group": (N, k // GROUP), "channel": (N, 1), "tensor": (1, 1)}[strategy]
    scales = (2.0 ** torch.randint(-6, -2, (rows, groups))).to(dtype)
    middle = 1 << (bits - 1)
    points = torch.zeros((rows, groups), dtype=torch.int8)
    if not symmetric:
        points = torch.randint(-middle, middle, (rows, groups), dtype=torch.int8)
        points[0, 0] = -1  # were all of them 0, it would be symmetric
    spread = [part.double().expand(N, groups).repeat_interleave(k // groups, 1) for part in (scales, points)]
    weight = (torch.randint(-middle, middle, (N, k)) - spread[1]) * spread[0]
    if strategy == "tensor":
        scales, points = scales.view(1), points.view(1)
    return {"weight": weight.to(torch.float32), "weight_scale": scales, "weight_zero_point": points}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["half", "bfloat16", "float"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("strategy", "k"), [("group", 96), ("channel", 70), ("tensor", 45)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_layers(bits, strategy, k, symmetric, dtype):
    packer = import_client("compressed_tensors.compressors.pack_quantized").PackedQuantizationCompressor
    scheme = scheme_of(bits, strategy, symmetric)
    source = draw(k, bits, strategy, symmetric, dtype)
    packed = packer.compress(source, scheme)
    assert ("weight_zero_point" in packed) is not symmetric
    expected = packer.decompress(packed, scheme)["weight"]
    assert torch.equal(expected.float(), source["weight"])  # powers of two: nothing was rounded on the way
    weight = from_compressed(**packed, bits=bits)
    assert weight.W_dtype == (f"int{bits}" if symmetric and bits > 1 else f"uint{bits}")
    assert torch.equal(weight.dequantize(), source["weight"])
