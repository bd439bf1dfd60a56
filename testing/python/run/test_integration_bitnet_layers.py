"""integration/BitNet/utils_quant.py: fake quantization, float and packed layers, against float64."""

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch

import bitblas
from bitblas.errors import ArgumentError, ConfigError
from utils_quant import BitLinear, BitLinearBitBLAS, activation_quant, weight_quant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Unit roundoff, and the least positive number.
ROUNDOFF = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.float16: (2.0**-11, 2.0**-24),
    torch.bfloat16: (2.0**-8, 2.0**-133),
}
SINGLE = 2.0**-24


def numpy64(tensor):
    """A tensor's values in float64, as NumPy has them."""
    return tensor.detach().cpu().float().numpy().astype(np.float64)


def expected_codes(weight):
    """Codes of a weight and its scale, in float64; weights in the middle of two codes do not occur in these tests."""
    w = numpy64(weight)
    scale = max(np.abs(w).mean(), 1e-5)
    ratio = w / scale
    assert np.abs(np.abs(ratio) - 0.5).min(initial=1) > 1e-6
    return np.clip(np.rint(ratio), -1, 1), scale


def expected_activations(x):
    """Codes of activations, in float32 as documented, and their scales."""
    a = x.detach().cpu().float().numpy()
    largest = np.maximum(np.abs(a).max(-1, keepdims=True), np.float32(1e-5))
    scale = largest / np.float32(127)
    return np.rint(a / scale).astype(np.float64), scale.astype(np.float64)


def draw(*shape, dtype=torch.float32, seed=0, size=1.0):
    """Random numbers that the dtype holds."""
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


# -- fake quantization -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 33), (64, 128)])
def test_weights_are_rounded_to_their_mean_magnitude(shape, dtype):
    weight = draw(*shape, dtype=dtype, size=0.02)
    before = weight.clone()
    found = weight_quant(weight)
    codes, scale = expected_codes(weight)
    unit, least = ROUNDOFF[dtype]
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    assert np.abs(numpy64(found) - codes * scale).max() <= (unit + 4 * SINGLE) * scale + least
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 33), (0, 8)])
def test_activations_are_rounded_to_a_127th_of_their_rows_largest(shape, dtype):
    x = draw(*shape, dtype=dtype)
    found = activation_quant(x)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    if x.numel():
        codes, scale = expected_activations(x)
        unit, least = ROUNDOFF[dtype]
        assert (np.abs(numpy64(found) - codes * scale) <= (unit + 4 * SINGLE) * np.abs(codes * scale) + least).all()
        assert np.abs(codes).max() == 127


def test_zeros_stay_zeros():
    assert torch.equal(weight_quant(torch.zeros(3, 4)), torch.zeros(3, 4))
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-9), torch.ones(8)])
    found = activation_quant(x)
    assert torch.equal(found[:2], torch.zeros(2, 8))
    assert torch.equal(found[2], torch.ones(8))


def test_halves_go_to_the_even_neighbour():
    # rows whose largest is 127: steps of one
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert activation_quant(x).tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    # a mean magnitude of one
    weight = torch.tensor([[0.5, 1.5, -0.5, -1.5], [1.0, 1.0, -2.0, 0.0]])
    assert weight_quant(weight).tolist() == [[0, 1, 0, -1], [1, 1, -1, 0]]


@pytest.mark.parametrize(("function", "bits"), [(weight_quant, 2), (weight_quant, 8), (activation_quant, 4)])
def test_other_numbers_of_bits_are_refused(function, bits):
    with pytest.raises(ConfigError, match=r"weight_bits .*input_bits .*allowed"):
        function(torch.ones(2, 4), num_bits=bits)


# -- layers ----------------------------------------------------------------------------------------------------------------

#: N and K that no tile divides, and some that tiles do; an operator is built for each.
CASES = [
    (5, 3, torch.float32, False),
    (33, 70, torch.float32, True),
    (33, 70, torch.float16, True),
    (33, 70, torch.bfloat16, True),
    (48, 64, torch.bfloat16, False),
]


