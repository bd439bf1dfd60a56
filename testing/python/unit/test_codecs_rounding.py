"""`quantize`: scales as documented, every code the nearest one, and nothing farther off than that allows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from bitblas.codecs import quantize, rounding
from bitblas.errors import ArgumentError, ConfigError

INTEGERS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in range(1, 9)]
OTHERS = ["nf4", "fp4_e2m1", "float8_e4m3", "float8_e5m2"]
LARGEST = {"nf4": 1.0, "fp4_e2m1": 6.0, "float8_e4m3": 448.0, "float8_e5m2": 57344.0}
SCALES = [torch.float16, torch.bfloat16, torch.float32]
#: Every format with every way to round to it.
WAYS = [(name, flag) for name in INTEGERS for flag in (None, True, False)] + [(name, None) for name in OTHERS]
WAYS = [way for way in WAYS if way not in (("uint1", True), ("int1", False))]


def is_symmetric(name, flag):
    return not name.startswith("uint") if flag is None else flag


def draw(n, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((n, k), generator=generator, dtype=torch.float64) * 0.05).to(dtype)


def held_zeros(weight):
    """The zero points, float64 (N, G), as they are subtracted from codes' values."""
    if weight.zeros is None:
        return torch.zeros(weight.scales.shape, dtype=torch.float64)
    if weight.zeros_mode == "original":
        return weight.zeros.double()
    return reference.unpack_bits(weight.zeros, weight.format.bits, weight.out_features).T.double()


def allowed_values(weight):
    """Every value that each weight could have become, float64 (codes, N, G)."""
    values = reference.table(weight.W_dtype).view(-1, 1, 1)
    values = values[torch.isfinite(values)].view(-1, 1, 1)
    return (values - held_zeros(weight)) * weight.scales.double()


def dequantized(weight):
    """Float64 (N, G, g), by the reference."""
    codes = reference.unpack_bits(weight.packed, weight.format.bits, weight.in_features)
    values = reference.decode(codes, weight.W_dtype).view(*weight.scales.shape, -1)
    return (values - held_zeros(weight).unsqueeze(2)) * weight.scales.double().unsqueeze(2)


def expected_scale(grouped, name, flag):
    """What the docstring says, float64 (N, G), before it is rounded."""
    bits, most = reference.width(name), grouped.abs().amax(2)
    if name in LARGEST:
        return most / LARGEST[name]
    if name == "int1":
        return grouped.abs().mean(2)
    if is_symmetric(name, flag):
        return most / (1 if bits == 2 else 2 ** (bits - 1) - 0.5)
    return (grouped.amax(2).clamp(min=0) - grouped.amin(2).clamp(max=0)) / (2**bits - 1)


def check(source, weight, name, flag, scale_dtype):
    """Scales, zero points and codes, each against what is nearest."""
    groups = weight.scales.shape[1]
    grouped = source.double().view(source.shape[0], groups, -1)
    assert weight.W_dtype == name
    assert weight.scales.dtype is scale_dtype
    wanted, scales = expected_scale(grouped, name, flag), weight.scales.double()
    slack = 1e-6 if name == "int1" else 1e-15  # a mean is summed in float32
    assert bool((scales >= wanted * (1 - slack)).all())
    below = torch.nextafter(weight.scales.float(), torch.tensor(0.0)).double()
    if scale_dtype is not torch.float32:  # the number below in 16 bits: positive numbers are ordered as their bits are
        below = (weight.scales.view(torch.int16) - 1).view(scale_dtype).double()
    assert bool((below < wanted * (1 + slack)).all())

    bits = reference.width(name)
    if name in INTEGERS and not is_symmetric(name, flag):
        offset = 0 if name.startswith("uint") else 2 ** (bits - 1)
        points = held_zeros(weight) + offset
        best = -grouped.amin(2).clamp(max=0) / scales
        assert bool(((points >= 0) & (points <= 2**bits - 1) & (points == points.round())).all())
        assert bool(((points - best).abs() <= 0.5 + 1e-4).all())
    elif name.startswith("uint"):
        assert bool((held_zeros(weight) == 2 ** (bits - 1)).all())
    else:
        assert weight.zeros is None

    found = dequantized(weight)
    distance = (found - grouped).abs()
    nearest = (allowed_values(weight).unsqueeze(3) - grouped).abs().amin(0)
    span = grouped.abs().amax(2, keepdim=True)
    assert bool((distance <= nearest + 2.0**-21 * span).all())
    if name in INTEGERS and name != "int1":
        assert bool((distance <= scales.unsqueeze(2) / 2 + 2.0**-21 * span).all())
    assert torch.equal(weight.dequantize(torch.float64), found.view(source.shape).float().double())


