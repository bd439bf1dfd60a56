"""FlashAtten called wrongly, by torch's transforms and graphs, and from other threads and processes."""

import copy
import functools
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import attention_reference as reference
from bitblas import ArgumentError, BitBLASError, ConfigError, FlashAtten, FlashAttenConfig, UnsupportedError
from scripts import report

FLOATS = dict.fromkeys(("Q_dtype", "K_dtype", "V_dtype", "Out_dtype"), "float32")
#: Sizes of the right call.
BATCH, HEADS, HEADS_KV, QUERIES, KEYS, DIM, DIM_V = 2, 4, 2, 3, 5, 16, 8
OPEN = FlashAttenConfig(dim=DIM, dim_v=DIM_V, seq_len_kv=None, **FLOATS)
CONFIGS = {
    "open": OPEN,
    "given": FlashAttenConfig(BATCH, HEADS, QUERIES, DIM, dim_v=DIM_V, heads_kv=HEADS_KV, seq_len_kv=KEYS, **FLOATS),
    "ntn": FlashAttenConfig(seq_len=QUERIES, dim=DIM, dim_v=DIM_V, seq_len_kv=None, layout="ntn"),
}


@functools.cache
def attention(name):
    return FlashAtten(CONFIGS[name], target="llvm")


def draw(name="open", **options):
    return reference.draw(CONFIGS[name], BATCH, HEADS, QUERIES, HEADS_KV, KEYS, **options)


def operands(name="open"):
    problem = draw(name)
    return {"q": problem.q, "k": problem.k, "v": problem.v}


def floats(*shape):
    return torch.zeros(shape)


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


# -- wrong calls: (operator, what changes in a right call, match) ----------------------------------------------------------

Q, K, V, OUT = (2, 3, 4, 16), (2, 5, 2, 16), (2, 5, 2, 8), (2, 3, 4, 8)
KINDS = [
    (lambda: None, r" is a NoneType; it must be a torch\.Tensor$"),
    (lambda: np.zeros(Q, np.float32), r" is a ndarray; it must be a torch\.Tensor$"),
    (lambda: [[0.0]], r" is a list; it must be a torch\.Tensor$"),
    (lambda: 1.0, r" is a float; it must be a torch\.Tensor$"),
    (lambda: True, r" is a bool; it must be a torch\.Tensor$"),
    (lambda: floats(*Q).double(), r" has dtype torch\.float64; this operator (takes|gives) torch\.float32$"),
    (lambda: floats(*Q).to(torch.complex64), r" has dtype torch\.complex64; "),
    (lambda: half(*Q), r" has dtype torch\.float16; "),
    (lambda: floats(*Q).bfloat16(), r" has dtype torch\.bfloat16; "),
    (lambda: floats(*Q).to(torch.int8), r" has dtype torch\.int8; "),
    (lambda: torch.quantize_per_tensor(floats(*Q), 1.0, 0, torch.qint8), r" has dtype torch\.qint8; "),
    (lambda: floats(*Q).to("meta"), r" is on device meta; this operator runs on cpu$"),
    (lambda: floats(*Q).to_sparse(), r" has layout torch\.sparse_coo; it must be a dense tensor$"),
    (lambda: floats(*Q).to_mkldnn(), r" has layout torch\._mkldnn; it must be a dense tensor$"),
    (lambda: floats(3, 4).to_sparse_csr(), r" has layout torch\.sparse_csr; it must be a dense tensor$"),
    (lambda: torch.nested.nested_tensor([floats(3, 4, 16)] * 2), r" is a nested tensor; it must be a dense tensor$"),
    (
        lambda: torch.nested.nested_tensor([floats(3, 4, 16)] * 2, layout=torch.jagged),
        r" has layout torch\.jagged; it must be a dense tensor$",
    ),
    (lambda: torch._efficientzerotensor(Q), r" is a zero tensor without memory; clone\(\) gives it some$"),
    (lambda: freed(Q), r" has no memory: its storage was freed$"),
    (lambda: floats(3, 4, 16), r" has shape \(3, 4, 16\); expected "),
    (lambda: floats(16), r" has shape \(16,\); expected "),
    (lambda: floats(), r" has shape \(\); expected "),
    (lambda: floats(1, *Q), r" has shape \(1, 2, 3, 4, 16\); expected "),
]


def freed(shape):
    tensor = floats(*shape)
    tensor.untyped_storage().resize_(0)
    return tensor


