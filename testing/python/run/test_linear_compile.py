"""Layers and operators under torch.compile, torch.export and fake tensors."""

import contextlib
import copy
import io
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bitblas
import layers
import reference
from bitblas import ArgumentError
from layers import config, layer_and_problem
from scripts import finish, start

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend of torch.compile that runs the graph as it is, and counts compilations."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(module)
        return module.forward


def operators(module):
    """Names of the operators of ours that a graph calls."""
    return [str(node.target) for node in module.graph.nodes if "bitblas" in str(node.target)]


def block(N=32):
    return torch.nn.Sequential(layer_and_problem(N=N)[0], torch.nn.GELU(), layer_and_problem(seed=1, N=64, K=N)[0])


# -- compile ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_layer(backend):
    layer, problem = layer_and_problem()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        reference.assert_close(compiled(problem.A), problem)
    assert torch.equal(compiled(problem.A), layer(problem.A))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_model(dtype, act_order):
    model = block()
    if act_order:
        model[0].perm = torch.randperm(64, dtype=torch.int32)
    model.to(getattr(torch, dtype))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        x = torch.randn(3, 64, dtype=getattr(torch, dtype))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=5e-2)
    del model[0].bias
    model[0].bias = torch.nn.Parameter(torch.ones(32, dtype=getattr(torch, dtype)))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=5e-2)


def test_layers_that_share_an_operator_share_a_graph():
    counter = Counter()
    stack = torch.nn.ModuleList([layer_and_problem(seed=i, N=64)[0] for i in range(12)])
    run = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=counter, dynamic=False)
    x = torch.randn(3, 64)
    for layer in stack:
        assert torch.equal(run(layer, x), layer(x))
    assert len(counter.graphs) <= 2


def test_any_number_of_rows():
    layer, problem = layer_and_problem(m=17)
    counter = Counter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = problem.A.clone()
    torch._dynamo.mark_dynamic(x, 0)
    assert torch.equal(compiled(x), layer(problem.A))
    for m in (2, 3, 5, 17):
        assert torch.equal(compiled(problem.A[:m]), layer(problem.A[:m]))
    assert len(counter.graphs) == 1
    assert operators(counter.graphs[0]) == ["bitblas.matmul"]


def test_compiling_again_is_bounded():
    layer, problem = layer_and_problem(m=17)
    counter = Counter()
    compiled = torch.compile(layer, backend=counter)
    for m in range(1, 17):
        compiled(problem.A[:m])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            compiled(problem.A[:4])
    assert len(counter.graphs) <= 4


def test_a_replaced_buffer_is_noticed():
    (layer, problem), (_, second) = layer_and_problem(), layer_and_problem(seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    before = compiled(problem.A)
    layers.fill(layer, second)
    after = compiled(problem.A)
    assert torch.equal(after, layer(problem.A))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training(backend):
    model = block()
    bias = model[0].bias
    del model[0].bias
    model[0].bias = torch.nn.Parameter(bias)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = []
    for run in (model, compiled):
        x = torch.linspace(-1, 1, 192).view(3, 64).requires_grad_()
        model.zero_grad()
        run(x).square().sum().backward()
        found.append((x.grad, model[0].bias.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-3)


def test_rounding_on_the_fly():
    layer, problem = layer_and_problem(dynamic_quantization="row")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    a = problem.A.clone().requires_grad_()
    out = compiled(a)
    assert torch.equal(out, layer(problem.A))
    out.sum().backward()
    torch.testing.assert_close(a.grad.double(), problem.dense().sum(0).expand(3, 64), rtol=1e-4, atol=1e-4)


def test_autocast():
    layer, problem = layer_and_problem(A_dtype="bfloat16", out_dtype="bfloat16")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(compiled(problem.A.float()), layer(problem.A))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_output_is_filled(backend):
    layer, problem = layer_and_problem()

    @torch.compile(fullgraph=True, backend=backend)
    def run(a, out):
        layer(a, out)
        return out * 2

    with torch.no_grad():
        out = torch.full((3, 32), float("nan"))
        doubled = run(problem.A, out)
    reference.assert_close(out, problem)
    assert torch.equal(doubled, 2 * out)


@pytest.mark.parametrize("layout", ["nt", "tn", "tt"])
def test_layouts_of_the_operator(build, layout):
    cfg = config(layout=layout)
    op, problem = build(cfg), reference.draw(cfg, 5)
    W = op.transform_weight(problem.weights if layout[1] == "t" else problem.weights.T)
    a = (problem.A if layout[0] == "n" else problem.A.T).contiguous()
    compiled = torch.compile(lambda *operands: op(*operands), fullgraph=True, backend="aot_eager")
    reference.assert_close(compiled(a, W, problem.scale, problem.zeros, problem.bias), problem)
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    above = torch.randn(5, 32)
    compiled(x, W, problem.scale, problem.zeros, problem.bias).backward(above)
    op(y, W, problem.scale, problem.zeros, problem.bias).backward(above)
    assert torch.equal(x.grad, y.grad)


def test_int8_and_float8():
    for fields in ({"A_dtype": "int8", "W_dtype": "int4"}, {"A_dtype": "float8_e4m3", "W_dtype": "float8_e4m3"}):
        layer, problem = layer_and_problem(with_zeros=False, **fields)
        reference.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(problem.A), problem)


# -- what is wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [(torch.zeros(3, 63), "K = 64"), (torch.zeros(3, 64, dtype=torch.float16), "float16"), (torch.zeros(()), "K = 64")],
    ids=["shape", "dtype", "scalar"],
)
def test_wrong_activations(given, message):
    layer, problem = layer_and_problem()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=message):  # torch wraps what a fake kernel raises
        compiled(given)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ArgumentError, match=message):
        layer(mode.from_tensor(given))
    reference.assert_close(layer(problem.A), problem)


