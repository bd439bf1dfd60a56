"""What Linear is given: errors of its constructor and of the tensors it is filled with. Nothing is built here."""

import pytest
import torch

import bitblas
import layers
import reference
from bitblas import ArgumentError, ConfigError
from layers import config, fill, layer_and_problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features is 0"),
        ({"in_features": 2.0}, "in_features is 2.0"),
        ({"out_features": -1}, "out_features is -1"),
        ({"out_features": True}, "out_features is True"),
        ({"bias": "yes"}, "bias is 'yes'"),
        ({"A_dtype": "float64"}, "A_dtype is 'float64'"),
        ({"W_dtype": "uint9"}, "uint9"),
        ({"accum_dtype": "int8"}, "accum_dtype is 'int8'"),
        ({"out_dtype": "uint8"}, "out_dtype is 'uint8'"),
        ({"out_dtype": "int32"}, "out_dtype int32 needs"),
        ({"group_size": 3}, "group_size is 3; it must be -1 or a divisor of K = 64"),
        ({"with_scaling": 2}, "with_scaling is 2"),
        ({"with_zeros": "x"}, "with_zeros is 'x'"),
        ({"zeros_mode": "none"}, "zeros_mode is 'none'"),
        ({"W_dtype": "nf4", "with_zeros": True}, "nf4 has no zero points"),
        ({"W_dtype": "int4", "with_zeros": True, "zeros_mode": "quantized"}, "unsigned"),
        ({"opt_M": 0}, "opt_M is 0"),
        ({"opt_M": []}, "opt_M is empty"),
        ({"opt_M": [1, "16"]}, "opt_M is '16'"),
        ({"enable_tuning": "no"}, "enable_tuning is 'no'"),
        ({"dense_cache": 3}, "dense_cache is 3"),
        ({"act_order": "yes"}, "act_order is 'yes'"),
        ({"dynamic_quantization": "column"}, "dynamic_quantization is 'column'"),
        ({"A_dtype": "int8", "dynamic_quantization": "row"}, "dynamic_quantization 'row' needs"),
    ],
    ids=str,
)
def test_the_constructor_names_what_is_wrong(options, message):
    given = {"in_features": 64, "out_features": 32, "W_dtype": "uint4", **options}
    with pytest.raises(ConfigError, match=message):
        bitblas.Linear(**given)


def test_a_device_without_kernels():
    with pytest.raises(bitblas.UnsupportedError, match="device mps; there are kernels for cpu and cuda"):
        bitblas.nn.operators.target_of(torch.device("mps"))


def test_arguments_by_position():
    layer = bitblas.Linear(
        64, 32, True, "bfloat16", "uint2", "float32", "float32", 8, True, True, "rescale", [2, 4], False, True, True
    )
    assert layer.config == bitblas.MatmulConfig(
        M=(2, 4), N=32, K=64, A_dtype="bfloat16", W_dtype="uint2", accum_dtype="float32", out_dtype="float32",
        with_bias=True, group_size=8, with_scaling=True, with_zeros=True, zeros_mode="rescale",
    )  # fmt: skip
    assert (layer.in_features, layer.out_features, layer.bits, layer.group_size) == (64, 32, 2, 8)
    assert (layer.A_dtype, layer.W_dtype) == ("bfloat16", "uint2")
    assert (layer.accum_dtype, layer.out_dtype) == ("float32", "float32")
    assert (layer.with_scaling, layer.with_zeros, layer.zeros_mode, layer.opt_M) == (True, True, "rescale", (2, 4))
    assert not layer.consistent
    assert layer.bitblas_matmul.origin == "not built"


def test_defaults_are_those_of_the_original():
    layer = bitblas.Linear(64, 32)
    assert layer.config == bitblas.MatmulConfig(
        M=(1, 16, 32, 64, 128, 256, 512, 1024), N=32, K=64, A_dtype="float16", W_dtype="float16", out_dtype="float16"
    )
    assert layer.bias is None
    assert layer.scales is None
    assert bitblas.module.Linear is bitblas.Linear


def test_shapes_and_dtypes_of_buffers():
    layer = bitblas.Linear(
        17, 5, True, "float16", "uint3", "float32", "float32", -1, True, True, "quantized", act_order=True
    )
    found = {name: (tuple(t.shape), t.dtype) for name, t in layer.named_buffers()}
    assert found == {
        "qweight": ((5, 7), torch.int8), "scales": ((5, 1), torch.float16), "zeros": ((1, 2), torch.int8),
        "bias": ((5,), torch.float32), "perm": ((17,), torch.int32), "format": ((128,), torch.uint8),
    }  # fmt: skip
    assert not list(layer.parameters())
    assert layer.perm.tolist() == list(range(17))


