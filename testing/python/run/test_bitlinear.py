"""Deployed BitLinear layers: against float64 and against training, learning, gradients, graphs, threads and forks."""

import copy
import itertools
import math
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bitblas
import ternary
from bitblas import ArgumentError, BitLinear
from ternary import DTYPES, SCHEMES, U32, assert_right, expect, make, rows, unit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

#: N, K and a group: whole words of bytes, and what is multiplied in floats.
SHAPES = [(32, 64, 16), (17, 33, 11), (1, 1, 1), (48, 1056, 132)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ran(layer, x):
    with torch.no_grad():
        return layer(x)


def both(layer, x):
    """What a layer computes in training, what it is expected to, and the deployed layer with what that computes."""
    expected, trained = expect(layer, x.reshape(-1, x.shape[-1])), ran(layer, x)
    return trained, expected, layer.deploy(), ran(layer, x)


def assert_as_trained(deployed, trained, layer, expected):
    """Equal to the bit where the sum is one of integers and nothing is added to it, else to the roundings that differ.

    Beside an equal sum and an equal factor, a bias is added with one rounding (a fused product and sum) or with two; groups are
    summed in another order.
    """
    assert deployed.dtype is trained.dtype
    if layer.bias is None and "wpg" not in layer.quant_type:
        assert torch.equal(deployed, trained)
        return
    without = expected.output if layer.bias is None else expected.output - layer.bias.double()
    allowed = 1.01 * U32 * without.abs() + 2 * U32 * expected.output.abs()
    if "wpg" in layer.quant_type:
        allowed = 2 * expected.allowed
    if trained.dtype is not torch.float32:  # each is rounded once more
        half = ternary.reference._HALF_SUBNORMAL[str(trained.dtype).removeprefix("torch.")]
        allowed = allowed + 2 * unit(trained.dtype) * trained.double().abs() + 2 * half
    wrong = ~((deployed.double() - trained.double()).abs() <= allowed)
    assert not wrong.any(), (deployed[wrong][:4], trained[wrong][:4], allowed[wrong][:4])


# -- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_deployed_as_trained(quant_type, dtype, bias):
    for seed in range(20):
        layer = make(32, 64, quant_type, dtype, seed, bias)
        x = rows(9, 64, dtype, seed)
        trained, expected, layer, deployed = both(layer, x)
        assert_right(deployed, expected)
        assert_as_trained(deployed, trained, layer, expected)
        assert torch.equal(ran(layer, x), deployed)  # the second call takes another way
        for m in (1, 3):
            assert_as_trained(ran(layer, x[:m]), trained[:m], layer, expect_rows(expected, m))


def expect_rows(expected, m):
    """The first rows of what is expected."""
    return ternary.Expected(
        expected.output[:m], expected.allowed[:m], expected.steps[:m], expected.whole[:m], expected.weight
    )


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(shape, dtype):
    N, K, group = shape
    names = ("ai8pc_wpt", "ai8pc_wpc", f"ai8pc_wpg{group}")
    turn = DTYPES.index(dtype) + SHAPES.index(shape)  # builds take a second each
    for quant_type, bias in ((names[turn % 3], True), (names[(turn + 1) % 3], False)):
        for seed in range(5):
            x = rows(17, K, dtype, seed)
            trained, expected, layer, deployed = both(make(N, K, quant_type, dtype, seed, bias), x)
            assert_right(deployed, expected)
            assert_as_trained(deployed, trained, layer, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["ai8pc_wpt", "ai8pc_wpc", "ai8pc_wpg"])
def test_real_shapes(quant_type, dtype):
    torch.manual_seed(5)
    layer = BitLinear(4096, 1024, quant_type=quant_type, dtype=dtype)
    x = rows(130, 4096, dtype)
    trained = ran(layer, x)
    deployed = ran(copy.deepcopy(layer).deploy(), x)
    if ternary.clear(layer):
        assert_as_trained(deployed, trained, layer, expect(layer, x))
    else:
        torch.testing.assert_close(deployed, trained, rtol=4 * unit(dtype), atol=1e-4)


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_eps_counts_when_deployed(quant_type):
    layer, x = make(32, 64, quant_type, eps=0.5), rows()
    with torch.no_grad():
        layer.weight[:16] *= 100
    x[1:3] *= 1e-3
    trained, expected, layer, deployed = both(layer, x)
    assert_right(deployed, expected)
    assert_as_trained(deployed, trained, layer, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_rows_that_are_not_like_others(quant_type, dtype):
    """Zeros give the bias, what is not finite gives NaN, and other rows do not notice; so do weights of zeros."""
    layer, x = make(32, 64, quant_type, dtype).deploy(), rows(7, dtype=dtype)
    clean = ran(layer, x)
    x[1], x[2], x[3, 5], x[4, 0], x[5] = 0, -0.0, math.nan, math.inf, -math.inf
    out = ran(layer, x)
    assert torch.equal(out[1], layer.bias)
    assert torch.equal(out[2], layer.bias)
    assert out[3:6].isnan().all()
    assert torch.equal(out[0::6], clean[0::6])
    zeros = make(32, 64, quant_type, dtype)
    with torch.no_grad():
        zeros.weight.zero_()
    assert torch.equal(ran(zeros.deploy(), x[:3]), zeros.bias.expand(3, 32))


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_halves_go_to_the_even_number(quant_type):
    """A weight of one in each row shows q to the last bit."""
    codes = torch.eye(64)[:32]
    scale = {"ai8pc_wpt": 1.0, "ai8pc_wpc": torch.ones(32), "ai8pc_wpg16": torch.ones(32, 4)}[quant_type]
    layer = BitLinear.from_ternary(codes, scale)
    x = torch.zeros(2, 64)
    x[0, :32], x[0, 63] = torch.arange(32) + 0.5, 127
    x[1] = -x[0]
    even = torch.tensor([2.0 * ((i + 1) // 2) for i in range(32)])
    assert torch.equal(ran(layer, x), torch.stack([even, -even]))


# -- shapes, arguments -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual():
    return make().deploy()


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_ranks(usual, shape):
    x = torch.randn(shape)
    out = ran(usual, x)
    assert out.shape == (*shape[:-1], 32)
    assert torch.equal(out.reshape(-1, 32), ran(usual, x.reshape(-1, 64)))


def test_gaps_between_activations(usual):
    wide, x = torch.full((4, 130), math.nan), rows(4)
    wide[:, 1:129:2] = x
    expected = ran(usual, x)
    for view in (wide[:, 1:129:2], x.T.contiguous().T):
        assert torch.equal(ran(usual, view), expected)
    assert torch.equal(ran(usual, x[:1].expand(3, 64)), expected[:1].expand(3, 32))


def test_output_is_filled_and_returned(usual):
    x, out = rows(), torch.full((5, 32), math.nan)
    assert usual(x, out) is out
    assert torch.equal(out, ran(usual, x))
    assert usual(x, output=out) is out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(3, 63),), "63.*K = 64"),
        ((torch.zeros(()),), "K = 64"),
        ((torch.zeros(3, 64, dtype=torch.float16),), "A has dtype torch.float16; this operator takes torch.float32"),
        ((torch.zeros(3, 64, dtype=torch.int8),), "A has dtype torch.int8"),
        ((torch.zeros(3, 64, device="meta"),), "A is on device meta"),
        (([[0.0] * 64],), "A is a list"),
        ((torch.zeros(3, 64), torch.zeros(3, 31)), "output has shape"),
        ((torch.zeros(3, 64), torch.zeros(3, 32, dtype=torch.float16)), "output has dtype"),
        ((torch.zeros(3, 64), torch.zeros(32, 3).T), "contiguous"),
    ],
    ids=str,
)
def test_wrong_uses(usual, given, message):
    for _ in range(2):
        with pytest.raises(ArgumentError, match=message):
            usual(*given)


def test_a_replaced_buffer_is_noticed():
    layer, other, x = make(bias=True).deploy(), make(seed=1).deploy(), rows()
    before = ran(layer, x)
    for name in ("w_packed", "w_scale", "bias"):
        setattr(layer, name, getattr(other, name).clone())
        assert not torch.equal(ran(layer, x), before)
    assert torch.equal(ran(layer, x), ran(other, x))
    layer.w_scale = torch.ones(2)
    with pytest.raises(ArgumentError, match=r"scale has shape \(2,\); expected \(1,\)"):
        ran(layer, x)


# -- states, copies, moves: what is computed afterwards --------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_what_was_loaded_or_copied_computes_the_same(quant_type):
    layer, x = make(quant_type=quant_type).deploy(), rows()
    expected = ran(layer, x)
    fresh = make(quant_type=quant_type, seed=1)
    fresh(x)  # in training
    fresh.load_state_dict(layer.state_dict())
    empty = BitLinear(64, 32, quant_type=quant_type, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    others = [fresh, empty, copy.deepcopy(layer), BitLinear.from_ternary(layer.to_quantized())]
    for other in others:
        assert torch.equal(ran(other, x), expected)
    for dtype in (torch.float16, torch.bfloat16):
        moved, made = copy.deepcopy(layer).to(dtype), BitLinear.from_ternary(layer.to_quantized(), dtype=dtype)
        assert torch.equal(ran(moved, x.to(dtype)), ran(made, x.to(dtype)))
        torch.testing.assert_close(ran(moved, x.to(dtype)).float(), expected, rtol=8 * unit(dtype), atol=0.05)


def test_a_failed_load_is_followed_by_the_same_numbers():
    layer, x = make().deploy(), rows()
    expected = ran(layer, x)
    with pytest.raises(RuntimeError, match="that of another layer"):
        layer.load_state_dict(make(quant_type="ai8pc_wpc").deploy().state_dict())
    assert torch.equal(ran(layer, x), expected)
    training = make()
    trained = ran(training, x)
    with pytest.raises(RuntimeError, match="that of another layer"):
        training.load_state_dict(make(quant_type="ai8pc_wpc").deploy().state_dict())
    assert torch.equal(ran(training, x), trained)


# -- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_gradients_reach_the_activations(quant_type):
    layer, x, above = make(quant_type=quant_type), rows().requires_grad_(), torch.randn(5, 32)
    expected = expect(layer, x)
    layer.deploy()(x).backward(above)
    exact, magnitude = above.double() @ expected.weight, above.double().abs() @ expected.weight.abs()
    assert ((x.grad.double() - exact).abs() <= (2 * math.sqrt(32) + 8) * U32 * magnitude).all()
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(ArgumentError, match="no second derivative"):
        slope.sum().backward()
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.detach().clone()))


