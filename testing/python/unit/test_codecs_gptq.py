"""`from_gptq`: tensors that were packed from the format's documentation come back as what they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import foreign
from bitblas.codecs import from_gptq, from_gptq_module
from bitblas.codecs import words as words_module
from bitblas.errors import ArgumentError
from foreign import check, draw, row_bytes

BITS = [2, 3, 4, 8]
VERSIONS = [1, 2]


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "groups"), [(32, 32, 1), (96, 64, 2), (32, 128, 4), (64, 96, 96), (160, 2080, 65)])
def test_layers(bits, version, n, k, groups, act_order):
    codes, zeros, scales, g_idx = draw(n, k, bits, groups, act_order)
    weight = from_gptq(**foreign.pack_gptq(codes, zeros, scales, bits, version, g_idx), bits=bits, version=version)
    assert (weight.W_dtype, weight.zeros_mode) == (f"uint{bits}", "quantized")
    assert torch.equal(weight.zeros, row_bytes(zeros.T, bits))
    check(weight, codes, zeros, scales, g_idx, bits)


@given(
    bits=st.sampled_from(BITS),
    version=st.sampled_from(VERSIONS),
    n=st.integers(1, 5),
    units=st.integers(1, 6),
    group_units=st.integers(1, 3),
    act_order=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_layer(bits, version, n, units, group_units, act_order, seed):
    n *= 32 if bits == 3 else 32 // bits
    k = 32 * units * group_units
    codes, zeros, scales, g_idx = draw(n, k, bits, k // (8 * group_units), act_order, seed=seed)
    packed = foreign.pack_gptq(codes, zeros, scales, bits, version, g_idx)
    check(from_gptq(**packed, bits=bits, version=version), codes, zeros, scales, g_idx, bits)


@pytest.mark.parametrize("bits", BITS)
def test_small_blocks(bits, monkeypatch):
    """A layer that is turned in many blocks, the last of them narrower."""
    monkeypatch.setattr(words_module, "_BLOCK_WORDS", 1)
    monkeypatch.setattr(words_module, "_LEAST_COLUMNS", 2)
    codes, zeros, scales, g_idx = draw(96 if bits == 3 else 5 * 32 // bits, 64, bits, 4, True)
    packed = foreign.pack_gptq(codes, zeros, scales, bits, 1, g_idx)
    check(from_gptq(**packed, bits=bits), codes, zeros, scales, g_idx, bits)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", BITS)
def test_middle_zero_points_become_int_formats(bits, version):
    codes, _, scales, g_idx = draw(32, 64, bits, 4, act_order=True)
    zeros = np.full((32, 4), 1 << (bits - 1))
    packed = foreign.pack_gptq(codes, zeros, scales, bits, version, g_idx)
    for sym in (None, True, False):
        weight = from_gptq(**packed, bits=bits, version=version, sym=sym)
        assert (weight.W_dtype, weight.zeros) == (f"int{bits}", None)
        check(weight, codes, zeros, scales, g_idx, bits)
    kept = from_gptq(**packed, bits=bits, version=version, zeros_mode="quantized")
    assert kept.W_dtype == f"uint{bits}"
    assert torch.equal(kept.zeros, row_bytes(zeros.T, bits))
    zeros[31, 3] += 1
    packed = foreign.pack_gptq(codes, zeros, scales, bits, version, g_idx)
    weight = from_gptq(**packed, bits=bits, version=version)
    assert weight.W_dtype == f"uint{bits}"
    check(weight, codes, zeros, scales, g_idx, bits)
    with pytest.raises(
        ArgumentError, match=rf"^qzeros holds zero points that are not {1 << (bits - 1)}; with sym=True"
    ):
        from_gptq(**packed, bits=bits, version=version, sym=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zeros_modes(bits, dtype):
    codes, zeros, scales, g_idx = draw(32, 64, bits, 4)
    packed = foreign.pack_gptq(codes, zeros, scales, bits)
    packed["scales"] = packed["scales"].to(dtype)
    held = packed["scales"].t().to(torch.float64)
    original = from_gptq(**packed, bits=bits, zeros_mode="original")
    assert (original.zeros.dtype, original.zeros_mode) == (dtype, "original")
    assert torch.equal(original.zeros.double(), torch.from_numpy(zeros).double())
    rescale = from_gptq(**packed, bits=bits, zeros_mode="rescale")
    assert (rescale.zeros.dtype, rescale.zeros_mode) == (dtype, "rescale")
    assert torch.equal(rescale.zeros, (torch.from_numpy(zeros).double() * held).to(dtype))
    for weight in (original, rescale):
        assert weight.W_dtype == f"uint{bits}"
        assert torch.equal(weight.packed, row_bytes(codes, bits))
        assert torch.equal(weight.scales, packed["scales"].t())
    expected = foreign.values(codes, zeros, held.numpy(), g_idx)
    assert torch.equal(original.dequantize(torch.float64), torch.from_numpy(expected))


def test_rescale_refuses_what_overflows():
    codes, zeros, scales, _ = draw(8, 32, 4, 1, least_zero=15)
    packed = foreign.pack_gptq(codes, zeros, scales * 0 + 60000, 4)
    with pytest.raises(ArgumentError, match=r"^scales are too large for zeros_mode 'rescale': .* leave torch.float16"):
        from_gptq(**packed, zeros_mode="rescale")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_zero_borrows_in_version_1(bits):
    """GPTQModel subtracts 1 from all fields of a word at once, so that a 0 takes from the fields above it."""
    codes, zeros, scales, g_idx = draw(32, 64, bits, 4, least_zero=0)
    zeros[:, 0], zeros[::2, 1], zeros[-1] = 0, 0, 0
    packed = foreign.pack_gptq(codes, zeros, scales, bits, version=2, g_idx=g_idx)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    stored = [[(word - ones) % 2**32 for word in row] for row in packed["qzeros"].tolist()]
    packed["qzeros"] = torch.tensor([[word - (word >> 31 << 32) for word in row] for row in stored], dtype=torch.int32)
    check(from_gptq(**packed, bits=bits, version=1), codes, zeros, scales, g_idx, bits)


def test_a_zero_point_of_zero_wraps_in_version_1_of_three_bits():
    codes, zeros, scales, g_idx = draw(32, 64, 3, 4, least_zero=0)
    zeros[::3] = 0
    packed = foreign.pack_gptq(codes, (zeros - 1) % 8, scales, 3, version=2, g_idx=g_idx)
    check(from_gptq(**packed, bits=3, version=1), codes, zeros, scales, g_idx, 3)


@given(
    bits=st.sampled_from(BITS),
    version=st.sampled_from(VERSIONS),
    act_order=st.booleans(),
    name=st.sampled_from(["qweight", "qzeros", "scales"]),
    place=st.integers(0, 2**31),
    middle=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_one_flipped_bit_is_noticed(bits, version, act_order, name, place, middle):
    codes, zeros, scales, g_idx = draw(32, 64, bits, 4, act_order)
    zeros = np.full_like(zeros, 1 << (bits - 1)) if middle else zeros
    packed = foreign.pack_gptq(codes, zeros, scales, bits, version, g_idx)
    whole = from_gptq(**packed, bits=bits, version=version).dequantize()
    flat = packed[name].view(torch.uint8).view(-1)
    flat[place // 8 % flat.numel()] ^= 1 << place % 8
    try:
        damaged = from_gptq(**packed, bits=bits, version=version).dequantize()
    except ArgumentError:
        return  # a scale that is no longer finite
    assert not torch.equal(whole, damaged)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", BITS)
def test_results_have_memory_of_their_own(bits, version):
    codes, zeros, scales, _ = draw(32, 32, bits, 1)
    packed = foreign.pack_gptq(codes, zeros, scales, bits, version)
    packed["bias"] = torch.randn(32)
    before = {name: part.clone() for name, part in packed.items()}
    weight = from_gptq(**packed, bits=bits, version=version)
    for part in (weight.packed, weight.scales, weight.zeros, weight.bias):
        part.zero_()
    assert all(torch.equal(part, before[name]) for name, part in packed.items())


def test_strides_and_the_bias():
    codes, zeros, scales, g_idx = draw(64, 64, 4, 2, act_order=True)
    packed = foreign.pack_gptq(codes, zeros, scales, 4, g_idx=g_idx)
    strided = {name: part.t().contiguous().t() for name, part in packed.items()}
    bias = torch.randn(64, dtype=torch.float16)
    weight = from_gptq(**strided, bias=bias)
    check(weight, codes, zeros, scales, g_idx, 4)
    assert torch.equal(weight.bias, bias)
    wide = from_gptq(**{**packed, "g_idx": packed["g_idx"].long()})
    check(wide, codes, zeros, scales, g_idx, 4)
    assert from_gptq(packed["qweight"], packed["qzeros"], packed["scales"]).perm is None


def changed(**changes):
    codes, zeros, scales, _ = draw(32, 64, 4, 4)
    return {**foreign.pack_gptq(codes, zeros, scales, 4), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5; allowed: 2, 3, 4, 8"),
        ({"bits": 4.0}, "bits is 4.0; "),
        ({"bits": "4"}, "bits is '4'; "),
        ({"bits": True}, "bits is True; "),
        ({"version": 3}, "version is 3; allowed: 1, 2"),
        ({"version": True}, "version is True; "),
        ({"sym": 1}, "sym is 1; allowed: None, True, False"),
        ({"zeros_mode": "packed"}, "zeros_mode is 'packed'; allowed: original, rescale, quantized"),
        ({"qweight": None}, "qweight is a NoneType; expected an int32 tensor"),
        ({"qweight": torch.zeros(8, 32)}, r"qweight is torch.float32 \(8, 32\); expected torch.int32"),
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, r"qweight is torch.int32 \(8,\); "),
        ({"qweight": torch.zeros((0, 32), dtype=torch.int32)}, r"qweight is torch.int32 \(0, 32\); "),
        ({"qweight": torch.zeros((8, 30), dtype=torch.int32)}, r"qweight has shape \(8, 30\); .* N is a multiple of 8"),
        (
            {"qweight": torch.zeros((8, 32), dtype=torch.int32), "bits": 3},
            r"qweight has shape \(8, 32\); .* units of 3 words",
        ),
        ({"scales": torch.zeros((4, 32), dtype=torch.int8)}, r"scales is torch.int8 \(4, 32\); expected torch.float16"),
        ({"scales": torch.zeros((4, 31))}, r"scales is torch.float32 \(4, 31\); expected .* \(G, 32\)"),
        ({"scales": torch.zeros(32)}, r"scales is torch.float32 \(32,\); "),
        ({"scales": torch.zeros((0, 32))}, r"scales is torch.float32 \(0, 32\); "),
        ({"scales": [1.0]}, "scales is a list; "),
        ({"scales": torch.ones((3, 32))}, r"scales has shape \(3, 32\), 3 groups; .* K = 64 is no multiple of 3"),
        ({"scales": torch.full((4, 32), float("nan"))}, "scales holds nan; expected finite numbers"),
        ({"scales": torch.full((4, 32), float("inf"))}, "scales holds inf; "),
        ({"qzeros": None}, "qzeros is a NoneType; "),
        ({"qzeros": torch.zeros((4, 3), dtype=torch.int32)}, r"qzeros is torch.int32 \(4, 3\); expected .* \(4, 4\)"),
        ({"qzeros": torch.zeros((4, 4), dtype=torch.int64)}, r"qzeros is torch.int64 \(4, 4\); "),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx is torch.int32 \(63,\); expected .* \(64,\)"),
        ({"g_idx": torch.zeros(64)}, r"g_idx is torch.float32 \(64,\); "),
        ({"g_idx": [0] * 64}, "g_idx is a list; "),
        ({"g_idx": torch.arange(64, dtype=torch.int32) // 8}, "g_idx holds 7; allowed: 0 to 3"),
        ({"g_idx": torch.arange(64) // 16 - 1}, "g_idx holds -1; allowed: 0 to 3"),
        ({"g_idx": torch.arange(64) // 17}, "g_idx gives group 0 17 columns; groups must be equally large, 16 columns"),
        ({"bias": torch.zeros(31)}, r"bias is torch.float32 \(31,\); expected .* \(32,\)"),
        ({"bias": torch.zeros(32, dtype=torch.int32)}, r"bias is torch.int32 \(32,\); "),
        ({"bias": [0.0]}, "bias is a list; "),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        from_gptq(**changed(**changes))


class QuantLinear(nn.Module):
    """What AutoGPTQ's and GPTQModel's layers have in common."""

    def __init__(self, bits, bias=None, **tensors):
        super().__init__()
        self.bits = bits
        for name, part in tensors.items():
            self.register_buffer(name, part)
        if bias is None:
            self.bias = None
        else:
            self.bias = nn.Parameter(bias)


@pytest.mark.parametrize("version", VERSIONS)
def test_modules(version):
    codes, zeros, scales, g_idx = draw(64, 64, 4, 2, act_order=True)
    packed = foreign.pack_gptq(codes, zeros, scales, 4, version, g_idx)
    bias = torch.randn(64)
    weight = from_gptq_module(QuantLinear(4, bias, **packed), version)
    check(weight, codes, zeros, scales, g_idx, 4)
    assert torch.equal(weight.bias, bias)
    assert not weight.bias.requires_grad
    assert from_gptq_module(QuantLinear(4, **packed), version, "original").zeros_mode == "original"


def test_modules_without_an_order():
    codes, zeros, scales, g_idx = draw(64, 64, 4, 2)
    packed = foreign.pack_gptq(codes, zeros, scales, 4)
    for g in (None, torch.empty(0, dtype=torch.int32)):
        module = QuantLinear(4, **{**packed, "g_idx": g})
        del module.bias
        check(from_gptq_module(module), codes, zeros, scales, g_idx, 4)


def test_refuses_modules():
    with pytest.raises(ArgumentError, match=r"^module is a Linear without bits; expected a QuantLinear of GPTQ"):
        from_gptq_module(nn.Linear(4, 4))
    codes, zeros, scales, _ = draw(32, 64, 3, 2)
    module = QuantLinear(3, **foreign.pack_gptq(codes, zeros, scales, 3))
    module.planar = True
    with pytest.raises(ArgumentError, match=r"^module is a QuantLinear packed in planes \(gptq_p\)"):
        from_gptq_module(module)