@pytest.mark.parametrize(("N", "K"), [(512, 512), (528, 1032)])
@pytest.mark.parametrize("name", ["uint4", "int2", "uint3", "nf4", "int8", "uint1"])
def test_resident_bytes(name, N, K):
    layer = bitblas.Linear(K, N, False, "float16", name)
    packed = N * ((K * layer.bits + 7) // 8)
    assert sum(t.nbytes for t in layer.buffers()) <= 1.1 * packed


def test_equal_layers_share_an_operator():
    first, second = bitblas.Linear(64, 32, W_dtype="uint4"), bitblas.Linear(64, 32, W_dtype="uint4")
    assert first.bitblas_matmul is second.bitblas_matmul
    assert bitblas.Linear(64, 32, W_dtype="int4").bitblas_matmul is not first.bitblas_matmul
    assert bitblas.Linear(64, 32, W_dtype="uint4", dense_cache=True).bitblas_matmul is not first.bitblas_matmul


def test_torchs_default_device_is_followed():
    with torch.device("meta"):
        assert bitblas.Linear(64, 32, W_dtype="uint4").device.type == "meta"
        assert bitblas.Linear(64, 32, W_dtype="uint4", device="cpu").device.type == "cpu"


# -- load_and_transform_weight ---------------------------------------------------------------------------------------------


def wrong_tensors():
    weight, scales = torch.ones(32, 64, dtype=torch.uint8), torch.ones(32, 4)
    zeros, bias = torch.ones(4, 16, dtype=torch.int8), torch.ones(32)
    huge = torch.full((32, 4), torch.inf, dtype=torch.float64)
    huge[3, 1] = 1e60
    usual = {"weight": weight, "scales": scales, "zeros": zeros, "bias": bias}
    rows = [
        ({"weight": weight.T}, r"weight has shape \(64, 32\)"),
        ({"weight": weight[0]}, r"weight has shape \(64,\)"),
        ({"weight": weight + 15}, "16"),
        ({"weight": weight.to(torch.int8) - 2}, "-1"),
        ({"weight": weight / 2}, "0.5"),
        ({"weight": weight * torch.nan}, "nan"),
        ({"weight": weight.cfloat()}, "complex"),
        ({"weight": weight.to("meta")}, "weight is on device meta"),
        ({"weight": [[1]]}, "weight is a list"),
        ({"scales": scales[:, :2]}, r"scales is torch.float32 \(32, 2\); expected torch.float32 \(32, 4\)"),
        ({"scales": scales[0]}, r"scales is torch.float32 \(4,\)"),
        ({"scales": scales.int()}, "scales is torch.int32"),
        ({"scales": huge}, "scales holds 1e\\+60, which torch.float32 does not"),
        ({"zeros": zeros.float()}, "zeros is torch.float32"),
        ({"zeros": zeros[:, :15]}, r"zeros is torch.int8 \(4, 15\)"),
        ({"zeros": scales}, r"zeros is torch.float32 \(32, 4\); expected torch.int8 \(4, 16\)"),
        ({"bias": bias[:31]}, r"bias is torch.float32 \(31,\)"),
        ({"bias": bias.int()}, "bias is torch.int32"),
    ]
    return [pytest.param({**usual, **changed}, message, id=message) for changed, message in rows]


@pytest.mark.parametrize(("given", "message"), wrong_tensors())
def test_wrong_tensors_change_nothing(given, message):
    layer, _problem = layer_and_problem()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        layer.load_and_transform_weight(**given)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("name", ["scales", "zeros", "bias"])
def test_what_the_layer_was_built_without(name):
    layer = bitblas.Linear(64, 32, W_dtype="uint4")
    with pytest.raises(ArgumentError, match=f"{name} was given, and this layer was built without"):
        layer.load_and_transform_weight(torch.zeros(32, 64, dtype=torch.uint8), **{name: torch.ones(32, 1)})


def test_scales_that_float16_does_not_hold():
    layer, (_, problem) = layers.build(config(A_dtype="float16", with_zeros=False)), layer_and_problem(with_zeros=False)
    with pytest.raises(ArgumentError, match=r"scales holds 70000, which torch\.float16 does not"):
        layer.load_and_transform_weight(problem.weights, problem.scale * 0 + 70000, None, problem.bias)
    infinite = torch.full((32, 4), torch.inf)
    layer.load_and_transform_weight(problem.weights, infinite)  # which float16 holds
    assert torch.equal(layer.scales, infinite.half())


def test_other_kinds_of_what_is_right():
    layer, problem = layer_and_problem(group_size=-1)
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weights, scale, zeros, bias = problem.weights, problem.scale, problem.zeros, problem.bias
    kinds = [
        (weights.double(), scale.double(), zeros.view(torch.uint8), bias.double()),
        (weights.T.contiguous().T, scale.view(32), zeros, torch.stack([bias] * 2, 1)[:, 0]),
        (weights.long(), scale.clone().requires_grad_(), zeros, torch.nn.Parameter(bias)),
    ]
    for given in kinds:
        layer = layers.build(config(group_size=-1))
        layer.load_and_transform_weight(*given)
        assert all(torch.equal(expected[name], tensor) for name, tensor in layer.state_dict().items())
        assert not any(tensor.requires_grad for tensor in layer.buffers())


def test_what_is_given_is_copied():
    layer, problem = layer_and_problem(W_dtype="float32", with_zeros=False, N=5, K=8, group_size=-1)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    weights = problem.weights
    layer.load_and_transform_weight(weights, problem.scale, None, problem.bias)
    for tensor in (weights, problem.scale, problem.bias):
        tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.named_buffers())


