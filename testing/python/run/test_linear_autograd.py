"""Gradients through quantized layers: to activations and biases, compared with dense ones in float64."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bitblas
import layers
import reference
from bitblas import ArgumentError
from layers import config, layer_and_problem

FLOATS = ("float32", "float16", "bfloat16")


def wanted(problem, above):
    """The float64 gradient of (output · above).sum() to A, and how far a sum of float32 products may be from it."""
    exact = above.double() @ problem.dense()
    magnitude = above.double().abs() @ problem.dense().abs()
    n = above.shape[-1]
    # the weight is decoded in float32 (three roundings), and n products are summed
    return exact, (n + 8) * reference.ROUNDOFF["float32"] * magnitude


def assert_gradient(found, problem, above):
    exact, allowed = wanted(problem, above)
    allowed = allowed + reference.ROUNDOFF[problem.config.A_dtype] * exact.abs() + 2.0**-25
    assert found.dtype is problem.A.dtype
    assert found.shape == problem.A.shape
    wrong = ~((found.double() - exact).abs() <= allowed)
    assert not wrong.any(), (found[wrong][:4], exact[wrong][:4], allowed[wrong][:4])


def gradient(layer, problem, above):
    a = problem.A.clone().requires_grad_()
    layer(a).backward(above)
    return a.grad


@pytest.mark.parametrize("mode", ["quantized", "original", "rescale", None])
@pytest.mark.parametrize("name", FLOATS)
def test_to_the_activations(name, mode):
    zeros = {"with_zeros": mode is not None, "zeros_mode": mode}
    layer, problem = layer_and_problem(m=5, A_dtype=name, out_dtype=name, **zeros)
    above = torch.randn(5, 32).to(problem.A.dtype)
    assert_gradient(gradient(layer, problem, above), problem, above)
    a = problem.A.clone().requires_grad_()
    out = layer(a)
    assert torch.equal(out, layer(problem.A))  # the value is that of a call without gradient
    assert out.requires_grad
    assert not layer(problem.A).requires_grad


@pytest.mark.parametrize("name", ["int4", "nf4", "float8_e4m3", "uint3", "int1", "float32"])
def test_formats(name):
    layer, problem = layer_and_problem(m=5, W_dtype=name, N=17, K=13, group_size=-1, with_zeros=False)
    above = torch.randn(5, 17)
    assert_gradient(gradient(layer, problem, above), problem, above)


def test_a_weight_of_many_rows_is_decoded_in_blocks():
    layer, problem = layer_and_problem(m=2, N=bitblas.dequantization.BLOCK_ROWS + 33, K=8, group_size=4)
    above = torch.randn(2, problem.config.N)
    assert_gradient(gradient(layer, problem, above), problem, above)


@pytest.mark.parametrize("shape", [(64,), (2, 2, 64), (0, 64)])
def test_shapes(shape):
    layer, problem = layer_and_problem(m=4)
    a = problem.A.flatten()[: math.prod(shape)].view(shape).clone().requires_grad_()
    above = torch.randn(*shape[:-1], 32)
    layer(a).backward(above)
    assert a.grad.shape == shape
    exact, allowed = wanted(problem, above)
    assert ((a.grad.double() - exact).abs() <= 2 * allowed).all()


def test_gaps_in_what_comes_from_above():
    layer, problem = layer_and_problem(m=4)
    a = problem.A.clone().requires_grad_()
    layer(a).sum().backward()  # an expanded scalar
    assert_gradient(a.grad, problem, torch.ones(4, 32))
    a.grad = None
    above = torch.randn(32, 4)
    layer(a).T.backward(above)
    assert_gradient(a.grad, problem, above.T)


def test_differences_agree():
    """The product is linear in A: for small integers, differences of the layer's own values are its derivative, exactly."""
    layer, problem = layer_and_problem(m=1, exact=True)
    above = torch.randint(-3, 4, (1, 32)).float()
    found = gradient(layer, problem, above)
    steps = torch.eye(64)
    values = layer(torch.cat([problem.A, problem.A + steps]))
    assert torch.equal(found[0], (values[1:] - values[:1]) @ above[0])