SHAPES = [
    (
        "q",
        floats(2, 3, 4, 15),
        r"q has shape \(2, 3, 4, 15\); expected \(2, 3, 4, 16\), \(batch, seq_len, heads, dim\)$",
    ),
    ("q", floats(2, 3, 4, 0), r"q has shape \(2, 3, 4, 0\); expected \(2, 3, 4, 16\)"),
    ("q", floats(1, 3, 4, 16), r"k has shape \(2, 5, 2, 16\); expected \(1, 5, 2, 16\)"),
    ("q", floats(2, 3, 5, 16), r"k has 2 heads, which do not divide the 5 heads of q$"),
    ("q", floats(2, 3, 1, 16), r"k has 2 heads, which do not divide the 1 heads of q$"),
    (
        "k",
        floats(2, 5, 2, 8),
        r"k has shape \(2, 5, 2, 8\); expected \(2, 5, 2, 16\), \(batch, seq_len_kv, heads_kv, dim\), or ",
    ),
    ("k", floats(1, 5, 2, 16), r"k has shape \(1, 5, 2, 16\); expected \(2, 5, 2, 16\)"),
    (
        "k",
        floats(2, 6, 2, 16),
        r"v has shape \(2, 5, 2, 8\); expected \(2, 6, 2, 8\), \(batch, seq_len_kv, heads_kv, dim_v\)$",
    ),
    ("k", floats(2, 5, 1, 16), r"v has shape \(2, 5, 2, 8\); expected \(2, 5, 1, 8\)"),
    ("k", floats(2, 5, 0, 16), r"v has shape \(2, 5, 2, 8\); expected \(2, 5, 0, 8\)"),
    ("v", floats(2, 5, 2, 16), r"v has shape \(2, 5, 2, 16\); expected \(2, 5, 2, 8\)"),
    ("v", floats(2, 4, 2, 8), r"v has shape \(2, 4, 2, 8\); expected \(2, 5, 2, 8\)"),
    ("v", floats(2, 5, 4, 8), r"v has shape \(2, 5, 4, 8\); expected \(2, 5, 2, 8\)"),
    ("v", floats(3, 5, 2, 8), r"v has shape \(3, 5, 2, 8\); expected \(2, 5, 2, 8\)"),
]
OUTPUTS = [
    (lambda: floats(2, 3, 4, 16), r"^output has shape \(2, 3, 4, 16\); expected \(2, 3, 4, 8\)$"),
    (lambda: floats(3, 2, 4, 8), r"^output has shape \(3, 2, 4, 8\); expected \(2, 3, 4, 8\)$"),
    (lambda: floats(192), r"^output has shape \(192,\); expected "),
    (lambda: floats(2, 4, 3, 8).transpose(1, 2), r"^output has strides \(96, 8, 24, 1\); it must be contiguous$"),
    (lambda: floats(2, 3, 4, 16)[..., ::2], r"^output has strides \(192, 64, 16, 2\); it must be contiguous$"),
    (lambda: floats(1, 1, 1, 8).expand(*OUT), r"^output has strides \(0, 0, 0, 1\); it must be contiguous$"),
    (lambda: floats(*OUT).requires_grad_(), r"^output requires a gradient; give a tensor that does not, or none$"),
    (lambda: torch._neg_view(floats(*OUT)), r"^output is a negated view; it must be a plain tensor$"),
]


@pytest.mark.parametrize("argument", ["q", "k", "v", "output"])
@pytest.mark.parametrize(("make", "match"), KINDS, ids=[match[:40] for _, match in KINDS])
def test_tensors_of_a_wrong_kind(make, match, argument):
    if argument == "output" and "NoneType" in match:
        return
    match = match.replace(r"this operator (takes|gives)", "this operator gives") if argument == "output" else match
    with pytest.raises(ArgumentError, match=f"^{argument}{match}"):
        attention("open")(**{**operands(), argument: make()})


@pytest.mark.parametrize(("argument", "tensor", "match"), SHAPES, ids=[row[2][:50] for row in SHAPES])
def test_wrong_shapes(argument, tensor, match):
    with pytest.raises(ArgumentError, match=f"^{match}"):
        attention("open")(**{**operands(), argument: tensor})