@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize(("name", "flag"), WAYS)
def test_all_ways(name, flag, scale_dtype):
    for k, group in ((64, 32), (40, -1), (9, 3)):
        source = draw(6, k)
        weight = quantize(source, name, group, flag, scale_dtype)
        assert weight.group_size == group
        check(source, weight, name, flag, scale_dtype)


@given(
    way=st.sampled_from(WAYS),
    n=st.integers(1, 9),
    groups=st.integers(1, 5),
    group=st.integers(1, 40),
    dtype=st.sampled_from([*SCALES, torch.float64]),
    shift=st.sampled_from([0.0, 0.2, -0.2]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_any_weight(way, n, groups, group, dtype, shift, seed):
    source = draw(n, groups * group, seed=seed).add_(shift).to(dtype)
    weight = quantize(source, way[0], group, way[1])
    check(source, weight, *way, torch.float32 if dtype is torch.float64 else dtype)


@pytest.mark.parametrize(("name", "flag"), WAYS)
def test_blocks_make_no_difference(name, flag, monkeypatch):
    source = draw(13, 48)
    whole = quantize(source, name, 16, flag)
    monkeypatch.setattr(rounding, "_BLOCK_WEIGHTS", 100)
    parts = quantize(source, name, 16, flag)
    for field in ("packed", "scales", "zeros"):
        a, b = getattr(whole, field), getattr(parts, field)
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(("name", "flag"), [way for way in WAYS if way[0] != "int1"])
def test_weights_on_the_grid_stay(name, flag):
    """All of a format's numbers, times a scale that is stored exactly, come back as they are."""
    table = reference.table(name)
    values = table[torch.isfinite(table)]
    if name in INTEGERS and not is_symmetric(name, flag):
        values = values - values.min() - min(3, 2 ** reference.width(name) - 1)
    elif name in INTEGERS:
        bits = reference.width(name)
        if bits != 2:
            return  # the largest magnitude is half a step beyond the last code
        values = torch.tensor([-1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    source = (values * 0.125).repeat(3, 2).to(torch.float32)
    weight = quantize(source, name, -1, flag, torch.float16)
    assert torch.equal(weight.dequantize(), source)
    assert bool((weight.scales == 0.125).all())


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize(("name", "flag"), WAYS)
def test_groups_of_zeros(name, flag, dtype):
    source = torch.zeros((2, 32), dtype=dtype)
    source[0, 16:] = draw(1, 16)
    weight = quantize(source, name, 16, flag)
    of_zeros = 0 if name == "int1" else 1  # which has no code for 0
    assert bool((weight.scales[1] == of_zeros).all())
    assert weight.scales[0, 0] == of_zeros
    assert not bool(weight.dequantize()[1].any())
    assert not bool(weight.dequantize()[0, :16].any())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "flag"), WAYS)
def test_refuses_what_is_not_finite(name, flag, wrong):
    source = draw(4, 32)
    source[3, 17] = wrong
    with pytest.raises(ArgumentError, match=f"^weight holds {wrong}; expected finite numbers$"):
        quantize(source, name, 8, flag)


@pytest.mark.parametrize(("name", "flag"), WAYS)
def test_scales_that_float16_cannot_hold(name, flag):
    tiny = draw(2, 32) * 1e-9
    weight = quantize(tiny, name, 16, flag, torch.float16)
    assert bool((weight.scales.float() == 2.0**-24).all())  # the smallest there is
    check(tiny, weight, name, flag, torch.float16)
    huge = draw(2, 32) * 1e12
    with pytest.raises(
        ArgumentError, match=r"^scale_dtype is torch.float16, which cannot hold a scale of .*torch.float32"
    ):
        quantize(huge, name, 16, flag, torch.float16)
    check(huge, quantize(huge, name, 16, flag), name, flag, torch.float32)


@pytest.mark.parametrize(("name", "flag"), WAYS)
def test_the_smallest_and_the_largest_float32(name, flag):
    smallest = torch.tensor([[1e-45, 0.0, -1e-45, 0.0]])
    scales = quantize(smallest, name, -1, flag).scales
    assert bool((scales > 0).all()) != (name == "int1")  # of whose scale, a mean, nothing is left
    assert bool(torch.isfinite(quantize(smallest, name, -1, flag).dequantize()).all())
    largest = torch.tensor([[3e38, -3e38, 1e38, 0.0]])
    if name in ("uint1", "int1"):
        return  # whose scale is no float32
    found = quantize(largest, name, -1, flag)
    assert bool(torch.isfinite(found.scales).all())


def test_strides_gradients_and_the_bias():
    source = draw(24, 16).t().requires_grad_()
    bias = torch.randn(16)
    weight = quantize(source, "uint4", 8, bias=bias)
    assert torch.equal(weight.packed, quantize(source.detach().contiguous(), "uint4", 8).packed)
    assert not weight.scales.requires_grad
    assert torch.equal(weight.bias, bias)
    assert weight.perm is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "uint4"), r"weight is NoneType; expected a floating-point tensor \(N, K\)"),
        ((torch.zeros((2, 4), dtype=torch.int8), "uint4"), r"weight is torch.int8 \(2, 4\); "),
        ((torch.zeros(4), "uint4"), r"weight is torch.float32 \(4,\); "),
        ((torch.zeros(2, 0), "uint4"), r"weight is torch.float32 \(2, 0\); "),
        ((torch.zeros(2, 6), "uint4", 4), "group_size is 4; allowed: -1 and the divisors of K = 6"),
        ((torch.zeros(2, 6), "uint4", 0), "group_size is 0; "),
        ((torch.zeros(2, 6), "uint4", True), "group_size is True; "),
        ((torch.zeros(2, 6), "uint4", 2.0), "group_size is 2.0; "),
        ((torch.zeros(2, 6), "uint4", -2), "group_size is -2; "),
        ((torch.zeros(2, 6), "uint4", -1, 1), "symmetric is 1; allowed: None, True, False"),
        (
            (torch.zeros(2, 6), "uint4", -1, None, torch.float64),
            "scale_dtype is torch.float64; allowed: torch.float16, ",
        ),
        ((torch.zeros(2, 6), "uint4", -1, None, "half"), "scale_dtype is 'half'; "),
        ((torch.zeros(2, 6), "float16"), "W_dtype is float16, which needs no scales; allowed: uint1, .*, float8_e5m2$"),
        ((torch.zeros(2, 6), "uint1", -1, True), "symmetric is True; uint1 cannot be, int1 is"),
        ((torch.zeros(2, 6), "int1", -1, False), "symmetric is False; int1 has to be symmetric"),
        ((torch.zeros(2, 6), "nf4", -1, False), "symmetric is False; nf4 has to be symmetric"),
        ((torch.zeros(2, 6), "fp8_e4m3", -1, False), "symmetric is False; float8_e4m3 has to be"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        quantize(*arguments)


def test_refuses_formats_and_biases():
    with pytest.raises(ConfigError, match=r"^W_dtype is 'uint9', which is no format"):
        quantize(torch.ones(2, 4), "uint9")
    with pytest.raises(ArgumentError, match=r"^bias is torch.float32 \(3,\); expected .* \(2,\)"):
        quantize(torch.ones(2, 4), "uint4", bias=torch.zeros(3))


def test_codes_by_hand():
    """Numbers that were computed with a pencil: l = -1, h = 2, s = 3/15 = 0.2 (rounded up), z = 5."""
    weight = quantize(torch.tensor([[-1.0, 2.0, 0.0, 0.55]]), "uint4")
    assert weight.scales.item() == float(np.float32(0.2))  # which is above 0.2
    assert weight.packed.view(torch.uint8).tolist() == [[0xF0, 0x85]]
    assert weight.zeros.view(torch.uint8).tolist() == [[5]]
    three = quantize(torch.tensor([[-1.0, 1.0, 0.2, -0.6]]), "int2", scale_dtype=torch.float16)
    assert three.dequantize().tolist() == [[-1.0, 1.0, 0.0, -1.0]]
    signs = quantize(torch.tensor([[-1.0, 2.0, 0.0, -3.0]]), "int1")
    assert signs.dequantize().tolist() == [[-1.5, 1.5, 1.5, -1.5]]