def test_what_is_not_given_stays():
    layer, problem = layer_and_problem()
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.load_and_transform_weight(problem.weights * 0)
    assert not torch.equal(before["qweight"], layer.qweight)
    assert all(torch.equal(before[name], getattr(layer, name)) for name in ("scales", "zeros", "bias", "format"))


def test_a_layer_without_data_takes_that_of_its_weight():
    _, problem = layer_and_problem()
    layer = fill(layers.build(config(), device="meta"), problem)
    assert layer.device.type == "cpu"
    assert all(t.device.type == "cpu" for t in layer.buffers())
    expected, _ = layer_and_problem()
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in expected.state_dict().items())


# -- QuantizedWeight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["quantized", "original", "rescale"])
def test_a_quantized_weight_and_back(mode):
    layer, problem = layer_and_problem(zeros_mode=mode)
    weight = layer.to_quantized()
    assert torch.equal(weight.packed, reference.pack_bits(problem.codes, 4))
    torch.testing.assert_close(weight.dequantize().double(), problem.dense(), rtol=1e-6, atol=1e-5)
    again = bitblas.Linear.from_quantized(weight, opt_M=[1])
    assert again.config == layer.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in layer.state_dict().items())
    assert again.qweight.data_ptr() != layer.qweight.data_ptr()


def test_a_quantized_weight_with_an_order():
    layer, _ = layer_and_problem()
    layer.perm = torch.randperm(64, dtype=torch.int32)
    again = bitblas.Linear.from_quantized(layer.to_quantized(), A_dtype="float16", opt_M=[1])
    assert torch.equal(again.perm, layer.perm)
    assert again.out_dtype == "float16"
    other, _ = layer_and_problem(seed=2)
    again = layers.build(config(), act_order=True)
    again.load_quantized(other.to_quantized())  # which has none
    assert again.perm is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"N": 16}, r"\(16, 64\) uint4.*takes \(32, 64\) uint4"),
        ({"K": 128}, r"\(32, 128\)"),
        ({"W_dtype": "uint2"}, "uint2.*takes.*uint4"),
        ({"group_size": 32}, "groups of 32.*takes.*groups of 16"),
        ({"zeros_mode": "original"}, "'original'.*takes.*'quantized'"),
        ({"with_zeros": False}, "no zero points.*takes.*'quantized'"),
    ],
    ids=str,
)
def test_a_quantized_weight_that_does_not_fit(fields, message):
    layer, other = layer_and_problem()[0], layer_and_problem(**fields)[0]
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    with pytest.raises(ArgumentError, match=message):
        layer.load_quantized(other.to_quantized())
    assert all(torch.equal(tensor, getattr(layer, name)) for name, tensor in before.items())


def test_a_bias_that_the_layer_has_not():
    weight = layer_and_problem()[0].to_quantized()
    with pytest.raises(ArgumentError, match="bias=False"):
        layers.build(config(with_bias=False)).load_quantized(weight)
    other = layer_and_problem(with_bias=False)[0].to_quantized()
    layer = layer_and_problem()[0]
    layer.load_quantized(other)
    assert not layer.bias.any()


def test_what_is_not_quantized():
    with pytest.raises(ArgumentError, match="float16; there is nothing quantized"):
        bitblas.Linear(64, 32).to_quantized()


def test_a_layer_without_scales_has_those_of_one():
    layer, problem = layer_and_problem(with_scaling=False)
    weight = layer.to_quantized()
    torch.testing.assert_close(weight.dequantize().double(), problem.dense(), rtol=0, atol=0)
    with pytest.raises(ArgumentError, match="without scales"):
        layer.load_quantized(weight)