@pytest.mark.parametrize(("make", "match"), OUTPUTS, ids=[match[:40] for _, match in OUTPUTS])
def test_wrong_outputs(make, match):
    given = operands()
    with pytest.raises(ArgumentError, match=match):
        attention("open")(**given, output=make())


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_an_output_that_overlaps(argument):
    memory = torch.zeros(4096)
    given, size = operands(), 2 * 3 * 4 * 8
    tensor = given[argument]
    given[argument] = memory[1000:][: tensor.numel()].view(tensor.shape).copy_(tensor)
    expected = attention("open")(**given)
    for first in (1000 - size + 1, 1000, 1000 + tensor.numel() - 1):
        with pytest.raises(ArgumentError, match=f"^output shares memory with {argument}; give a tensor of its own"):
            attention("open")(**given, output=memory[first:][:size].view(OUT))
    for first in (1000 - size, 1000 + tensor.numel()):
        assert torch.equal(attention("open")(**given, output=memory[first:][:size].view(OUT)), expected)


def test_an_output_between_the_rows_of_an_input():
    memory = torch.zeros(2, 100, 4, 16)
    given = {**operands(), "q": memory[:, :3]}
    with pytest.raises(ArgumentError, match=r"^output shares memory with q"):
        attention("open")(**given, output=memory.view(-1)[20 * 64 :][:192].view(OUT))


@pytest.mark.parametrize(
    ("argument", "tensor", "match"),
    [
        ("q", floats(3, 3, 4, 16), r"q has shape \(3, 3, 4, 16\); expected \(2, 3, 4, 16\)"),
        ("q", floats(2, 4, 4, 16), r"q has shape \(2, 4, 4, 16\); expected \(2, 3, 4, 16\)"),
        ("q", floats(2, 3, 2, 16), r"q has shape \(2, 3, 2, 16\); expected \(2, 3, 4, 16\)"),
        ("q", floats(0, 3, 4, 16), r"q has shape \(0, 3, 4, 16\); expected \(2, 3, 4, 16\)"),
        ("k", floats(2, 6, 2, 16), r"k has shape \(2, 6, 2, 16\); expected \(2, 5, 2, 16\)"),
        ("k", floats(2, 5, 4, 16), r"k has shape \(2, 5, 4, 16\); expected \(2, 5, 2, 16\)"),
    ],
)
def test_sizes_that_a_config_gives(argument, tensor, match):
    with pytest.raises(ArgumentError, match=f"^{match}"):
        attention("given")(**{**operands("given"), argument: tensor})


def test_ntn_wants_other_keys():
    given = operands("ntn")
    with pytest.raises(
        ArgumentError, match=r"^k has shape \(2, 5, 2, 16\); expected \(2, 16, 2, 16\), .* for the layout ntn$"
    ):
        attention("ntn")(**{**given, "k": half(*K)})
    with pytest.raises(ArgumentError, match=r"^v has shape \(2, 5, 2, 8\); expected \(2, 6, 2, 8\)"):
        attention("ntn")(**{**given, "k": half(2, 16, 2, 6)})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_calls_are_right_but_for_the_change(name):
    reference.assert_close(attention(name)(**operands(name)), draw(name))


def test_missing_and_superfluous_arguments():
    given = list(operands().values())
    for wrong in ((), given[:1], given[:2], [*given, None, None]):
        with pytest.raises(TypeError):
            attention("open")(*wrong)
    with pytest.raises(TypeError, match="mask"):
        attention("open")(*given, mask=None)


def test_no_kernel_has_run_where_a_call_is_wrong():
    out = torch.full(OUT, 7.0)
    with pytest.raises(ArgumentError):
        attention("open")(**{**operands(), "v": floats(2, 4, 2, 8)}, output=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"config": None}, ConfigError, r"^config is None; it must be a FlashAttenConfig$"),
        ({"config": {"dim": 64}}, ConfigError, r"^config is \{'dim': 64\}; it must be a FlashAttenConfig$"),
        ({"backend": "cutlass"}, ConfigError, r"^backend is 'cutlass'; allowed: tl, tir$"),
        ({"target": "quantum"}, ConfigError, r"^target is 'quantum'; allowed: "),
        ({"target": "cuda -arch=sm_60"}, UnsupportedError, r"compute capability 7\.5 and later are supported"),
    ],
)
def test_wrong_operators(arguments, error, match):
    with pytest.raises(error, match=match) as raised:
        FlashAtten(**{"config": OPEN, **arguments})
    assert isinstance(raised.value, BitBLASError)


# -- gradients and transforms ----------------------------------------------------------------------------------------------