def test_autocast():
    layer = make(dtype=torch.bfloat16).deploy()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer(rows()), layer(rows().bfloat16()))


def net(quant_type, seed=0):
    """Two layers, and points in three rings to be told apart."""
    torch.manual_seed(seed)
    points = torch.randn(512, 16)
    labels = torch.bucketize(points[:, :4].square().sum(1), torch.tensor([2.4, 4.5]))
    model = torch.nn.Sequential(torch.nn.Linear(16, 128), torch.nn.ReLU(), torch.nn.Linear(128, 3))
    return bitblas.ternarize_(model, quant_type), points, labels


def accuracy(model, points, labels):
    with torch.no_grad():
        return float((model(points).argmax(1) == labels).float().mean())


@pytest.fixture
def one_thread():
    """Steps of so small a net take longer with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_a_net_learns(quant_type):
    """The loss falls to less than a third, and the accuracy of the deployed net is that of the trained one."""
    model, points, labels = net(quant_type)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    trained, outputs = accuracy(model, points, labels), ran(model, points)
    assert trained > 0.85
    assert bitblas.deploy(model) is model
    assert all(layer.bitblas_matmul.origin != "not built" for layer in model if isinstance(layer, BitLinear))
    assert accuracy(model, points, labels) == trained
    torch.testing.assert_close(ran(model, points), outputs, rtol=1e-3, atol=0.05)
    again, _, _ = net(quant_type, 1)
    again.load_state_dict(model.state_dict())
    assert torch.equal(ran(again, points), ran(model, points))


# -- one kernel, graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)], ids=str)
def test_a_call_is_one_kernel(dtype, shape):
    layer, x = make(dtype=dtype).deploy(), torch.randn(shape).to(dtype)
    ran(layer, x)
    for _ in range(2):
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            torch.inference_mode(),
        ):
            layer(x)
        names = [event.name for event in profile.events()]
        assert names.count("bitblas::matmul") == 1
        left = set(names) - {"bitblas::matmul", "aten::new_empty", "aten::empty", "aten::view"}
        assert not left, names


def test_training_is_seen_by_a_profiler_as_more():
    """The test of the test."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        make()(rows())
    assert "aten::linear" in {event.name for event in profile.events()}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    for layer in (make().deploy(), make(quant_type="ai8pc_wpg16", bias=False).deploy()):
        graphs = []

        def count(module, inputs, graphs=graphs):
            graphs.append(module)
            return module.forward

        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        x = rows().requires_grad_()
        out = compiled(x)
        assert torch.equal(out.detach(), ran(layer, x))
        out.sum().backward()
        assert x.grad.abs().sum() > 0
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, fullgraph=True, backend=count)(rows()), ran(layer, rows()))
        assert [str(node.target) for node in graphs[0].graph.nodes if "bitblas" in str(node.target)] == [
            "bitblas.matmul"
        ]