def fake_calls():
    layer, problem = layer_and_problem()
    a, w, s, z, b = problem.A, layer.qweight, layer.scales, layer.zeros, layer.bias
    out = torch.zeros(3, 32)
    return [
        ((a, w[:, :31], s, z, b, out), r"W has shape \(32, 31\); expected \(32, 32\)"),
        ((a, w.float(), s, z, b, out), "W has dtype torch.float32"),
        ((a, w, s[:, :2], z, b, out), r"scale has shape \(32, 2\)"),
        ((a, w, s.half(), z, b, out), "scale has dtype torch.float16"),
        ((a, w, s, z[:2], b, out), r"zeros has shape \(2, 16\)"),
        ((a, w, s, z, b[:31], out), r"bias has shape \(31,\)"),
        ((a, w, None, z, b, out), "scale is missing"),
        ((a, w, s, z, b, out[:, :31]), r"output has shape \(3, 31\); expected \(3, 32\)"),
        ((a, w, s, z, b, out.half()), "output has dtype torch.float16"),
        ((a[:, :63], w, s, z, b, out), "K = 64"),
    ]


@pytest.mark.parametrize(("operands", "message"), [pytest.param(*row, id=row[1]) for row in fake_calls()])
def test_what_fake_kernels_refuse(operands, message):
    op = layers.build(config()).bitblas_matmul
    with FakeTensorMode() as mode:
        fake = [None if t is None else mode.from_tensor(t) for t in operands]
        with pytest.raises(ArgumentError, match=message):
            torch.ops.bitblas.matmul_into(*fake, op._spec)
        if "output" not in message:
            with pytest.raises(ArgumentError, match=message):
                torch.ops.bitblas.matmul(*fake[:-1], op._spec)


def test_a_number_of_rows_is_known_to_fake_kernels():
    layer = layers.build(config(M=3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(torch.zeros(3, 64))).shape == (3, 32)
        with pytest.raises(ArgumentError, match="M = 3"):
            layer(mode.from_tensor(torch.zeros(4, 64)))


def test_fake_tensors():
    layer, _ = layer_and_problem()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = layer(mode.from_tensor(torch.zeros(2, 3, 64)))
    assert out.shape == (2, 3, 32)
    assert out.dtype is torch.float32
    with FakeTensorMode():
        empty = layers.build(config(A_dtype="float16"))
        assert empty(torch.empty(5, 64, dtype=torch.float16)).shape == (5, 32)


def _fake(layer, a):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(a))


@pytest.mark.parametrize(
    "first",
    [
        _fake,
        lambda layer, a: torch.func.grad(lambda x: layer(x).sum())(a),
        lambda layer, a: torch.func.jvp(layer, (a,), (a,)),
        lambda layer, a: torch.vmap(layer)(torch.stack([a, a])),
        lambda layer, a: torch.export.export(layer, (a,)),
        lambda layer, a: torch.compile(layer, fullgraph=True, backend="aot_eager")(a),
    ],
    ids=["fake", "grad", "jvp", "vmap", "export", "compile"],
)
def test_nothing_of_a_transformed_first_call_is_kept(first):
    layer, problem = layer_and_problem()
    with contextlib.suppress(RuntimeError, ArgumentError):  # some cannot be done; what follows must be right
        first(layer, problem.A)
    for _ in range(2):
        reference.assert_close(layer(problem.A), problem)


