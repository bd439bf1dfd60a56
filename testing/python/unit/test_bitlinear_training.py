"""BitLinear in training: its numbers, and its gradients, against float64. Nothing is built here."""

import math

import numpy as np
import pytest
import torch
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import bitblas
import ternary
from bitblas import BitLinear
from ternary import DTYPES, SCHEMES, U32, assert_right, expect, make, rows, unit

#: N, K and a group: what no word is filled by, one column, one row, one of each.
ODD = [(17, 33, 11), (5, 7, 7), (1, 6, 2), (3, 1, 1), (1, 1, 1), (31, 130, 65)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", [*SCHEMES, "ai8pc_wpg", "ai8pc_wpg1", "ai8pc_wpg128"])
def test_numbers(quant_type, dtype, bias):
    for seed in range(3):
        layer = make(32, 128, quant_type, dtype, seed, bias)
        x = rows(7, 128, dtype, seed)
        out = layer(x)
        assert out.dtype is dtype
        assert_right(out, expect(layer, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(shape, dtype):
    N, K, group = shape
    for quant_type in ("ai8pc_wpt", "ai8pc_wpc", f"ai8pc_wpg{group}"):
        layer, x = make(N, K, quant_type, dtype), rows(5, K, dtype)
        assert_right(layer(x), expect(layer, x))


def test_the_test_would_notice():
    """A weight of another sign, an activation off by one step, a scale off by 2^-20: each is beyond the bound."""
    layer, x = make(), rows()
    expected = expect(layer, x)
    strong = int(layer.weight[0].abs().argmax())
    with torch.no_grad():
        layer.weight[0, strong] *= -1
        changed = layer(x)
        layer.weight[0, strong] *= -1
        wrong = [changed, layer(x * (1 + 2**-7)), (layer(x) - layer.bias) * (1 + 2**-20) + layer.bias]
    for out in wrong:
        with pytest.raises(AssertionError):
            assert_right(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_ties_go_to_the_even_number(quant_type, dtype):
    """Weights of mean 1 at ±1/2 and ±3/2, then activations at halves of their step."""
    layer = BitLinear(16, 2, False, quant_type=quant_type, dtype=dtype)
    row = torch.tensor([0.5, -0.5, 1.5, -1.5, 0.0, 2.0, 0.5, -0.5, 1.5, -1.5, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    assert row.abs().mean() == 1
    with torch.no_grad():
        layer.weight.copy_(row.expand(2, 16))
    one = torch.eye(16).to(dtype) * 127
    found = layer(one)[:, 0].tolist()
    assert found == [0, 0, 127, -127, 0, 127, 0, 0, 127, -127, 127, 127, 127, -127, 127, 127]
    halves = torch.zeros(16)
    halves[:6], halves[10] = torch.tensor([0, 0, 0.5, -1.5, 0, 2.5]), 127
    assert layer(halves.to(dtype))[0] == 0 - -2 + 2 + 127  # 0.5 to 0, -1.5 to -2, 2.5 to 2


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_eps_is_the_least_of_both(quant_type):
    eps = 0.5
    layer, x = make(32, 64, quant_type, eps=eps), rows()
    with torch.no_grad():
        layer.weight[:16] *= 100  # groups beyond eps, and groups below
    x[1:3] *= 1e-3
    expected = expect(layer, x)
    assert expected.steps.min() == np.float32(eps) / np.float32(127) < expected.steps.max()
    assert_right(layer(x), expected)
    assert not torch.allclose(layer(x), make(32, 64, quant_type)(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_zeros_give_the_bias(quant_type, dtype):
    layer, x = make(dtype=dtype, quant_type=quant_type), rows(dtype=dtype)
    x[1], x[3] = 0, -0.0
    out = layer(x)
    assert torch.equal(out[1], layer.bias)
    assert torch.equal(out[3], layer.bias)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(x), layer.bias.expand(5, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", SCHEMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_and_others_do_not(quant_type, dtype, bad):
    layer, x = make(dtype=dtype, quant_type=quant_type), rows(dtype=dtype)
    clean = layer(x)
    x[1, 5], x[3] = bad, bad
    out = layer(x)
    assert out[[1, 3]].isnan().all()
    assert torch.equal(out[0::2], clean[0::2])


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_the_ends_of_float16(quant_type):
    """The largest and the smallest activations and weights: nothing in between is computed in float16."""
    layer = make(dtype=torch.float16, quant_type=quant_type, bias=False)
    x = rows(dtype=torch.float16)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    x[0], x[1] = 65504, torch.where(x[1] > 0, 2.0**-24, -(2.0**-24))
    out = layer(x)
    assert out.isfinite().all()
    assert_right(out, expect(layer, x))


# -- shapes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", SCHEMES)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_ranks(quant_type, shape):
    layer = make(quant_type=quant_type)
    x = torch.randn(shape)
    out = layer(x)
    assert out.shape == (*shape[:-1], 32)
    assert_right(out.reshape(-1, 32), expect(layer, x.reshape(-1, 64)))


def test_gaps_between_activations():
    layer, wide = make(), torch.full((4, 130), math.nan)
    wide[:, 1:129:2] = rows(4)
    assert torch.equal(layer(wide[:, 1:129:2]), layer(rows(4)))
    assert torch.equal(layer(rows(4).T.contiguous().T), layer(rows(4)))
    assert torch.equal(layer(rows(1).expand(3, 64))[2], layer(rows(1))[0])


# -- gradients -------------------------------------------------------------------------------------------------------------


def assert_gradient(found, exact, magnitude, n, dtype, of_scale=0.0):
    """A sum of n products in float32, of what has been rounded up to eight times, rounded to a dtype."""
    name = str(dtype).removeprefix("torch.")
    allowed = (2 * math.sqrt(n) + 8) * U32 * magnitude + (unit(dtype) + of_scale) * exact.abs()
    allowed = allowed + ternary.reference._HALF_SUBNORMAL[name] + 2.0**-149
    assert found.dtype is dtype
    assert found.shape == exact.shape
    wrong = ~((found.double() - exact).abs() <= allowed)
    assert not wrong.any(), (found[wrong][:4], exact[wrong][:4], allowed[wrong][:4])


def check_gradients(layer, x, above, x_grad=None):
    """The closed form: dx = dy · (w·t), dW = dyᵀ · (q·s), db = Σ dy."""
    expected, dy = expect(layer, x), above.double()
    real = expected.whole * expected.steps
    found = x.grad if x_grad is None else x_grad
    assert_gradient(
        found,
        dy @ expected.weight,
        dy.abs() @ expected.weight.abs(),
        layer.out_features,
        found.dtype,
        unit(layer.weight.dtype),
    )
    # a scale of 16 bits is rounded, as it is when deployed
    of_scale = 0.0 if layer.quant_type == "ai8pc_wpt" else 2 * unit(layer.weight.dtype)
    assert_gradient(layer.weight.grad, dy.T @ real, dy.T.abs() @ real.abs(), len(x), layer.weight.dtype, of_scale)
    if layer.bias is not None:
        assert_gradient(layer.bias.grad, dy.sum(0), dy.abs().sum(0), len(x), layer.bias.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", [*SCHEMES, "ai8pc_wpg1"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_straight_through(quant_type, dtype, bias):
    layer, x = make(quant_type=quant_type, dtype=dtype, bias=bias), rows(dtype=dtype).requires_grad_()
    with torch.no_grad():
        x[2] = 0  # passes its gradient on, too
        layer.weight[3, 4] = 1.0  # clamped
    above = torch.randn(5, 32).to(dtype)
    layer(x).backward(above)
    check_gradients(layer, x, above)
    assert layer.weight.grad.dtype is dtype


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_of_a_compiled_layer(backend):
    for quant_type in SCHEMES if backend == "aot_eager" else SCHEMES[:1]:
        layer, x = make(quant_type=quant_type), rows().requires_grad_()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        out = compiled(x)
        assert_right(out, expect(layer, x))
        above = torch.randn(5, 32)
        out.backward(above)
        check_gradients(layer, x, above)


def test_gradients_through_autocast():
    layer, x = make(dtype=torch.bfloat16), rows().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, layer(x.detach().bfloat16()))
    above = torch.randn(5, 32).bfloat16()
    out.backward(above)
    assert x.grad.dtype is torch.float32
    check_gradients(layer, x.detach().bfloat16(), above, x.grad.bfloat16())
    wide = make()
    with torch.autocast("cpu", torch.bfloat16):  # parameters of float32 are what is computed with
        assert torch.equal(wide(rows()), wide(rows().clone()))
        assert wide(rows().bfloat16()).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = wide(rows())
    assert torch.equal(found, wide(rows()))


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)], ids=str)
def test_gradients_of_other_ranks(shape):
    layer, x = make(), torch.randn(shape).requires_grad_()
    above = torch.randn(*shape[:-1], 32)
    layer(x).backward(above)
    flat = x.detach().reshape(-1, 64)
    check_gradients(layer, flat, above.reshape(-1, 32), x.grad.reshape(-1, 64))


def test_only_what_wants_a_gradient_has_one():
    layer, x = make(), rows()
    layer(x).sum().backward()
    assert x.grad is None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    with torch.no_grad():
        assert not make()(x.requires_grad_()).requires_grad
    with torch.inference_mode():
        made = rows()
        assert torch.equal(layer(made), layer(rows()))


def test_second_derivatives_pass_roundings_too():
    """As of the product x · Wᵀ with x and W in the place of what they are rounded to, each by the other's rounded values."""
    layer, x = make(bias=False), rows().requires_grad_()
    above = torch.randn(5, 32)
    (slope,) = torch.autograd.grad((layer(x) * above).sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(slope.sum(), layer.weight)
    torch.testing.assert_close(found.double(), above.double().sum(0)[:, None].expand(32, 64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    layer, a, b = make(), rows().requires_grad_(), rows().requires_grad_()
    checkpoint(lambda x: torch.tanh(layer(x)), a, use_reentrant=reentrant).sum().backward()
    torch.tanh(layer(b)).sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_any_number_of_rows_is_one_graph():
    layer, graphs = make(), []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for m in (3, 5, 17):
        assert torch.equal(compiled(rows(m)), layer(rows(m)))
    assert len(graphs) <= 2


def test_functional_transforms_see_the_layer():
    layer, x = make(), rows()
    slope = torch.func.grad(lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)).sum())
    layer(x).sum().backward()
    torch.testing.assert_close(slope(layer.weight.detach()), layer.weight.grad)


# -- parameters ------------------------------------------------------------------------------------------------------------


def test_parameters_are_drawn_as_those_of_torch():
    layer = BitLinear(400, 300)
    for tensor in (layer.weight, layer.bias):
        assert tensor.requires_grad
        assert tensor.abs().max() <= 1 / 20
        assert tensor.abs().max() > 0.95 / 20
        assert tensor.mean().abs() < 0.005
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert BitLinear(4, 3, False).bias is None
    assert set(BitLinear(4, 3, False).state_dict()) == {"weight"}


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_its_parameters(bias):
    linear = torch.nn.Linear(64, 32, bias, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    layer = BitLinear.from_linear(linear, "ai8pc_wpg16", 1e-3)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.quant_type, layer.eps) == (64, 32, "ai8pc_wpg16", 1e-3)
    assert not layer.training
    assert not layer.deployed
    assert [name for name, _ in layer.named_parameters()] == (["weight", "bias"] if bias else ["weight"])
    assert_right(layer(rows(dtype=torch.bfloat16)), expect(layer, rows(dtype=torch.bfloat16)))
    assert not BitLinear.from_linear(linear).weight.requires_grad


def test_the_default_scheme_is_that_of_the_whole_weight():
    layer = bitblas.nn.BitLinear(64, 32)
    assert bitblas.BitLinear is bitblas.nn.BitLinear
    assert (layer.quant_type, layer.eps, layer.deployed, layer.training) == ("ai8pc_wpt", 1e-6, False, True)
    assert BitLinear(256, 8, quant_type="ai8pc_wpg").quant_type == "ai8pc_wpg128"
    assert (
        repr(layer)
        == "BitLinear(in_features=64, out_features=32, bias=True, eps=1e-06, quant_type='ai8pc_wpt', training)"
    )


def test_torch_does_not_take_a_shortcut_around_the_layer():
    """… as its transformer layers do in inference, with the weights of their linear layers."""
    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 64)
    dense = block(x)
    bitblas.ternarize_(block)
    expected = block(x).detach()
    assert (expected - dense).abs().max() > 0.1
    with torch.no_grad():
        assert (block(x) - expected).abs().max() < 0.02  # its attention takes one, and rounds otherwise
        bitblas.deploy(block)
        assert (block(x) - expected).abs().max() < 0.02


def test_a_deployed_layer_has_no_hook_but_those_of_its_user():
    layer, seen = make(), []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    x = torch.randn(2, layer.in_features)
    layer(x)
    layer.deploy()(x)
    assert seen == [layer, layer]
    handle.remove()
    assert not layer._forward_pre_hooks
    layer(x)
    assert len(seen) == 2


def test_other_dtypes_are_refused_at_the_first_call():
    layer = BitLinear(16, 8).double()
    with pytest.raises(bitblas.ArgumentError, match=r"parameters are torch.float64; allowed: torch.float16, torch.bfl"):
        layer(torch.randn(2, 16, dtype=torch.float64))


@pytest.mark.parametrize(("end", "how"), [("prune", "weight_orig"), ("norm", "weight_g")])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_pruned_and_normed_layers_are_deployed_when_that_has_ended(end, how):
    layer, utils = BitLinear(64, 32), torch.nn.utils
    if end == "prune":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        utils.weight_norm(layer)
    x = torch.randn(3, 64)
    expected, names = layer(x).detach(), sorted(layer.state_dict())
    with pytest.raises(bitblas.ArgumentError, match=f"weight is no parameter any more, but made of others, .*{how}"):
        layer.deploy()
    assert not layer.deployed
    assert sorted(layer.state_dict()) == names
    if end == "prune":
        prune.remove(layer, "weight")
    else:
        utils.remove_weight_norm(layer)
    torch.testing.assert_close(layer.deploy()(x), expected, rtol=1e-5, atol=1e-5)
