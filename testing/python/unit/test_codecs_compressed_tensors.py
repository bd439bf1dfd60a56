"""`from_compressed`: tensors of the format "pack-quantized" come back as what they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreign
from bitblas.codecs import from_compressed
from bitblas.errors import ArgumentError
from foreign import check, draw, row_bytes

BITS = [1, 2, 3, 4, 5, 6, 7, 8]


def draw_layer(n, k, bits, groups, act_order=False, seed=0):
    """As `draw`, with scales that are bfloat16's, in float32."""
    codes, zeros, scales, g_idx = draw(n, k, bits, groups, act_order, least_zero=0, seed=seed)
    return codes, zeros, torch.from_numpy(scales).to(torch.bfloat16).float().numpy(), g_idx


def check_layer(weight, codes, zeros, scales, g_idx, bits):
    assert weight.scales.dtype is torch.bfloat16
    held = torch.from_numpy(scales).to(torch.bfloat16)
    check(weight, codes, zeros, held, g_idx, bits)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "groups"), [(32, 64, 2), (5, 7, 7), (1, 1, 1), (33, 130, 13), (48, 2050, 5)])
def test_layers(bits, n, k, groups, symmetric, act_order):
    codes, zeros, scales, g_idx = draw_layer(n, k, bits, groups, act_order)
    zeros = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    packed = foreign.pack_compressed(codes, None if symmetric else zeros, scales, bits, g_idx if act_order else None)
    weight = from_compressed(**packed, bits=bits)
    check_layer(weight, codes, zeros, scales, g_idx, bits)
    if symmetric:
        assert weight.W_dtype == ("uint1" if bits == 1 else f"int{bits}")
        assert (weight.zeros is None) == (bits > 1)