def calls():
    """A layer's call, and its operator's with the same operands."""
    layer, problem = layer_and_problem()
    operands = (layer.qweight, layer.scales, layer.zeros, layer.bias)
    layer(problem.A)  # bound
    return {"layer": layer, "operator": lambda a: layer.bitblas_matmul(a, *operands)}, problem


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["layer", "operator"])
def test_a_traced_call_is_no_constant(which):
    found, problem = calls()
    call = found[which]
    traced = torch.jit.trace(call, (problem.A,))
    other = problem.A.roll(1, 0) * 2
    assert torch.equal(traced(other), call(other))
    assert not torch.equal(traced(other), call(problem.A))
    if which == "layer":
        kept = io.BytesIO()
        torch.jit.save(traced, kept)
        kept.seek(0)
        assert torch.equal(torch.jit.load(kept)(other), call(other))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("which", ["layer", "operator"])
def test_transforms_of_torch_func(which):
    found, problem = calls()
    call = found[which]
    stacked = torch.stack([problem.A, 2 * problem.A])
    out = torch.vmap(call)(stacked)
    for one, a in zip(out, stacked, strict=True):
        assert torch.equal(one, call(a))
    reference.assert_close(torch.func.functionalize(call)(problem.A), problem)
    with pytest.raises(ArgumentError, match=r"^torch\.func differentiates no matmul of bitblas"):
        torch.func.grad(lambda a: call(a).sum())(problem.A)
    with pytest.raises(ArgumentError, match=r"^torch\.func differentiates no matmul of bitblas"):
        torch.vmap(torch.func.grad(lambda a: call(a).sum()))(stacked)
    with pytest.raises(ArgumentError, match=r"^an operand has a tangent .* a matmul has none: use backward-mode$"):
        torch.func.jvp(call, (problem.A,), (problem.A,))
    reference.assert_close(call(problem.A), problem)


def test_vmap_fills_no_output():
    layer, problem = layer_and_problem()
    operands = (layer.qweight, layer.scales, layer.zeros, layer.bias)
    out = torch.empty(3, 32)
    with pytest.raises(ArgumentError, match=r"^output was given inside of a transform of torch\.func"):
        torch.vmap(lambda a: layer.bitblas_matmul(a, *operands, output=out))(torch.stack([problem.A] * 2))
    plain = layer(problem.A)
    found = torch.vmap(lambda s: layer.bitblas_matmul(problem.A, *operands, output=out) * s)(torch.ones(2))
    assert torch.equal(found[1], plain)  # nothing of the call takes part
    slope = torch.func.grad(lambda s: (layer.bitblas_matmul(problem.A, *operands, output=out) * s).sum())
    torch.testing.assert_close(slope(torch.tensor(1.0)), plain.sum())


def test_wrong_operands_of_a_call_that_is_seen():
    layer, problem = layer_and_problem()
    op, (W, scale, zeros, bias) = layer.bitblas_matmul, (layer.qweight, layer.scales, layer.zeros, layer.bias)
    for operands, message in (((3, scale, zeros, bias), "W is a int"), ((W, scale, zeros, "b"), "bias is a str")):
        with pytest.raises(ArgumentError, match=f"^{message}; it must be a torch.Tensor$"):
            torch.vmap(lambda a, operands=operands: op(a, *operands))(problem.A[None])


def test_tensors_with_data_in_a_fake_mode():
    layer, problem = layer_and_problem()
    operands = (layer.qweight, layer.scales, layer.zeros, layer.bias)
    layer(problem.A)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for out in (layer(problem.A), layer.bitblas_matmul(problem.A, *operands)):
            assert type(out) is FakeTensor
            assert out.shape == (3, 32)
    reference.assert_close(layer(problem.A), problem)


def test_a_mode_sees_the_operator():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, problem = layer_and_problem()
    for _ in range(2):
        with Watch():
            reference.assert_close(layer(problem.A).clone(), problem)
    assert seen.count("bitblas.matmul.default") == 2