def make(n, k, dtype=torch.float32, bias=False, seed=0):
    """A float layer."""
    layer = BitLinear(k, n, bias, dtype=dtype)
    layer.weight.data = draw(n, k, dtype=dtype, seed=seed, size=0.03)
    if bias:
        layer.bias.data = draw(n, dtype=dtype, seed=seed + 1)
    return layer


def expected(x, weights, bias, dtype):
    """The output of parts of a weight side by side, float64, and how far a result in the dtype may be from it."""
    codes, scales = zip(*map(expected_codes, weights), strict=True)
    codes = np.concatenate(codes)
    scale = np.concatenate([np.full(len(w), s) for w, s in zip(weights, scales, strict=True)])
    q, step = expected_activations(x)
    product = (q @ codes.T) * step * scale
    b = np.zeros(len(scale)) if bias is None else numpy64(bias)
    unit, least = ROUNDOFF[dtype]
    # the result is rounded once, and scales of several parts are, too
    units = unit * (2 if len(weights) > 1 else 1) + 8 * SINGLE
    return product + b, units * (np.abs(product) + np.abs(b)) + least


def is_close(found, exact, bound):
    return bool((np.abs(numpy64(found) - exact) <= bound).all())


def rows(k, dtype, seed=5):
    """Activations of three dimensions, with a row of zeros, one of tiny numbers and one of large."""
    x = draw(2, 3, k, dtype=dtype, seed=seed)
    x[0, 0], x[0, 1], x[1, 2] = 0, x[0, 1] * 2.0**-18, x[1, 2] * 100
    return x


@torch.inference_mode()
@pytest.mark.parametrize(("n", "k", "dtype", "bias"), CASES)
def test_float_and_packed_layers_against_float64(n, k, dtype, bias):
    layer = make(n, k, dtype, bias)
    x = rows(k, dtype)
    exact, bound = expected(x, [layer.weight], layer.bias, dtype)
    packed = BitLinearBitBLAS.from_bit_linear(layer)
    for found in (layer(x), packed(x)):
        assert (found.dtype, found.shape) == (dtype, (2, 3, n))
        assert is_close(found, exact, bound)
    # native_forward multiplies what was rounded to the dtype: that many times larger an error
    wide = numpy64(x).__abs__().max(-1, keepdims=True) * np.abs(numpy64(layer.weight)).mean() * k
    for found in (packed.native_forward(x), BitLinearBitBLAS.native_forward(layer, x)):
        assert (np.abs(numpy64(found) - exact) <= bound + 4 * ROUNDOFF[dtype][0] * wide + ROUNDOFF[dtype][1] * k).all()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "weight_group", "sizes"),
    [(33, 3, [11, 11, 11]), (48, [24, 12, 12], [24, 12, 12]), (48, 1, [48]), (33, [33], [33])],
)
def test_parts_have_scales_of_their_own(n, dtype, weight_group, sizes):
    k = 70 if n == 33 else 64
    layer = make(n, k, dtype, bias=True)
    first = 0
    for number, size in enumerate(sizes):  # scales far apart
        layer.weight.data[first : first + size] *= 4.0**number
        first += size
    packed = BitLinearBitBLAS.from_bit_linear(layer, weight_group=weight_group)
    x = rows(k, dtype)
    parts = list(layer.weight.detach().split(sizes))
    exact, bound = expected(x, parts, layer.bias, dtype)
    assert is_close(packed(x), exact, bound)
    if len(sizes) > 1:
        together, _ = expected(x, [layer.weight.detach()], layer.bias, dtype)
        assert not is_close(torch.from_numpy(together), exact, bound)
    unit = ROUNDOFF[dtype][0] if len(sizes) > 1 else 0
    wanted = np.concatenate([np.full(s, 1 / np.abs(numpy64(w)).mean()) for s, w in zip(sizes, parts, strict=True)])
    assert packed.sw.dtype is torch.float64
    assert packed.sw.shape == ((n,) if len(sizes) > 1 else (1,))
    assert np.abs(numpy64(packed.sw) / wanted - 1).max() <= unit * 1.01 + 4 * SINGLE