@given(
    bits=st.sampled_from(BITS),
    n=st.integers(1, 70),
    groups=st.integers(1, 6),
    group=st.integers(1, 40),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_any_layer(bits, n, groups, group, symmetric, act_order, seed):
    codes, zeros, scales, g_idx = draw_layer(n, groups * group, bits, groups, act_order, seed)
    zeros = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    packed = foreign.pack_compressed(codes, None if symmetric else zeros, scales, bits, g_idx)
    check_layer(from_compressed(**packed, bits=bits), codes, zeros, scales, g_idx, bits)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_modes(bits):
    codes, zeros, scales, g_idx = draw_layer(16, 64, bits, 4)
    zeros[0, 0] = 0
    for points in (zeros, np.full_like(zeros, 1 << (bits - 1))):
        for given_points in (points,) if points is zeros else (points, None):
            packed = foreign.pack_compressed(codes, given_points, scales, bits)
            quantized = from_compressed(**packed, bits=bits, zeros_mode="quantized")
            assert torch.equal(quantized.zeros, row_bytes(points.T, bits))
            original = from_compressed(**packed, bits=bits, zeros_mode="original")
            assert torch.equal(original.zeros.double(), torch.from_numpy(points).double())
            rescale = from_compressed(**packed, bits=bits, zeros_mode="rescale")
            products = torch.from_numpy(points).double() * original.scales.double()
            assert torch.equal(rescale.zeros, products.to(torch.bfloat16))
            for weight in (quantized, original):
                assert weight.W_dtype == f"uint{bits}"
                check_layer(weight, codes, points, scales, g_idx, bits)


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_of_the_whole_tensor(bits, shape):
    codes, _, _, g_idx = draw_layer(5, 24, bits, 1)
    packed = foreign.pack_compressed(codes, None, np.full((5, 1), 0.125, np.float32), bits)
    packed["weight_scale"] = torch.full(shape, 0.125, dtype=torch.bfloat16)
    middle = 1 << (bits - 1)
    scales = np.full((5, 1), 0.125, np.float32)
    check_layer(from_compressed(**packed, bits=bits), codes, np.full((5, 1), middle), scales, g_idx, bits)
    packed["weight_zero_point"] = torch.full(shape, -2, dtype=torch.int8)
    check_layer(from_compressed(**packed, bits=bits), codes, np.full((5, 1), middle - 2), scales, g_idx, bits)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_that_are_not_packed(bits):
    codes, zeros, scales, g_idx = draw_layer(6, 32, bits, 2)
    zeros[0] = 0, (1 << bits) - 1
    packed = foreign.pack_compressed(codes, None, scales, bits)
    packed["weight_zero_point"] = torch.from_numpy(zeros - (1 << (bits - 1))).to(torch.int8)
    check_layer(from_compressed(**packed, bits=bits), codes, zeros, scales, g_idx, bits)


def test_channels_the_shape_and_an_order_that_was_never_set():
    codes, zeros, scales, g_idx = draw_layer(6, 40, 4, 1)
    packed = foreign.pack_compressed(codes, zeros, scales, 4)
    packed["weight_g_idx"] = torch.full((40,), -1, dtype=torch.int32)
    check_layer(from_compressed(**packed), codes, zeros, scales, g_idx, 4)
    packed["weight_scale"] = packed["weight_scale"].view(6)
    check_layer(from_compressed(**{**packed, "weight_shape": (6, 40)}), codes, zeros, scales, g_idx, 4)
    check_layer(from_compressed(**{**packed, "weight_shape": torch.Size((6, 40))}), codes, zeros, scales, g_idx, 4)


@pytest.mark.parametrize("bits", BITS)
def test_bits_behind_the_last_code_are_cleared(bits):
    codes, zeros, scales, g_idx = draw_layer(5, 7, bits, 1)
    packed = foreign.pack_compressed(codes, zeros, scales, bits)
    packed["weight_packed"][:, -1] |= -1 << (7 * bits % 32) if 7 * bits % 32 else 0
    packed["weight_zero_point"][-1] |= -1 << (5 * bits % 32) if 5 * bits % 32 else 0
    weight = from_compressed(**packed, bits=bits, zeros_mode="quantized")
    check_layer(weight, codes, zeros, scales, g_idx, bits)
    assert torch.equal(weight.zeros, row_bytes(zeros.T, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [64, 9])
def test_results_have_memory_of_their_own(bits, k):
    codes, zeros, scales, _ = draw_layer(8, k, bits, 1)
    for points in (zeros, None):
        packed = {**foreign.pack_compressed(codes, points, scales, bits), "bias": torch.randn(8)}
        before = {name: part.clone() for name, part in packed.items()}
        weight = from_compressed(**packed, bits=bits)
        for part in (weight.packed, weight.scales, weight.zeros, weight.bias):
            if part is not None:
                part.zero_()
        assert all(torch.equal(part, before[name]) for name, part in packed.items())


@given(
    bits=st.sampled_from(BITS),
    name=st.sampled_from(["weight_packed", "weight_zero_point", "weight_scale"]),
    place=st.integers(0, 2**31),
    act_order=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_one_flipped_bit_is_noticed(bits, name, place, act_order):
    codes, zeros, scales, g_idx = draw_layer(32, 64, bits, 4, act_order)
    packed = foreign.pack_compressed(codes, zeros, scales, bits, g_idx)
    whole = from_compressed(**packed, bits=bits).dequantize()
    flat = packed[name].view(torch.uint8).view(-1)
    flat[place // 8 % flat.numel()] ^= 1 << place % 8
    try:
        damaged = from_compressed(**packed, bits=bits)
    except ArgumentError:
        return  # a scale that is no longer finite
    noticed = not torch.equal(whole, damaged.dequantize())
    assert noticed or name == "weight_scale"  # a group of a few codes can be 0, whatever its scale
    if name == "weight_scale":
        assert not torch.equal(damaged.scales, packed_scales(codes, zeros, scales, bits, g_idx))


def packed_scales(codes, zeros, scales, bits, g_idx):
    return from_compressed(**foreign.pack_compressed(codes, zeros, scales, bits, g_idx), bits=bits).scales


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "bits is 9; allowed: 1, 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 0}, "bits is 0; "),
        ({"zeros_mode": ""}, "zeros_mode is ''; allowed: original, rescale, quantized"),
        ({"weight_shape": (6,)}, r"weight_shape is \(6,\); expected N and K"),
        ({"weight_shape": torch.tensor([6.0, 64.0])}, r"weight_shape is \[6.0, 64.0\]; "),
        ({"weight_shape": torch.tensor(6)}, "weight_shape is 6; "),
        ({"weight_shape": (0, 64)}, r"weight_shape is \(0, 64\); "),
        ({"weight_shape": None}, "weight_shape is None; "),
        ({"weight_shape": (6, 65)}, r"weight_packed is torch.int32 \(6, 8\); expected torch.int32, \(6, 9\)"),
        ({"weight_packed": torch.zeros((6, 8), dtype=torch.int64)}, r"weight_packed is torch.int64 \(6, 8\); "),
        ({"weight_packed": None}, "weight_packed is a NoneType; "),
        (
            {"weight_scale": torch.ones(6, 3)},
            r"weight_scale has shape \(6, 3\), 3 groups; .* K = 64 is no multiple of 3",
        ),
        ({"weight_scale": torch.ones(5, 2)}, r"weight_scale is torch.float32 \(5, 2\); expected .* \(6, G\)"),
        ({"weight_scale": torch.ones((6, 2), dtype=torch.float64)}, r"weight_scale is torch.float64 \(6, 2\); "),
        ({"weight_scale": torch.full((6, 2), float("nan"))}, "weight_scale holds nan; "),
        ({"weight_scale": None}, "weight_scale is a NoneType; "),
        (
            {"weight_zero_point": torch.zeros((2, 2), dtype=torch.int32)},
            r"weight_zero_point is .* expected .* \(1, 2\)",
        ),
        ({"weight_zero_point": torch.full((6, 2), 8, dtype=torch.int8)}, "weight_zero_point holds 8; allowed: -8 to 7"),
        ({"weight_zero_point": torch.full((6, 2), -9, dtype=torch.int8)}, "weight_zero_point holds -9; "),
        ({"weight_zero_point": torch.zeros(6, 2)}, r"weight_zero_point is torch.float32 \(6, 2\); "),
        ({"weight_zero_point": 0}, "weight_zero_point is a int; "),
        ({"weight_g_idx": torch.arange(64) // 33}, "weight_g_idx gives group 0 33 columns; .*, 32 columns"),
        ({"weight_g_idx": torch.full((64,), 2)}, "weight_g_idx holds 2; allowed: 0 to 1"),
        ({"weight_g_idx": torch.zeros(60, dtype=torch.int32)}, r"weight_g_idx is torch.int32 \(60,\); "),
        ({"weight_g_idx": 0}, "weight_g_idx is a int; "),
        ({"bias": torch.zeros(5)}, r"bias is torch.float32 \(5,\); expected .* \(6,\)"),
    ],
)
def test_refuses(changes, message):
    codes, zeros, scales, _ = draw_layer(6, 64, 4, 2)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        from_compressed(**{**foreign.pack_compressed(codes, zeros, scales, 4), **changes})
