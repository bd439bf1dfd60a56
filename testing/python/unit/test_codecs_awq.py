"""`from_awq`: tensors that were packed in AutoAWQ's order come back as what they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreign
from bitblas.codecs import from_awq
from bitblas.codecs import words as words_module
from bitblas.errors import ArgumentError
from foreign import check, draw, row_bytes


def test_a_word_by_hand():
    """Column 1 of the eight is nibble 4, column 6 is nibble 3: 0 2 4 6 1 3 5 7."""
    qweight = torch.tensor([[0x75316420]], dtype=torch.int32)  # each column's code is its number
    weight = from_awq(qweight, torch.tensor([[0x00010000]], dtype=torch.int32), torch.ones(1, 8))
    assert weight.packed.tolist() == [[column] for column in range(8)]
    assert weight.zeros.tolist() == [[0x10, 0, 0, 0]]
    assert weight.dequantize().tolist() == [[0.0], [0.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0]]


@pytest.mark.parametrize(("n", "k", "groups"), [(8, 1, 1), (8, 7, 7), (16, 32, 2), (264, 96, 3), (64, 2050, 41)])
def test_layers(n, k, groups):
    codes, zeros, scales, g_idx = draw(n, k, 4, groups, least_zero=0)
    weight = from_awq(**foreign.pack_awq(codes, zeros, scales))
    assert (weight.W_dtype, weight.zeros_mode) == ("uint4", "quantized")
    assert torch.equal(weight.zeros, row_bytes(zeros.T, 4))
    check(weight, codes, zeros, scales, g_idx, 4)


@given(words=st.integers(1, 12), groups=st.integers(1, 5), group=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_layer(words, groups, group, seed):
    codes, zeros, scales, g_idx = draw(8 * words, groups * group, 4, groups, least_zero=0, seed=seed)
    zeros[0, 0] = 3  # not all in the middle
    check(from_awq(**foreign.pack_awq(codes, zeros, scales)), codes, zeros, scales, g_idx, 4)


def test_small_blocks(monkeypatch):
    monkeypatch.setattr(words_module, "_BLOCK_WORDS", 1)
    monkeypatch.setattr(words_module, "_LEAST_COLUMNS", 3)
    codes, zeros, scales, g_idx = draw(80, 36, 4, 2)
    check(from_awq(**foreign.pack_awq(codes, zeros, scales)), codes, zeros, scales, g_idx, 4)


def test_zeros_modes_and_middle_zero_points():
    codes, zeros, scales, g_idx = draw(16, 32, 4, 2)
    zeros[:] = 8
    packed = foreign.pack_awq(codes, zeros, scales)
    weight = from_awq(**packed)
    assert (weight.W_dtype, weight.zeros) == ("int4", None)
    check(weight, codes, zeros, scales, g_idx, 4)
    for mode in ("quantized", "original"):
        weight = from_awq(**packed, zeros_mode=mode)
        assert (weight.W_dtype, weight.zeros_mode) == ("uint4", mode)
        check(weight, codes, zeros, scales, g_idx, 4)
    rescale = from_awq(**packed, zeros_mode="rescale")
    assert torch.equal(rescale.zeros, rescale.scales * 8)


def test_strides_the_bias_and_memory():
    codes, zeros, scales, g_idx = draw(16, 32, 4, 1)
    packed = {name: part.t().contiguous().t() for name, part in foreign.pack_awq(codes, zeros, scales).items()}
    before = {name: part.clone() for name, part in packed.items()}
    bias = torch.randn(16)
    weight = from_awq(**packed, bias=bias)
    check(weight, codes, zeros, scales, g_idx, 4)
    assert torch.equal(weight.bias, bias)
    for part in (weight.packed, weight.scales, weight.zeros, weight.bias):
        part.zero_()
    assert all(torch.equal(part, before[name]) for name, part in packed.items())
    assert bool(bias.any())


@given(name=st.sampled_from(["qweight", "qzeros", "scales"]), place=st.integers(0, 2**31), middle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_one_flipped_bit_is_noticed(name, place, middle):
    codes, zeros, scales, _ = draw(16, 33, 4, 3)
    zeros = np.full_like(zeros, 8) if middle else zeros
    packed = foreign.pack_awq(codes, zeros, scales)
    whole = from_awq(**packed).dequantize()
    flat = packed[name].view(torch.uint8).view(-1)
    flat[place // 8 % flat.numel()] ^= 1 << place % 8
    try:
        damaged = from_awq(**packed).dequantize()
    except ArgumentError:
        return  # a scale that is no longer finite
    assert not torch.equal(whole, damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits is 3; allowed: 4"),
        ({"bits": 8}, "bits is 8; "),
        ({"zeros_mode": 1}, "zeros_mode is 1; allowed: original, rescale, quantized"),
        ({"qweight": torch.zeros(32, 2)}, r"qweight is torch.float32 \(32, 2\); expected torch.int32 \(K, N/8\)"),
        ({"qweight": None}, "qweight is a NoneType; "),
        ({"qzeros": torch.zeros((2, 3), dtype=torch.int32)}, r"qzeros is torch.int32 \(2, 3\); expected .* \(2, 2\)"),
        ({"qzeros": torch.zeros((1, 2), dtype=torch.int32)}, r"qzeros is torch.int32 \(1, 2\); "),
        ({"qzeros": None}, "qzeros is a NoneType; "),
        ({"scales": torch.ones(2, 15)}, r"scales is torch.float32 \(2, 15\); expected .* \(G, 16\)"),
        ({"scales": torch.ones(5, 16)}, r"scales has shape \(5, 16\), 5 groups; .* K = 32 is no multiple of 5"),
        ({"scales": torch.full((2, 16), float("-inf"))}, "scales holds -inf; "),
        ({"bias": torch.zeros(2)}, r"bias is torch.float32 \(2,\); expected .* \(16,\)"),
    ],
)
def test_refuses(changes, message):
    codes, zeros, scales, _ = draw(16, 32, 4, 2)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        from_awq(**{**foreign.pack_awq(codes, zeros, scales), **changes})