@pytest.mark.parametrize("weight_group", [0, -1, 2, [], [4], [3, 3], [5, 0], [6, -1]])
def test_parts_that_do_not_make_up_the_rows(weight_group):
    with pytest.raises(ArgumentError, match="does not make up 5 rows"):
        BitLinearBitBLAS.from_bit_linear(make(5, 3), weight_group=weight_group)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_packed_after_they_were_loaded(dtype):
    source = make(33, 70, dtype, bias=True)
    layer = BitLinearBitBLAS(70, 33, bias=True, dtype=dtype)
    assert not layer.deployed
    layer.load_state_dict(source.state_dict())
    before = weakref.ref(layer.weight)
    x = rows(70, dtype)
    assert torch.equal(layer(x), source(x))
    assert layer.post_process_weights() is None
    assert layer.deployed
    assert before() is None  # freed
    assert not list(layer.parameters())
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) <= 33 * 18 + 33 * 4 + 4 + 128
    exact, bound = expected(x, [source.weight], source.bias, dtype)
    assert is_close(layer(x), exact, bound)
    codes, scales = layer.unpacked()
    wanted, scale = expected_codes(source.weight)
    assert np.array_equal(numpy64(codes), wanted)
    assert np.abs(numpy64(scales) / scale - 1).max() <= 4 * SINGLE
    layer.post_process_weights()  # changes nothing
    assert is_close(layer(x), exact, bound)


@torch.inference_mode()
@pytest.mark.parametrize("fill", [0.0, 1e-7])
def test_weights_below_the_eps_are_zeros(fill):
    layer = make(33, 70, bias=True)
    layer.weight.data.fill_(fill)
    packed = BitLinearBitBLAS.from_bit_linear(layer)
    assert torch.equal(packed(rows(70, torch.float32)), layer.bias.expand(2, 3, 33))
    assert packed.sw.tolist() == pytest.approx([1e5])


def test_weights_that_are_no_numbers():
    layer = BitLinearBitBLAS(70, 33)
    layer.weight.data[3, 4] = float("nan")
    with pytest.raises(ArgumentError, match="NaN"):
        layer.post_process_weights()
    assert not layer.deployed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_bit_linear_refuses_weights_that_are_no_numbers(value):
    layer = make(33, 70)
    layer.weight.data[3, 4] = value
    with pytest.raises(ArgumentError, match="the weight holds a NaN or an infinity"):
        BitLinearBitBLAS.from_bit_linear(layer)


@pytest.mark.parametrize("kind", [BitLinear, BitLinearBitBLAS, bitblas.BitLinear])
def test_a_packed_layer_is_not_packed_again(kind):
    with pytest.raises(ArgumentError, match="the layer is packed already"):
        BitLinearBitBLAS.from_bit_linear(kind(70, 33).deploy())