@pytest.mark.parametrize("name", FLOATS)
def test_to_a_bias(name):
    layer, problem = layer_and_problem(m=7, A_dtype=name, out_dtype=name)
    bias = layer.bias
    del layer.bias
    layer.bias = torch.nn.Parameter(bias)
    above = torch.randn(7, 32).to(problem.A.dtype)
    for activations in (problem.A, problem.A.clone().requires_grad_()):
        layer.bias.grad = None
        layer(activations).backward(above)
        exact = above.double().sum(0)
        u = reference.ROUNDOFF
        allowed = 7 * u["float32"] * above.double().abs().sum(0) + u[name] * exact.abs()
        assert layer.bias.grad.dtype is layer.bias.dtype
        assert ((layer.bias.grad.double() - exact).abs() <= allowed).all()
    assert not layer(problem.A).detach().requires_grad
    with torch.no_grad():
        assert not layer(problem.A).requires_grad


def test_twice_in_a_graph():
    layer, problem = layer_and_problem(m=3, N=64, group_size=16)
    a = problem.A.clone().requires_grad_()
    (layer(a) + layer(torch.relu(layer(a)))).sum().backward()
    dense, bias = problem.dense(), problem.bias.double()
    b = problem.A.double().requires_grad_()
    first = b @ dense.T + bias
    (first + torch.relu(first) @ dense.T + bias).sum().backward()
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.abs().max()))


def test_second_derivatives():
    for bias in (True, False):
        layer, problem = layer_and_problem(with_bias=bias)
        a, b = problem.A.clone().requires_grad_(), problem.A.double().requires_grad_()
        shift = problem.bias.double() if bias else 0

        def penalty(x, out):
            (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            return torch.autograd.grad(slope.square().sum(), x)[0]

        found, exact = penalty(a, layer(a)), penalty(b, b @ problem.dense().T + shift)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_the_order_of_activations():
    layer, problem = layer_and_problem(m=4)
    layer.perm = torch.randperm(64, dtype=torch.int32)
    above = torch.randn(4, 32)
    moved = torch.empty_like(problem.A)
    moved[:, layer.perm.long()] = problem.A
    a = moved.clone().requires_grad_()
    layer(a).backward(above)
    assert_gradient(a.grad[:, layer.perm.long()], problem, above)


@pytest.mark.parametrize("how", ["row", "group"])
def test_rounding_on_the_fly_is_passed_straight_through(how):
    layer, problem = layer_and_problem(m=4, dynamic_quantization=how)
    above = torch.randn(4, 32)
    assert_gradient(gradient(layer, problem, above), problem, above)
    a = problem.A.clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer(a).square().sum(), a, create_graph=True)
    with pytest.raises(ArgumentError, match="no second derivative"):
        slope.sum().backward()


# -- training --------------------------------------------------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """LoRA, arXiv:2106.09685: a frozen layer and a trained product of two small matrices."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.up = torch.nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


def test_lora():
    model = torch.nn.Sequential(
        Adapted(layer_and_problem()[0]), torch.nn.Tanh(), Adapted(layer_and_problem(seed=1, N=64, K=32)[0])
    )
    frozen = {name: tensor.clone() for name, tensor in model.named_buffers()}
    parameters = list(model.parameters())
    assert len(parameters) == 4
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    x, target = torch.randn(16, 64), torch.randn(16, 64)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.named_buffers())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    layer, problem = layer_and_problem(m=4)
    a, b = problem.A.clone().requires_grad_(), problem.A.clone().requires_grad_()
    checkpoint(lambda x: torch.tanh(layer(x)), a, use_reentrant=reentrant).sum().backward()
    torch.tanh(layer(b)).sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast(grad):
    layer, problem = layer_and_problem(A_dtype="bfloat16", out_dtype="bfloat16")
    wide = problem.A.float().requires_grad_(grad)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            out = layer(wide)
        assert torch.equal(out, layer(problem.A))
    if grad:
        above = torch.randn(3, 32).bfloat16()
        out.backward(above)
        assert wide.grad.dtype is torch.float32
        assert_gradient(wide.grad.bfloat16(), problem, above)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"A has dtype torch\.float32; this operator takes torch\.bfloat16"):
            layer(wide.detach())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ArgumentError, match=r"A has dtype torch\.int64"):
        layer(wide.long())


