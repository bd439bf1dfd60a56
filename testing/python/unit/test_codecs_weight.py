"""`QuantizedWeight`: what it stands for, against the reference, and what it refuses."""

import pytest
import torch

import reference
from bitblas.codecs import QuantizedWeight, quantize
from bitblas.codecs import weight as weight_module
from bitblas.errors import ArgumentError, ConfigError
from bitblas.formats import FORMATS

QUANTIZED = [name for name, fmt in FORMATS.items() if not fmt.is_native]
N, K, GROUPS = 6, 24, 3


def draw(
    name: str, mode: str | None, dtype: torch.dtype = torch.float16
) -> tuple[QuantizedWeight, torch.Tensor, float]:
    """A weight with columns out of order, its values in the order of the features, float64, and the largest term of any."""
    bits = reference.width(name)
    codes = torch.randint(1 << bits, (N, K))
    if name.startswith("float8"):
        codes &= 0x3F  # no NaN
    scales = torch.rand(N, GROUPS).to(dtype)
    points = torch.randint(1 << bits, (N, GROUPS))
    zeros = None
    if mode == "quantized":
        zeros = reference.pack_bits(points.T.contiguous(), bits).view(torch.int8)
    elif mode:
        zeros = points.to(dtype)
    perm = torch.randperm(K)
    packed = reference.pack_bits(codes, bits).view(torch.int8)
    weight = QuantizedWeight(name, packed, K, scales, zeros, mode or "original", perm.to(torch.int32))
    values, s, z = (
        reference.decode(codes, name).view(N, GROUPS, -1),
        scales.double()[:, :, None],
        points.double()[:, :, None],
    )
    dense = {None: values * s, "rescale": values * s - z}.get(mode, (values - z) * s).view(N, K)
    expected = torch.empty_like(dense)
    expected[:, perm] = dense
    return weight, expected, float(max((values * s).abs().max(), z.max(), (z * s).max()))


def cases():
    for name in QUANTIZED:
        yield name, None
        if FORMATS[name].is_integer:
            yield from ((name, mode) for mode in ("original", "rescale"))
        if FORMATS[name].kind == "uint":
            yield name, "quantized"


@pytest.mark.parametrize("rows", [4, 512])
@pytest.mark.parametrize(("name", "mode"), list(cases()))
def test_values(name, mode, rows, monkeypatch):
    monkeypatch.setattr(weight_module, "BLOCK_ROWS", rows)
    weight, expected, largest = draw(name, mode)
    found = weight.dequantize()
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (N, K))
    assert bool(((found.double() - expected).abs() <= 2.0**-22 * largest).all())  # two roundings, each of half of that
    assert torch.equal(weight.dequantize(torch.bfloat16), found.to(torch.bfloat16))
    blocks = list(weight.blocks())
    assert [rows.start for rows, _ in blocks] == list(range(0, N, rows))
    assert torch.equal(torch.cat([values for _, values in blocks]), found)
    assert (weight.out_features, weight.group_size, weight.format.name) == (N, K // GROUPS, name)


@pytest.mark.parametrize("name", ["uint4", "int3", "nf4"])
def test_one_group(name):
    assert quantize(torch.randn(3, 16), name).group_size == -1


def changed(**changes):
    fields = {
        "W_dtype": "uint4",
        "packed": torch.zeros((N, K // 2), dtype=torch.int8),
        "in_features": K,
        "scales": torch.ones(N, GROUPS),
        "zeros": torch.zeros((GROUPS, N // 2), dtype=torch.int8),
        "zeros_mode": "quantized",
        "perm": torch.arange(K, dtype=torch.int32),
        "bias": torch.zeros(N),
    }
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 0}, "in_features is 0; it must be an integer of at least 1"),
        ({"in_features": 24.0}, "in_features is 24.0; "),
        ({"in_features": True}, "in_features is True; "),
        ({"in_features": 26}, r"packed is torch.int8 \(6, 12\); expected torch.int8, \(6, 13\)"),
        ({"packed": None}, r"packed is NoneType; expected torch.int8 \(N, ceil\(K·bits/8\)\)"),
        ({"packed": torch.zeros(12, dtype=torch.int8)}, r"packed is torch.int8 \(12,\); "),
        ({"packed": torch.zeros((0, 12), dtype=torch.int8)}, r"packed is torch.int8 \(0, 12\); "),
        (
            {"packed": torch.zeros((N, 12), dtype=torch.uint8)},
            r"packed is torch.uint8 \(6, 12\); expected torch.int8, ",
        ),
        ({"scales": None}, "scales is a NoneType; "),
        ({"scales": torch.ones(N)}, r"scales is torch.float32 \(6,\); "),
        ({"scales": torch.ones(N, 5)}, r"scales have shape \(6, 5\); expected \(6, a divisor of K = 24\)"),
        ({"scales": torch.ones(N, 0)}, r"scales have shape \(6, 0\); "),
        ({"scales": torch.ones(5, GROUPS)}, r"scales is torch.float32 \(5, 3\); "),
        ({"scales": torch.ones((N, GROUPS), dtype=torch.float64)}, r"scales is torch.float64 \(6, 3\); "),
        (
            {"zeros": torch.zeros((GROUPS, 4), dtype=torch.int8)},
            r"zeros is torch.int8 \(3, 4\); expected torch.int8, \(3, 3\)",
        ),
        ({"zeros": torch.zeros(N, GROUPS)}, r"zeros is torch.float32 \(6, 3\); "),
        ({"zeros_mode": "original"}, r"zeros is torch.int8 \(3, 3\); expected torch.float32, \(6, 3\)"),
        ({"zeros_mode": "original", "zeros": torch.zeros((N, GROUPS)).half()}, r"zeros is torch.float16 \(6, 3\); "),
        ({"zeros_mode": "packed"}, "zeros_mode is 'packed'; allowed: original, rescale, quantized"),
        ({"zeros_mode": None}, "zeros_mode is None; "),
        ({"W_dtype": "int4"}, "zeros_mode is 'quantized', which is for uint formats; W_dtype is int4"),
        ({"W_dtype": "nf4"}, "zeros are given; nf4 has none"),
        ({"bias": torch.zeros(N, 1)}, r"bias is torch.float32 \(6, 1\); "),
        ({"perm": torch.arange(K)}, r"perm is torch.int64 \(24,\); expected torch.int32, \(24,\)"),
        ({"perm": torch.zeros(K, dtype=torch.int32)}, "perm is no permutation of 0 to 23"),
        ({"perm": torch.arange(1, K + 1, dtype=torch.int32)}, "perm is no permutation"),
        ({"perm": torch.arange(-1, K - 1, dtype=torch.int32)}, "perm is no permutation"),
    ],
)
def test_refuses(changes, message):
    QuantizedWeight(**changed())
    with pytest.raises(ArgumentError, match=f"^{message}"):
        QuantizedWeight(**changed(**changes))


def test_refuses_formats():
    with pytest.raises(ConfigError, match=r"^W_dtype is 'uint9', which is no format"):
        QuantizedWeight(**changed(W_dtype="uint9"))