NO_GRADIENT = r"^FlashAtten has no gradient: it is for inference"


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_a_gradient_is_refused_where_it_is_asked_for(argument):
    given = operands()
    given[argument].requires_grad_()
    out = attention("open")(**given)
    assert out.requires_grad
    reference.assert_close(out.detach(), draw())
    with pytest.raises(ArgumentError, match=NO_GRADIENT):
        out.sum().backward()
    with torch.no_grad():
        assert not attention("open")(**given).requires_grad
    with pytest.raises(ArgumentError, match=r"^output was given, and q, k or v requires a gradient"):
        attention("open")(**given, output=floats(*OUT))
    with torch.no_grad():
        reference.assert_close(attention("open")(**given, output=floats(*OUT)), draw())


def test_torch_func_finds_no_derivative():
    q, k, v = operands().values()
    run = attention("open")
    with pytest.raises(ArgumentError, match=NO_GRADIENT):
        torch.func.grad(lambda x: run(x, k, v).sum())(q)
    with pytest.raises(ArgumentError, match=NO_GRADIENT):
        torch.vmap(torch.func.grad(lambda x: run(x, k, v).sum()))(torch.stack([q, q]))
    with pytest.raises(ArgumentError, match=r"^an operand has a tangent .* FlashAtten has no derivatives$"):
        torch.func.jvp(lambda x: run(x, k, v), (q,), (q,))
    with forward_ad.dual_level():
        with pytest.raises(ArgumentError, match=r"^an operand has a tangent"):
            run(q, k, forward_ad.make_dual(v, v))
        reference.assert_close(run(q, k, v), draw())
    reference.assert_close(run(q, k, v), draw())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_functionalize():
    problems = [draw(seed=seed) for seed in range(3)]
    run = attention("open")
    stacked = [torch.stack([getattr(problem, name) for problem in problems]) for name in "qkv"]
    for out, problem in zip(torch.vmap(run)(*stacked), problems, strict=True):
        reference.assert_close(out, problem)
    out = torch.func.functionalize(run)(*operands().values())
    reference.assert_close(out, draw())


def test_vmap_fills_no_output():
    run, given = attention("open"), operands()
    with pytest.raises(ArgumentError, match=r"^output was given inside of a transform of torch\.func"):
        torch.vmap(lambda q: run(q, given["k"], given["v"], output=floats(*OUT)))(torch.stack([given["q"]] * 2))
    found = torch.vmap(lambda s: run(**given, output=floats(*OUT)) * s)(torch.ones(2))
    assert torch.equal(found[1], run(**given))  # nothing of the call takes part


@pytest.mark.filterwarnings("ignore")
def test_a_traced_call_is_no_constant():
    run, given = attention("open"), operands()
    traced = torch.jit.trace(lambda q: run(q, given["k"], given["v"]), (given["q"],))
    other = draw(seed=1).q
    assert torch.equal(traced(other), run(other, given["k"], given["v"]))


def test_more_keys_than_kernels_number():
    config = FlashAttenConfig(dim=1, Q_dtype="float32", K_dtype="float32", V_dtype="float32", Out_dtype="float32")
    run = FlashAtten(config, target="llvm", from_database=True)  # nothing is built
    many = torch.ones(1, 1, 1, 1).expand(1, 2**31, 1, 1)
    with pytest.raises(ArgumentError, match=r"^k has 2147483648 keys; they must be at most 2147482624$"):
        run(torch.ones(1, 1, 1, 1), many, many)
    assert run.origin == "not built"


def test_inference_mode():
    with torch.inference_mode():
        given = operands()
        out = attention("open")(**given)
        assert out.is_inference()
        reference.assert_close(attention("open")(**given, output=torch.empty_like(out)), draw())
    reference.assert_close(attention("open")(**given), draw())


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        out = attention("open")(**operands())
    reference.assert_close(out, draw())


def test_tensors_of_other_classes():
    class Mine(torch.Tensor):
        pass

    given = {name: tensor.as_subclass(Mine) for name, tensor in operands().items()}
    out = attention("open")(**given)
    assert type(out) is Mine
    reference.assert_close(out.as_subclass(torch.Tensor), draw())
    with pytest.raises(ArgumentError, match=r"^k has shape"):
        attention("open")(**{**given, "k": given["k"][..., :8]})
    reference.assert_close(attention("open")(*(torch.nn.Parameter(t, False) for t in operands().values())), draw())


