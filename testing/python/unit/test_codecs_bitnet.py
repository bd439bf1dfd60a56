"""`from_bitnet` and `ternary`: what transformers packs comes back as it was; rounding is by the mean magnitude."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitblas.codecs import bitnet, from_bitnet
from bitblas.codecs.bitnet import ternary
from bitblas.errors import ArgumentError
from foreign import pack_bitnet, row_bytes

SIZES = [(4, 4), (32, 64), (8, 7), (1, 1), (2, 9), (3, 5), (5, 6), (6, 130), (7, 8), (33, 63), (64, 2050)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def draw(n, k, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, (n, k))


def check(weight, values, scale):
    """Bytes, by Python's integers; scales; and values, which are exact."""
    n, k = values.shape
    assert (weight.W_dtype, weight.out_features, weight.in_features, weight.group_size) == ("int2", n, k, -1)
    assert torch.equal(weight.packed, row_bytes(values + 2, 2))
    assert torch.equal(weight.scales, scale.reshape(1, 1).expand(n, 1))
    assert weight.zeros is weight.perm is None
    assert torch.equal(weight.dequantize(torch.float64), torch.from_numpy(values) * scale.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_packed_layers(n, k, dtype):
    values, scale = draw(n, k), torch.tensor([0.37]).to(dtype)
    weight = from_bitnet(pack_bitnet(values), scale, out_features=n)
    assert weight.scales.dtype is dtype
    check(weight, values, scale)


@given(n=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 2**31), divide=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_packed_layer(n, k, seed, divide):
    values, scale = draw(n, k, seed), torch.tensor([1.75], dtype=torch.bfloat16)
    weight = from_bitnet(pack_bitnet(values), scale, divide=divide, out_features=n)
    check(weight, values, 1 / scale.float() if divide else scale)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_in_blocks(monkeypatch, block):
    monkeypatch.setattr(bitnet, "_BLOCK_WORDS", block)
    values, scale = draw(52, 22), torch.ones(1)
    check(from_bitnet(pack_bitnet(values), scale), values, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_divided_by(dtype):
    values, scale = draw(8, 16), torch.tensor([3.0]).to(dtype)
    weight = from_bitnet(pack_bitnet(values), scale, divide=True)
    assert weight.scales.dtype is torch.float32
    check(weight, values, torch.tensor([1 / 3], dtype=torch.float32))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_shapes_of_a_scale(shape):
    values = draw(8, 16)
    check(from_bitnet(pack_bitnet(values), torch.full(shape, 0.5)), values, torch.tensor([0.5]))


@pytest.mark.parametrize("n", [9, 10, 11, 12])
def test_the_bias_says_how_many_rows_there_are(n):
    values, bias = draw(n, 6), torch.arange(n, dtype=torch.float64)
    weight = from_bitnet(pack_bitnet(values), torch.ones(1), bias)
    check(weight, values, torch.ones(1))
    assert torch.equal(weight.bias, bias)


@pytest.mark.parametrize("dtype", [torch.int8, *DTYPES], ids=str)
def test_values_that_are_not_packed(dtype):
    values = draw(7, 13)
    scale = torch.tensor([0.25], dtype=torch.bfloat16)
    check(from_bitnet(torch.from_numpy(values).to(dtype), scale), values, scale)


def test_tensors_of_any_strides():
    values = draw(16, 24)
    packed = pack_bitnet(values)
    for other in (packed.t().contiguous().t(), packed.repeat_interleave(2, 1)[:, ::2]):
        check(from_bitnet(other, torch.ones(1)), values, torch.ones(1))
    spread = torch.from_numpy(values).float().t().contiguous().t()
    check(from_bitnet(spread, torch.ones(1)), values, torch.ones(1))


def test_the_example_of_transformers():
    """The documentation of its `unpack_weights`, in which the two bytes of a column are four parts of two rows."""
    packed = torch.tensor([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], dtype=torch.uint8)
    stored = [[1, 0], [0, 2], [0, 2], [0, 2], [2, 1], [1, 0], [2, 0], [2, 0]]  # two bits each, the lowest first
    check(from_bitnet(packed, torch.ones(1)), np.array(stored) - 1, torch.ones(1))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_what_transformers_packs_and_unpacks(n, k):
    """Its functions are compiled by decorators; here they run as they are written, which takes no seconds."""
    theirs = pytest.importorskip("transformers.integrations.bitnet")
    values = draw(n, k, seed=3)
    packed = theirs.pack_weights(torch.from_numpy(values).clone())
    assert torch.equal(packed, pack_bitnet(values))
    weight = from_bitnet(packed, torch.ones(1), out_features=n)
    check(weight, values, torch.ones(1))
    with torch._dynamo.config.patch(disable=True):
        unpacked = theirs.unpack_weights(packed, torch.float32)
    assert torch.equal(weight.dequantize(), unpacked[:n])


@given(place=st.integers(0, 2**31), n=st.integers(1, 40), k=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_code_of_3_is_named(place, n, k):
    packed = pack_bitnet(draw(n, k))
    row, column = divmod(place % packed.numel(), k)
    packed[row, column] |= 3 << 2 * (place % 4)
    with pytest.raises(
        ArgumentError, match=rf"^weight holds the code 3, a value of 2, in its byte \({row}, {column}\); "
    ):
        from_bitnet(packed, torch.ones(1), out_features=n)


def test_a_code_of_3_in_a_later_block(monkeypatch):
    monkeypatch.setattr(bitnet, "_BLOCK_WORDS", 8)
    packed = pack_bitnet(draw(40, 16))
    packed[9, 15], packed[9, 3] = 0b11000000, 0b00000011
    with pytest.raises(ArgumentError, match=r"in its byte \(9, 3\); allowed: 0, 1 and 2"):
        from_bitnet(packed, torch.ones(1))


def test_results_have_memory_of_their_own():
    values, bias, scale = draw(8, 16), torch.ones(8), torch.ones(1)
    for given_weight in (pack_bitnet(values), torch.from_numpy(values).to(torch.int8)):
        before = given_weight.clone()
        weight = from_bitnet(given_weight, scale, bias)
        for part in (weight.packed, weight.scales, weight.bias):
            part.zero_()
        assert torch.equal(given_weight, before)
        assert bool(bias.all())
        assert bool(scale.all())


PACKED = {"weight": pack_bitnet(draw(8, 16)), "weight_scale": torch.ones(1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, r"weight is NoneType; expected torch.uint8 \(ceil\(N/4\), K\)"),
        ({"weight": torch.zeros(4, dtype=torch.uint8)}, r"weight is torch.uint8 \(4,\); "),
        ({"weight": torch.zeros((0, 4), dtype=torch.uint8)}, r"weight is torch.uint8 \(0, 4\); "),
        ({"weight": torch.zeros((2, 4), dtype=torch.int32)}, r"weight is torch.int32 \(2, 4\); "),
        ({"weight": torch.full((2, 4), -2, dtype=torch.int8)}, "weight holds -2; allowed: -1, 0 and 1"),
        ({"weight": torch.full((2, 4), 2.0)}, "weight holds 2; allowed for int2"),
        ({"weight": torch.full((2, 4), 0.5)}, "weight holds 0.5; allowed for int2: whole numbers"),
        ({"weight": torch.full((2, 4), math.nan)}, "weight holds nan; "),
        ({"weight_scale": None}, "weight_scale is NoneType; expected one element, torch.float16"),
        ({"weight_scale": torch.ones(2)}, r"weight_scale is torch.float32 \(2,\); "),
        ({"weight_scale": torch.ones(1, dtype=torch.float64)}, r"weight_scale is torch.float64 \(1,\); "),
        ({"weight_scale": torch.tensor([math.inf])}, "weight_scale holds inf; expected a finite number"),
        ({"weight_scale": torch.zeros(1), "divide": True}, "weight_scale holds 0; expected a number to divide by"),
        ({"weight_scale": torch.tensor([math.nan]), "divide": True}, "weight_scale holds nan; "),
        ({"out_features": 9}, "out_features is 9; allowed: 5 to 8, as weight has 2 rows of 4 to a byte"),
        ({"out_features": 4}, "out_features is 4; allowed: 5 to 8"),
        ({"out_features": True}, "out_features is True; "),
        ({"bias": torch.ones(4)}, "bias is of 4; allowed: 5 to 8"),
        ({"bias": torch.ones(7), "out_features": 8}, r"bias is torch.float32 \(7,\); expected .* \(8,\)"),
        ({"bias": torch.ones(8).int()}, r"bias is torch.int32 \(8,\); "),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        from_bitnet(**{**PACKED, **changes})


# -- rounding --------------------------------------------------------------------------------------------------------------


def exact(weight, eps=1e-5):
    """Codes and scale, with the mean magnitude as a fraction, and quotients of float32s by numpy."""
    values = weight.double().numpy()
    mean = sum(Fraction(abs(value)) for value in values.reshape(-1).tolist()) / values.size
    scale = np.float32(max(float(mean), eps))
    quotients = (values.astype(np.float32) / scale).astype(np.float64)
    return np.clip(np.rint(quotients), -1, 1).astype(np.int64), torch.tensor([float(scale)])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "k"), [(4, 4), (1, 1), (5, 7), (33, 130)])
def test_rounded(n, k, dtype):
    weight = (torch.randn(n, k) / 7).to(dtype)
    check(ternary(weight), *exact(weight))


def test_ties_go_to_the_even_code():
    """The mean magnitude is 2, half of which is exactly between two codes."""
    weight = torch.tensor([[1.0, -1.0, 1.0000001, -1.0000001, 0.0, 3.0, -3.0, 5.9999998]])
    assert float(weight.abs().mean()) == 2
    weight = ternary(weight)
    assert weight.dequantize().tolist() == [[0, 0, 2, -2, 0, 2, -2, 2]]


def test_rounded_in_blocks(monkeypatch):
    weight = torch.randn(50, 33)
    wanted = exact(weight)
    for size in (1, 100, 1 << 18):
        monkeypatch.setattr(bitnet, "_BLOCK_WEIGHTS", size)
        check(ternary(weight), *wanted)


def test_the_scale_does_not_depend_on_threads():
    weight, threads, found = torch.randn(1000, 1000), torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(float(ternary(weight).scales[0]))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_small_weights_and_eps():
    weight = torch.tensor([[4e-6, -6e-6, 0.0, 2e-5]])
    assert exact(weight)[1].item() == np.float32(1e-5)  # their mean is 7.5e-6
    check(ternary(weight), *exact(weight))
    check(ternary(weight, eps=1e-6), *exact(weight, 1e-6))
    check(ternary(torch.zeros(3, 5)), np.zeros((3, 5), np.int64), torch.tensor([1e-5]))


def test_a_parameter_with_a_bias():
    layer = torch.nn.Linear(12, 5)
    weight = ternary(layer.weight, bias=layer.bias)
    check(weight, *exact(layer.weight.detach()))
    assert torch.equal(weight.bias, layer.bias)
    assert not weight.bias.requires_grad


def test_the_weights_of_a_training_step_of_transformers():
    """Its class rounds in float32, with a mean of its own, and multiplies by the inverse of the scale."""
    theirs = pytest.importorskip("transformers.integrations.bitnet")
    for dtype in DTYPES:
        weight = (torch.randn(64, 96) / 9).to(dtype)
        with torch._dynamo.config.patch(disable=True):
            wanted = theirs.WeightQuant.apply(weight)
        assert torch.allclose(ternary(weight).dequantize().to(dtype), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), r"weight is NoneType; expected a floating-point tensor \(N, K\)"),
        ((torch.ones(3, 3).int(),), r"weight is torch.int32 \(3, 3\); "),
        ((torch.ones(3),), r"weight is torch.float32 \(3,\); "),
        ((torch.ones(0, 3),), r"weight is torch.float32 \(0, 3\); "),
        ((torch.tensor([[1.0, math.nan]]),), "weight holds nan; expected finite numbers"),
        ((torch.tensor([[1.0, -math.inf]]),), "weight holds -inf; expected finite numbers"),
        ((torch.full((2, 2), 1e39, dtype=torch.float64),), r"weight holds 1e\+39; expected finite numbers"),
        ((torch.ones(2, 2), 0), "eps is 0; it must be a number above 0"),
        ((torch.ones(2, 2), math.inf), "eps is inf; "),
        ((torch.ones(2, 2), "1e-5"), "eps is '1e-5'; "),
        ((torch.ones(2, 2), True), "eps is True; "),
        ((torch.ones(2, 2), 1e-5, torch.ones(3)), r"bias is torch.float32 \(3,\); expected .* \(2,\)"),
    ],
)
def test_rounding_refuses(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        ternary(*arguments)
