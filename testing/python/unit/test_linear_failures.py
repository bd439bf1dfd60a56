"""A layer to which something happens that fails, and what stands for its weight. Nothing is built here."""

import copy
import pickle

import pytest
import torch

import bitblas
import layers
from bitblas import ArgumentError
from bitblas.nn import portable
from bitblas.target import resolve_target
from layers import config, layer_and_problem


def state_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("parameter", [False, True])
def test_a_move_that_fails_changes_nothing(monkeypatch, step, parameter):
    """Wherever it fails, and where the layout is another afterwards, too."""
    layer, problem = layer_and_problem(N=64, K=128, group_size=64)
    if parameter:
        tensor = layer.qweight
        del layer.qweight
        layer.qweight = torch.nn.Parameter(tensor, requires_grad=False)
    before, operator = state_of(layer), layer.bitblas_matmul
    real, left = torch.Tensor.half, [step + 2]  # two are asked of it before anything is changed

    def change(tensor):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no more of it")
        return real(tensor) if tensor.is_floating_point() else tensor.clone()

    monkeypatch.setattr(portable, "target_of", lambda device: resolve_target("cuda -arch=sm_80"))
    with pytest.raises(MemoryError):
        layer._apply(change)
    assert layer.bitblas_matmul is operator
    assert layer.config == problem.config
    assert same(state_of(layer), before)


def test_a_state_that_does_not_fit_leaves_no_order():
    layer, _ = layer_and_problem()
    state = {**state_of(layer), "perm": torch.randperm(64, dtype=torch.int32)}
    state["scales"] = state["scales"][:, :2]
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        layer.load_state_dict(state)
    assert layer.perm is None
    assert "perm" not in layer.state_dict()


@pytest.mark.parametrize("name", ["qweight", "scales", "A"])
def test_memory_that_was_freed_is_not_read(name):
    layer, problem = layer_and_problem()
    tensor = problem.A if name == "A" else getattr(layer, name)
    tensor.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(ArgumentError, match="has no memory: its storage was freed"):
        layer(problem.A)


# -- what stands for the weight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a_dtype", "dtype"), [("float16", torch.float16), ("int8", torch.int8)])
def test_models_may_ask_for_the_weights_dtype_device_and_shape(a_dtype, dtype):
    layer = bitblas.Linear(64, 32, A_dtype=a_dtype, W_dtype="uint4", out_dtype="float32")
    weight = layer.weight
    assert (weight.dtype, weight.device.type, weight.shape, weight.ndim) == (dtype, "cpu", (32, 64), 2)
    assert weight.size(1) == 64
    assert not weight.requires_grad
    assert "WeightStandIn" in repr(weight)
    assert layer.to("meta").weight.is_meta


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: torch.nn.functional.linear(torch.ones(2, 64), weight),
        lambda weight: weight @ torch.ones(64),
        lambda weight: weight.sum(),
        lambda weight: weight.T,
        lambda weight: weight.clone(),
        lambda weight: weight.data_ptr(),
        lambda weight: weight.tolist(),
        lambda weight: weight.copy_(torch.ones(32, 64)),
        lambda weight: weight[0],
    ],
    ids=["linear", "matmul", "sum", "T", "clone", "data_ptr", "tolist", "copy_", "index"],
)
def test_nobody_computes_with_it(use):
    layer, _ = layer_and_problem(A_dtype="float32")
    with pytest.raises(ArgumentError, match=r"weight of a quantized layer was asked for .*dequantize\(\)"):
        use(layer.weight)


def test_it_is_no_part_of_the_layer():
    layer, _ = layer_and_problem()
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert one.weight.shape == (32, 64)
        assert "weight" not in {**dict(one.named_buffers()), **dict(one.named_parameters()), **one.state_dict()}
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = layer.wieght
    native = layers.build(config(W_dtype="float32", with_zeros=False))
    assert type(native.weight) is torch.Tensor