# -- graphs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend of torch.compile that runs the graph as it is, and keeps graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(module)
        return module.forward


def operators(module):
    return [str(node.target) for node in module.graph.nodes if "bitblas" in str(node.target)]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["open", "ntn"])
def test_compile(backend, name):
    compiled = torch.compile(attention(name), fullgraph=True, backend=backend)
    for seed in range(2):
        problem = draw(name, seed=seed)
        reference.assert_close(compiled(problem.q, problem.k, problem.v), problem)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_torch_around_it(backend):
    op = attention("open")

    def run(x, k, v):
        q = (x * 2).view(BATCH, HEADS, QUERIES, DIM).transpose(1, 2)
        return op(q, k, v).flatten(2).relu()

    x = torch.randn(BATCH, HEADS * QUERIES * DIM)
    _, k, v = operands().values()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend=backend)(x, k, v), run(x, k, v))


@pytest.mark.usefixtures("fresh")
def test_compile_for_any_length():
    counter = Counter()
    compiled = torch.compile(attention("open"), fullgraph=True, backend=counter, dynamic=True)
    for seq_len, keys in ((7, 9), (2, 30), (40, 11), (3, 3)):
        problem = reference.draw(OPEN, BATCH, HEADS, seq_len, HEADS_KV, keys)
        reference.assert_close(compiled(problem.q, problem.k, problem.v), problem)
    assert len(counter.graphs) <= 2
    assert all(operators(graph) == ["bitblas.flash_atten"] for graph in counter.graphs)
    problem = reference.draw(OPEN, BATCH, HEADS, 5, HEADS_KV, 6)
    for name, length in (("q", 5), ("k", 6), ("v", 6)):
        assert getattr(problem, name).shape[1] == length
        torch._dynamo.mark_dynamic(getattr(problem, name), 1)
    torch._dynamo.reset()
    compiled = torch.compile(attention("open"), fullgraph=True, backend="aot_eager")
    reference.assert_close(compiled(problem.q, problem.k, problem.v), problem)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_with_an_output(backend):
    op = attention("open")

    @torch.compile(fullgraph=True, backend=backend)
    def run(q, k, v, out):
        op(q, k, v, output=out)
        return out * 2

    out = torch.full(OUT, float("nan"))
    doubled = run(*operands().values(), out)
    reference.assert_close(out, draw())
    assert torch.equal(doubled, 2 * out)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_and_gradients(backend):
    """A compiler that traces the backward pass ahead meets no error before that runs."""
    compiled = torch.compile(attention("open"), fullgraph=True, backend=backend)
    given = operands()
    given["q"].requires_grad_()
    out = compiled(**given)
    reference.assert_close(out.detach(), draw())
    with pytest.raises(ArgumentError, match=NO_GRADIENT):
        out.sum().backward()


def test_fake_tensors():
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in operands().items()}
        out = attention("open")(**fake)
        assert type(out) is FakeTensor
        assert (out.shape, out.dtype, out.device.type) == (torch.Size(OUT), torch.float32, "cpu")
        assert attention("open")(**fake, output=out) is out
        for argument, tensor, match in SHAPES:
            with pytest.raises(ArgumentError, match=f"^{match}"):
                attention("open")(**{**fake, argument: mode.from_tensor(tensor)})
        for make, match in OUTPUTS[:6]:
            with pytest.raises(ArgumentError, match=match):
                attention("open")(**fake, output=mode.from_tensor(make()))
        with pytest.raises(ArgumentError, match=r"^k has dtype torch\.float16"):
            attention("open")(**{**fake, "k": fake["k"].half()})
    with pytest.raises(ArgumentError, match=r"^output is a FakeTensor; it must have data$"):
        attention("open")(**operands(), output=out)


@pytest.mark.parametrize("name", CONFIGS)
def test_torchs_checks_of_the_operators(name):
    given, spec = [*operands(name).values()], attention(name)._spec
    out = torch.empty(OUT, dtype=getattr(torch, CONFIGS[name].Out_dtype))
    passed = [
        torch.library.opcheck(torch.ops.bitblas.flash_atten, (*given, spec)),
        torch.library.opcheck(torch.ops.bitblas.flash_atten_into, (*given, out, spec)),
    ]
    assert all(set(checks.values()) == {"SUCCESS"} for checks in passed)