# -- torch's own checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"dynamic_quantization": "row"}, {"with_bias": False, "A_dtype": "bfloat16"}], ids=str
)
def test_torchs_checks_of_the_operators(fields):
    layer, problem = layer_and_problem(**fields)
    op, a, bias = layer.bitblas_matmul, problem.A, layer.bias
    weight = (layer.qweight, layer.scales, layer.zeros)
    bias = bias if bias is None else bias.clone().requires_grad_()
    out = torch.randn(3, 32).to(getattr(torch, layer.out_dtype))
    passed = [
        torch.library.opcheck(torch.ops.bitblas.matmul, (a.clone().requires_grad_(), *weight, bias, op._spec)),
        torch.library.opcheck(torch.ops.bitblas.matmul, (a, *weight, layer.bias, op._spec)),
        torch.library.opcheck(torch.ops.bitblas.matmul_into, (a, *weight, layer.bias, out.clone(), op._spec)),
        torch.library.opcheck(torch.ops.bitblas.matmul_gradient, (out, *weight, op._spec)),
    ]
    assert all(set(checks.values()) == {"SUCCESS"} for checks in passed)


# -- export ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strict", "bias", "act_order"),
    [(False, False, False), (False, False, True), (False, True, True), (True, True, True)],
)
def test_export(strict, bias, act_order):
    layer, problem = layer_and_problem(with_bias=bias)
    if act_order:
        layer.perm = torch.randperm(64, dtype=torch.int32)
    program = torch.export.export(layer, (problem.A,), strict=strict)
    assert torch.equal(program.module()(problem.A), layer(problem.A))
    assert operators(program.graph_module) == ["bitblas.matmul.default"]


def test_export_of_a_model_with_any_number_of_rows():
    model = block()
    rows = torch.export.Dim("rows", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 64),), dynamic_shapes=({0: rows},))
        for m in (1, 3, 40):
            x = torch.randn(m, 64)
            assert torch.equal(program.module()(x), model(x))


_SERVE = """
import json, sys, torch
import bitblas.ops
program = torch.export.load({program!r})
x = torch.load({inputs!r})
out = program.module()(x)
print(json.dumps({{"out": out.tolist(), "tvm": "tvm" in sys.modules}}))
"""


@pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_exported_program_in_another_process(tmp_path, store, warm):
    model, x = block(N=48 if warm else 80), torch.randn(4, 64)  # no other test has built these
    expected = model(x) if warm else None  # which fills the store
    rows = torch.export.Dim("rows", min=1, max=1024)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: rows},)), tmp_path / "model.pt2")
    torch.save(x[:3], tmp_path / "x.pt")
    if not warm:
        assert not list(Path(store).glob("artifacts/*"))
    script = _SERVE.format(program=str(tmp_path / "model.pt2"), inputs=str(tmp_path / "x.pt"))
    found, _ = finish(start(script, BITBLAS_CACHE_DIR=store), timeout=400)
    assert found["tvm"] is not warm
    expected = model(x) if expected is None else expected
    assert torch.equal(torch.tensor(found["out"]), model(x[:3]))
    torch.testing.assert_close(torch.tensor(found["out"]), expected[:3])


@pytest.mark.parametrize("loaded", [False, True])
def test_export_of_a_layer_with_little_but_an_order(loaded):
    layer, problem = layer_and_problem(with_bias=False, with_zeros=False)
    layer.perm = torch.randperm(64, dtype=torch.int32)
    if loaded:
        other = layers.build(config(with_bias=False, with_zeros=False, W_dtype="uint4"))
        other.load_state_dict(layer.state_dict())
        layer = other
    program = torch.export.export(layer, (problem.A,))
    assert torch.equal(program.module()(problem.A), layer(problem.A))


def test_a_graph_for_another_layout_is_refused():
    layer, problem = layer_and_problem()
    spec = json.loads(layer.bitblas_matmul._spec)
    spec["layout"] = "mma16"
    with pytest.raises(ArgumentError, match=r"'mma16'.*export the program again"):
        torch.ops.bitblas.matmul(
            problem.A, layer.qweight, layer.scales, layer.zeros, layer.bias, json.dumps(spec, sort_keys=True)
        )


def test_a_copy_of_a_compiled_layer():
    layer, problem = layer_and_problem()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(problem.A)
    reference.assert_close(copy.deepcopy(layer)(problem.A), problem)
    assert isinstance(layer, bitblas.Linear)