def test_there_is_one_eps_however_a_layer_is_made():
    for kind in (BitLinear, BitLinearBitBLAS):
        made = kind(70, 33), kind.from_linear(torch.nn.Linear(70, 33)), kind.from_ternary(torch.ones(4, 8))
        assert [layer.eps for layer in made] == [1e-5] * 3
        assert all(type(layer) is kind for layer in made)
        with pytest.raises(TypeError, match="eps"):
            kind.from_linear(torch.nn.Linear(70, 33), eps=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("weight_group", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_with_a_scale_for_each_row_is_packed_so(dtype, weight_group):
    layer = bitblas.BitLinear(70, 33, False, 1e-5, "ai8pc_wpc", dtype=dtype)
    layer.weight.data = make(33, 70, dtype).weight.data * torch.logspace(-2, 0, 33)[:, None].to(dtype)
    x = rows(70, dtype)
    packed = BitLinearBitBLAS.from_bit_linear(layer, weight_group)
    exact, bound = expected(x, list(layer.weight.split(1)), None, dtype)
    assert is_close(packed(x), exact, bound)
    assert packed.quant_type == "ai8pc_wpc"
    loaded = BitLinearBitBLAS(70, 33, quant_type="ai8pc_wpc", dtype=dtype)
    loaded.load_state_dict(layer.state_dict())
    wide = numpy64(x).__abs__().max(-1, keepdims=True) * np.abs(numpy64(layer.weight)).mean(1) * 70
    allowed = bound + 4 * ROUNDOFF[dtype][0] * wide + ROUNDOFF[dtype][1] * 70
    for native in (loaded.native_forward(x), packed.native_forward(x)):
        assert (np.abs(numpy64(native) - exact) <= allowed).all()


def test_scales_and_an_eps_that_are_not_bitnets():
    kinds = "'ai8pc_wpg35'; of BitLinearBitBLAS allowed: 'ai8pc_wpt' and 'ai8pc_wpc'"
    with pytest.raises(ConfigError, match=kinds):
        BitLinearBitBLAS(70, 33, quant_type="ai8pc_wpg35")
    with pytest.raises(ConfigError, match=kinds):
        BitLinearBitBLAS.from_ternary(torch.ones(33, 70), torch.rand(33, 2))
    with pytest.raises(ConfigError, match=r"'ai8pc_wpc'; of BitLinear allowed: 'ai8pc_wpt'$"):
        BitLinear.from_ternary(torch.ones(33, 70), torch.rand(33))
    with pytest.raises(ConfigError, match=kinds):
        BitLinearBitBLAS.from_bit_linear(bitblas.BitLinear(70, 33, eps=1e-5, quant_type="ai8pc_wpg35"))
    with pytest.raises(ConfigError, match="eps is 1e-06; of BitLinearBitBLAS it is 1e-05"):
        BitLinearBitBLAS.from_bit_linear(bitblas.BitLinear(70, 33))


@torch.inference_mode()
def test_a_packed_layer_computes_the_very_numbers_of_its_float_one():
    for seed in range(20):  # some scales are nobody's reciprocal in float32
        layer = make(33, 70, seed=seed)
        packed = BitLinearBitBLAS.from_bit_linear(layer)
        assert packed.w_scale.item() == bitblas.BitLinear.from_linear(layer_like(layer)).deploy().w_scale.item()
        assert torch.equal(packed(rows(70, torch.float32)), layer(rows(70, torch.float32)))


def layer_like(layer):
    """A torch layer with the weights of another."""
    made = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    made.weight = layer.weight
    return made


@pytest.mark.parametrize("kind", [BitLinear, BitLinearBitBLAS])
@pytest.mark.parametrize("bits", [{"weight_bits": 2}, {"input_bits": 4}])
def test_layers_of_other_bits_are_refused(kind, bits):
    with pytest.raises(ConfigError, match="weight_bits is"):
        kind(8, 8, **bits)


def test_a_call_is_one_kernel():
    packed = BitLinearBitBLAS.from_bit_linear(make(33, 70, bias=True))
    x = rows(70, torch.float32)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        packed(x)
    names = {event.name for event in profile.events()}
    assert not names & {"aten::mul", "aten::div", "aten::abs", "aten::amax", "aten::round", "aten::mm", "aten::linear"}


# -- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_straight_through(bias):
    layer = make(33, 70, bias=bias)
    x = rows(70, torch.float32).requires_grad_()
    grad = draw(2, 3, 33, seed=9)
    layer(x).backward(grad)
    codes, scale = expected_codes(layer.weight)
    q, step = expected_activations(x)
    g = numpy64(grad).reshape(-1, 33)
    # of y = (q·s) · (codes·scale)ᵀ, as if both factors were what they were rounded from
    wanted_x, wanted_weight = (g @ (codes * scale)).reshape(2, 3, 70), g.T @ (q * step).reshape(-1, 70)
    size = np.abs(g).max() * 33
    assert np.abs(numpy64(x.grad) - wanted_x).max() <= size * scale * 16 * SINGLE
    assert np.abs(numpy64(layer.weight.grad) - wanted_weight).max() <= size * np.abs(q * step).max() * 16 * SINGLE
    if bias:
        assert np.abs(numpy64(layer.bias.grad) - g.sum(0)).max() <= size * 16 * SINGLE


# -- state_dicts -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_a_packed_state_dict_loads_into_a_fresh_layer(dtype, parts, assign):
    packed = BitLinearBitBLAS.from_bit_linear(make(33, 70, dtype, bias=True), parts)
    state = packed.state_dict()
    assert set(state) == {"qweight", "sw", "bias", "format"}
    assert (state["qweight"].dtype, tuple(state["qweight"].shape)) == (torch.int8, (33, 18))
    # the packed form: two bits a code, value + 2, the first in the lowest bits
    codes = numpy64(packed.unpacked()[0]).astype(np.int64) + 2
    codes = np.concatenate([codes, np.zeros((33, 2), np.int64)], 1).reshape(33, 18, 4)
    assert np.array_equal(state["qweight"].numpy().view(np.uint8), (codes << np.array([0, 2, 4, 6])).sum(-1))
    fresh = BitLinearBitBLAS(70, 33, bias=True, quant_type="ai8pc_wpc" if parts > 1 else "ai8pc_wpt", dtype=dtype)
    fresh.replace_weight_param_with_qweight()
    assert "weight" not in dict(fresh.named_parameters())
    assert fresh.qweight.shape == packed.qweight.shape
    fresh.load_state_dict(copy.deepcopy(state), assign=assign)
    x = rows(70, dtype)
    assert torch.equal(fresh(x), packed(x))
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    # also without having dropped the weight first, and where the layer is a part of a model
    model = torch.nn.Sequential(
        torch.nn.Identity(),
        BitLinearBitBLAS(70, 33, bias=True, quant_type=fresh.quant_type, dtype=dtype),
    )
    model.load_state_dict({f"1.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(model(x), packed(x))


def test_sw_keeps_every_scale_exactly():
    fresh = BitLinearBitBLAS(3, 5)
    for seed in range(200):
        source = make(5, 3, seed=seed)
        packed = BitLinearBitBLAS(3, 5)
        packed.load_state_dict(source.state_dict())
        packed.post_process_weights()
        for layer in (packed, BitLinearBitBLAS.from_bit_linear(source)):
            fresh.load_state_dict(layer.state_dict())
            assert torch.equal(fresh.w_scale, layer.w_scale)


@torch.inference_mode()
def test_one_scale_loads_into_a_layer_of_several():
    layer = make(33, 70, bias=True)
    layer.weight.data.zero_()  # whose parts have one scale: the least
    packed = BitLinearBitBLAS.from_bit_linear(layer, 3)
    fresh = BitLinearBitBLAS(70, 33, bias=True, quant_type="ai8pc_wpc")
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(rows(70, torch.float32)), layer.bias.expand(2, 3, 33))


def test_state_dicts_that_do_not_fit_name_their_tensors():
    state = BitLinearBitBLAS.from_bit_linear(make(33, 70)).state_dict()
    fresh = BitLinearBitBLAS(70, 33)
    fresh.replace_weight_param_with_qweight()
    with pytest.raises(RuntimeError, match=r"qweight \(33, 17\).* takes qweight \(33, 18\)"):
        fresh.load_state_dict({**state, "qweight": state["qweight"][:, :-1].contiguous()})
    with pytest.raises(RuntimeError, match=r"sw \(33, 1\).* takes .*sw \(1,\)"):
        fresh.load_state_dict({**state, "sw": torch.ones(33)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"sw"'):
        fresh.load_state_dict({name: tensor for name, tensor in state.items() if name != "sw"})
    for name, own in (("qweight", "w_packed"), ("sw", "w_scale")):
        with pytest.raises(RuntimeError, match=f"the same tensor is there twice: {name} and {own}"):
            fresh.load_state_dict({**state, own: state[name]})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"more"'):
        fresh.load_state_dict({**state, "more": torch.ones(1)})
    assert fresh.load_state_dict({"sw": state["sw"]}, strict=False).missing_keys == ["qweight"]


@torch.inference_mode()
def test_copies_dtypes_and_pickles():
    packed = BitLinearBitBLAS.from_bit_linear(make(33, 70, bias=True))
    x = rows(70, torch.float32)
    wanted = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), wanted)
    half = copy.deepcopy(packed).half()
    exact, bound = expected(x.half(), [make(33, 70, bias=True).weight], packed.bias.half(), torch.float16)
    assert is_close(half(x.half()), exact, bound)
    assert half.sw.dtype is torch.float64
    assert torch.equal(half.sw, packed.sw)