def test_a_profiler_sees_one_operator():
    given = operands()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention("open")(**given)
    names = [event.name for event in profile.events()]
    assert names.count("bitblas::flash_atten") == 1


class Attention(torch.nn.Module):
    """What is exported."""

    def __init__(self, name):
        super().__init__()
        self.attention = attention(name)

    def forward(self, q, k, v):
        return self.attention(q, k, v) + 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    length, keys = (torch.export.Dim(name, min=1, max=4096) for name in ("length", "keys"))
    shapes = {"q": {1: length}, "k": {1: keys}, "v": {1: keys}}
    program = torch.export.export(Attention("open"), tuple(operands().values()), dynamic_shapes=shapes, strict=strict)
    assert operators(program.graph_module) == ["bitblas.flash_atten.default"]
    for seq_len, num_keys in ((1, 1), (20, 3), (5, 77)):
        problem = reference.draw(OPEN, BATCH, HEADS, seq_len, HEADS_KV, num_keys)
        out = program.module()(problem.q, problem.k, problem.v)
        assert torch.equal(out, attention("open")(problem.q, problem.k, problem.v) + 1)


_SERVE = """
import json, sys, torch
import bitblas
program = torch.export.load({program!r})
out = program.module()(*torch.load({inputs!r}))
print(json.dumps({{"out": out.tolist(), "tvm": "tvm" in sys.modules}}))
"""


def test_an_exported_program_in_another_process(tmp_path):
    given = tuple(operands("ntn").values())
    expected = Attention("ntn")(*given)  # which has filled the store
    torch.export.save(torch.export.export(Attention("ntn"), given), tmp_path / "model.pt2")
    torch.save(given, tmp_path / "x.pt")
    script = _SERVE.format(program=str(tmp_path / "model.pt2"), inputs=str(tmp_path / "x.pt"))
    found, _ = report(script)
    assert torch.equal(torch.tensor(found["out"], dtype=torch.float16), expected)
    assert found["tvm"] is False


# -- copies, threads and processes -----------------------------------------------------------------------------------------


def test_copies():
    op = attention("open")
    assert copy.deepcopy(op) is op
    again = pickle.loads(pickle.dumps(op))
    assert (again.config, again.plan, again.target, again.origin) == (op.config, op.plan, op.target, "loaded")
    reference.assert_close(again(**operands()), draw())
    lazy = pickle.loads(pickle.dumps(FlashAtten(OPEN, name="lazy", target="llvm", from_database=True)))
    assert (lazy.origin, lazy.name) == ("not built", "lazy")
    reference.assert_close(lazy(**operands()), draw())
    assert lazy.origin == "loaded"


def test_what_an_operator_tells():
    op = attention("open")
    assert repr(op).startswith("FlashAtten(FlashAttenConfig(batch=None")
    assert "attention_0" in op.get_source()
    assert torch.equal(op.torch_func(*operands().values()), op(**operands()))
    assert "softmax" not in str(op.target)
    assert {m for m, _ in op.plan.buckets} == set(OPEN.buckets)


def test_many_threads_call_one_operator():
    problems = [draw(seed=seed) for seed in range(8)]
    lazy, failed = FlashAtten(OPEN, target="llvm", from_database=True), []

    def work(problem):
        try:
            for _ in range(20):
                reference.assert_close(lazy(problem.q, problem.k, problem.v), problem)
        except AssertionError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []


FORK = """
import json, os, signal, torch
torch.set_num_threads(2)
import bitblas
op = bitblas.FlashAtten(bitblas.FlashAttenConfig(seq_len=3, dim=16, dim_v=8, seq_len_kv=None, layout="ntn"), target="llvm")
q, k, v = torch.randn(20, 3, 2, 16).half(), torch.randn(20, 16, 2, 300).half(), torch.randn(20, 300, 2, 8).half()
expected = op(q, k, v)
def child():
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(op(q, k, v), expected) else 3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps([child(), child(), 0 if torch.equal(op(q, k, v), expected) else 3, op.origin]))
"""


def test_forks():
    assert attention("ntn").artifact is not None
    assert report(FORK)[0] == [0, 0, 0, "loaded"]


def test_the_text_of_a_graph_makes_the_operator_again():
    spec = json.loads(attention("given")._spec)
    assert FlashAttenConfig(**spec["config"]) == CONFIGS["given"]
    assert FlashAttenConfig(**json.loads(attention("open")._spec)["config"]) == OPEN