def test_a_layer_may_be_deployed_after_it_was_compiled():
    layer, x = make(), rows()
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        trained = compiled(x)
        layer.deploy()
        torch.testing.assert_close(compiled(x), trained, rtol=1e-5, atol=1e-5)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_exported(bias, tmp_path):
    layer, x = make(bias=bias).deploy(), rows()
    count = torch.export.Dim("count", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: count},))
        torch.export.save(program, tmp_path / "layer.pt2")
        found = torch.export.load(tmp_path / "layer.pt2").module()
        for m in (1, 5, 17):
            assert torch.equal(found(rows(m)), layer(rows(m)))


# -- threads and forks -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("deployed", [True, False])
def test_several_threads_on_one_layer(deployed):
    for seed in range(5):  # the first call included
        layer, x = make(seed=seed), rows()
        layer = layer.deploy() if deployed else layer
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, layer=layer, x=x: ran(layer, x), range(24)))
        assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_uses_the_layer(usual):
    x = rows(1)
    expected = ran(usual, x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(ran(usual, x).tolist()))
    child.start()
    found = torch.tensor(queue.get(timeout=60))
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations([torch.no_grad, torch.inference_mode], 2)))
def test_without_gradients(first, second):
    with first():
        layer = make(seed=3).deploy()
        out = layer(rows())
    with second():
        assert torch.equal(layer(rows()), out)
    x = rows().requires_grad_()
    make(seed=3).deploy()(x).sum().backward()
    assert x.grad.isfinite().all()
