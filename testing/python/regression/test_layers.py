"""Layers: what a review found once."""

import copy

import pytest
import torch

import bitblas
from bitblas.codecs.rounding import quantize
from bitblas.errors import ArgumentError
from bitblas.nn import portable
from bitblas.target import resolve_target

OPTIONS = {"W_dtype": "uint4", "group_size": 32, "opt_M": 1}


def layer_of(bias=True, **options):
    return bitblas.Linear.from_linear(torch.nn.Linear(64, 32, bias), **{**OPTIONS, **options})


def test_a_refused_state_leaves_no_order():
    layer, before = layer_of(), None
    before = copy.deepcopy(layer.to_quantized())
    state = layer.state_dict()
    state["perm"], state["scales"] = torch.randperm(64).int(), state["scales"][:5]
    with pytest.raises(RuntimeError, match="scales"):
        layer.load_state_dict(state)
    assert layer.perm is None
    assert torch.equal(layer.to_quantized().dequantize(), before.dequantize())


def test_a_move_that_fails_leaves_the_layer(monkeypatch):
    layer = layer_of()
    before, state = layer.to_quantized().dequantize(), {k: v.clone() for k, v in layer.state_dict().items()}
    assert layer.bitblas_matmul.layout.name != "packed"
    monkeypatch.setattr(portable, "target_of", lambda device: resolve_target("cuda -arch=sm_80"))

    def fails(tensor):
        if tensor.shape == (32,):  # the bias, which comes after the weight
            raise torch.OutOfMemoryError("there is no more")
        return tensor.half() if tensor.is_floating_point() else tensor.clone()

    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(fails)
    assert torch.equal(layer.to_quantized().dequantize(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_groups_of_zeros_stay_zeros_in_int1(dtype):
    weight = torch.randn(4, 64, dtype=dtype)
    weight[1], weight[2, 32:] = 0, 0
    values = quantize(weight, "int1", 32).dequantize()
    assert not values[1].any()
    assert not values[2, 32:].any()
    assert values[2, :32].all()


def test_a_tensor_in_an_empty_place_is_noticed_after_a_call():
    layer, x = layer_of(bias=False), torch.randn(1, 64)
    layer(x)
    layer.bias = torch.ones(32)
    with pytest.raises(ArgumentError, match="bias was given"):
        layer(x)


def test_freed_memory_is_refused():
    layer, x = layer_of(), torch.randn(1, 64)
    layer(x)
    with pytest.raises(ArgumentError, match="A is a zero tensor"):
        layer(torch._efficientzerotensor((1, 64)))
    layer.scales.untyped_storage().resize_(0)
    with pytest.raises(ArgumentError, match="scale has no memory"):
        layer(x)


def test_operands_keep_the_shape_in_which_they_were_checked():
    layer, x = layer_of(), torch.randn(1, 64)
    expected = layer(x)
    layer.scales.t_()  # the same memory, which holds as much
    assert torch.equal(layer(x), expected)


def test_a_layer_on_meta_is_complete_once_it_has_a_weight():
    layer = bitblas.Linear(
        64, 32, True, "float32", "uint4", "float32", "float32", 32, True, device="meta", act_order=True
    )
    layer.load_and_transform_weight(torch.randint(0, 16, (32, 64)), torch.rand(32, 2))
    assert {tensor.device.type for tensor in layer.buffers()} == {"cpu"}
    assert torch.equal(layer.perm, torch.arange(64, dtype=torch.int32))
    assert not layer.bias.any()


def test_what_a_weight_tells_without_being_one():
    weight = layer_of().weight
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.float32, (32, 64), "cpu")
    assert isinstance(weight, torch.Tensor)
    for use in (lambda: torch.randn(1, 64) @ weight.T, lambda: weight + 1, lambda: weight.data, lambda: weight.sum()):
        with pytest.raises(ArgumentError, match="to_quantized"):
            use()
    with pytest.raises(AttributeError, match="wieght"):
        _ = layer_of().wieght


def test_models_that_ask_their_layers_for_weights():
    encoder = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():  # in which torch hands the weights to a kernel of its own, unless they are none
        expected = encoder(x)
        bitblas.quantize_(encoder, "int8", 64, opt_M=[16])
        torch.testing.assert_close(encoder(x), expected, rtol=0, atol=0.05)