# -- where there is no gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    layer, problem = layer_and_problem()
    a = problem.A.clone().requires_grad_()
    with mode():
        out = [layer(a), layer(a)]
        assert not any(o.requires_grad for o in out)
    reference.assert_close(out[0], problem)
    assert torch.equal(out[1], layer(problem.A))
    with torch.inference_mode():
        made = problem.A.clone()
    assert torch.equal(layer(made), out[0])  # outside, with a tensor from inside
    fresh, _ = layer_and_problem()
    with torch.inference_mode():
        fresh(made)
    assert_gradient(gradient(fresh, problem, torch.ones(3, 32)), problem, torch.ones(3, 32))


@pytest.mark.parametrize("name", ["scales", "zeros"])
def test_a_weight_has_no_gradient(name):
    layer, problem = layer_and_problem(zeros_mode="original")
    layer(problem.A)
    getattr(layer, name).requires_grad_()
    for _ in range(2):
        with pytest.raises(ArgumentError, match=f"{name} requires a gradient"):
            layer(problem.A)
    with torch.no_grad():
        reference.assert_close(layer(problem.A), problem)
    layer.requires_grad_(False)
    getattr(layer, name).requires_grad_(False)
    reference.assert_close(layer(problem.A), problem)


def test_a_native_weight_has_no_gradient():
    layer, problem = layer_and_problem(W_dtype="float32", with_zeros=False)
    weight = layer.weight
    del layer.weight
    layer.weight = torch.nn.Parameter(weight)
    with pytest.raises(ArgumentError, match="weight requires a gradient"):
        layer(problem.A)


def test_output_and_a_gradient():
    layer, problem = layer_and_problem()
    out, a = torch.empty(3, 32), problem.A.clone().requires_grad_()
    with pytest.raises(ArgumentError, match="output was given, and A or bias requires a gradient"):
        layer(a, out)
    with torch.no_grad():
        reference.assert_close(layer(a, out), problem)
    with pytest.raises(ArgumentError, match="output requires a gradient"):
        layer(problem.A, out.requires_grad_())


def test_forward_mode_is_refused():
    layer, problem = layer_and_problem()
    layer(problem.A)
    with pytest.raises(ArgumentError, match="tangent"):
        torch.func.jvp(layer, (problem.A,), (problem.A,))
    with torch.autograd.forward_ad.dual_level():
        reference.assert_close(layer(problem.A), problem)  # no tangent, no harm
        with pytest.raises(ArgumentError, match="tangent"):
            layer(torch.autograd.forward_ad.make_dual(problem.A, problem.A))


# -- the operator itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_layouts_of_the_operator(build, layout):
    cfg = config(layout=layout)
    op, problem = build(cfg), reference.draw(cfg, 5)
    weights = problem.weights if layout[1] == "t" else problem.weights.T
    W, above = op.transform_weight(weights), torch.randn(5, 32)
    a = (problem.A if layout[0] == "n" else problem.A.T).contiguous().requires_grad_()
    bias = problem.bias.clone().requires_grad_()
    out = op(a, W, problem.scale, problem.zeros, bias)
    reference.assert_close(out.detach(), problem)
    out.backward(above)
    assert_gradient(a.grad if layout[0] == "n" else a.grad.T, problem, above)
    torch.testing.assert_close(bias.grad, above.sum(0))
    with pytest.raises(ArgumentError, match="scale requires a gradient"):
        op(a, W, problem.scale.clone().requires_grad_(), problem.zeros, bias).sum().backward()
    batch = torch.stack([a.detach(), a.detach()]).requires_grad_()
    op(batch, W, problem.scale, problem.zeros, problem.bias).backward(torch.stack([above, 2 * above]))
    torch.testing.assert_close(batch.grad, torch.stack([a.grad, 2 * a.grad]))


def test_layers_built_for_a_number_of_rows():
    layer = layers.build(config(M=3))
    problem = reference.draw(config(M=3), 3)
    layers.fill(layer, problem)
    above = torch.randn(3, 32)
    assert_gradient(gradient(layer, problem, above), problem, above)
