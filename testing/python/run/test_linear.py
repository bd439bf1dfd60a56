"""Linear against the float64 reference: formats, shapes, buffers that are replaced, threads and forks."""

import itertools
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import bitblas
import layers
import reference
from bitblas import ArgumentError
from bitblas.formats import FORMATS
from layers import config, layer_and_problem, ran

A_DTYPES = ("float16", "bfloat16", "float32", "int8")
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
MODES = ("quantized", "original", "rescale")
#: out_features, in_features, group: of the lane layout, and of none.
SHAPES = [(32, 64, 16), (5, 8, 4), (48, 40, -1), (17, 3, -1), (16, 32, 32), (3, 17, -1)]


def fields_of(name, a_dtype, turn):
    """A config for a format and A: shapes, bias, scaling and zero points in turn."""
    N, K, group = SHAPES[turn % len(SHAPES)]
    zeros = name in INTEGERS and turn % 3 != 2
    mode = MODES[turn % 2] if name.startswith("uint") else MODES[1 + turn % 2]
    return {
        "N": N, "K": K, "group_size": group, "A_dtype": a_dtype, "W_dtype": name, "with_bias": turn % 2 == 0,
        "out_dtype": "float32" if a_dtype == "int8" else (a_dtype, "float32")[turn % 2], "with_scaling": turn % 4 != 3,
        "with_zeros": zeros, "zeros_mode": mode,
    }  # fmt: skip


def cases():
    """Every format with every A, of which each format with one A runs always."""
    for turn, (name, a_dtype) in enumerate(itertools.product(FORMATS, A_DTYPES)):
        often = turn % len(A_DTYPES) == (turn // len(A_DTYPES)) % len(A_DTYPES)
        marks = () if often else pytest.mark.exhaustive
        yield pytest.param(fields_of(name, a_dtype, turn), id=f"{name}-{a_dtype}", marks=marks)


@pytest.mark.parametrize("fields", list(cases()))
def test_formats(fields):
    for exact in (False, True):
        layer, problem = layer_and_problem(m=5, exact=exact, **fields)
        out = ran(layer, problem)
        (reference.assert_exact if exact else reference.assert_close)(out, problem)
        assert torch.equal(ran(layer, problem), out)  # the second call takes another way
        assert torch.equal(ran(layer, replace(problem, A=problem.A[:1])), out[:1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [16, -1])
def test_zero_points(mode, group):
    layer, problem = layer_and_problem(zeros_mode=mode, group_size=group)
    reference.assert_close(ran(layer, problem), problem)
    assert (layer.zeros.dtype is torch.int8) == (mode == "quantized")


NATIVE = [
    {"W_dtype": name, "A_dtype": name, "out_dtype": name, "with_scaling": False, "with_zeros": False, "group_size": -1}
    for name in ("float16", "bfloat16", "float32")
]
INT8 = {"A_dtype": "int8", "W_dtype": "int8", "accum_dtype": "int32", "out_dtype": "int32", "with_scaling": False}


@pytest.mark.parametrize("fields", NATIVE, ids=lambda fields: fields["W_dtype"])
def test_native_dtypes_are_called_weight(fields):
    layer, problem = layer_and_problem(**fields)
    assert layer.consistent
    assert layer.source_format == {"bfloat16": "bf"}.get(fields["W_dtype"], "fp")
    assert "qweight" not in dict(layer.named_buffers())
    assert "format" not in dict(layer.named_buffers())
    assert layer.weight.dtype is getattr(torch, fields["W_dtype"])
    reference.assert_close(ran(layer, problem), problem)


def test_int8_times_int8():
    layer, problem = layer_and_problem(**INT8, with_zeros=False, group_size=-1)
    assert layer.weight.dtype is torch.int8
    assert torch.equal(layer.state_dict()["weight"], problem.weights)
    reference.assert_exact(ran(layer, problem), problem)


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
def test_float8_times_float8(name):
    layer, problem = layer_and_problem(A_dtype=name, W_dtype=name, with_zeros=False)
    assert layer.qweight.dtype is torch.int8
    reference.assert_close(ran(layer, problem), problem)


@pytest.mark.parametrize("how", ["row", "group"])
def test_activations_that_are_quantized_on_the_fly(how):
    layer, problem = layer_and_problem(dynamic_quantization=how)
    reference.assert_close(ran(layer, problem), problem)
    full = replace(problem, config=config())  # the test of the test: not quantized, the result is another
    assert not torch.allclose(full.output(), problem.output(), atol=1e-6)


# -- rows and shapes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual():
    return layer_and_problem(m=12)


def test_one_dimension(usual):
    layer, problem = usual
    out = layer(problem.A[0])
    assert out.shape == (32,)
    assert torch.equal(out, layer(problem.A[:1])[0])


def test_three_dimensions(usual):
    layer, problem = usual
    out = layer(problem.A.view(2, 3, 2, 64))
    assert out.shape == (2, 3, 2, 32)
    reference.assert_close(out.view(12, 32), problem)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(usual, shape):
    out = usual[0](torch.empty(shape))
    assert out.shape == (*shape[:-1], 32)
    assert out.dtype is torch.float32


def test_gaps_between_activations(usual):
    layer, problem = usual
    wide = torch.full((12, 130), float("nan"))
    wide[:, 1:129:2] = problem.A
    reference.assert_close(layer(wide[:, 1:129:2]), problem)
    reference.assert_close(layer(problem.A.T.contiguous().T), problem)


def test_output_is_filled_and_returned(usual):
    layer, problem = usual
    out = torch.full((12, 32), float("nan"))
    assert layer(problem.A, out) is out
    reference.assert_close(out, problem)
    assert layer(problem.A, output=out) is out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 63), "63.*K = 64"),
        (torch.zeros(()), "K = 64"),
        (torch.zeros(3, 64, dtype=torch.float16), "A has dtype torch.float16; this operator takes torch.float32"),
        (torch.zeros(3, 64, device="meta"), "A is on device meta"),
        (torch.zeros(3, 64).to_sparse(), "A has layout"),
        ([[0.0] * 64], "A is a list"),
        (None, "A is a NoneType"),
    ],
    ids=str,
)
def test_wrong_activations(usual, given, message):
    for _ in range(2):
        with pytest.raises(ArgumentError, match=message):
            usual[0](given)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(12, 31), "output has shape"),
        (torch.zeros(12, 32, dtype=torch.float16), "output has dtype"),
        (torch.zeros(32, 12).T, "contiguous"),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_wrong_outputs(usual, output, message):
    with pytest.raises(ArgumentError, match=message):
        usual[0](usual[1].A, output)


def test_a_number_of_rows():
    layer, problem = layer_and_problem(m=4, M=4)
    assert layer.opt_M == 4
    reference.assert_close(ran(layer, problem), problem)
    reference.assert_close(layer(problem.A.view(2, 2, 64)).view(4, 32), problem)
    for rows in (3, 5):
        with pytest.raises(ArgumentError, match=f"{rows} rows.*M = 4"):
            layer(torch.zeros(rows, 64))


def test_activations_are_taken_in_the_order_of_the_columns(usual):
    _, problem = usual
    layer = layers.fill(layers.build(config(), act_order=True), problem)
    reference.assert_close(ran(layer, problem), problem)  # in their own order as long as nothing else is said
    layer.perm = torch.randperm(64, dtype=torch.int32)
    moved = torch.empty_like(problem.A)
    moved[:, layer.perm.long()] = problem.A
    for _ in range(2):
        reference.assert_close(layer(moved), problem)
    assert torch.equal(layer(moved[0]), layer(moved)[0])
    with pytest.raises(ArgumentError, match="K = 64"):
        layer(torch.zeros(3, 65))
    with pytest.raises(ArgumentError, match="K = 64"):
        layer(torch.zeros(()))


# -- buffers that are replaced ---------------------------------------------------------------------------------------------

WAYS = {
    "assigned": lambda layer, name, tensor: setattr(layer, name, tensor),
    "data": lambda layer, name, tensor: setattr(getattr(layer, name), "data", tensor),
    "copied": lambda layer, name, tensor: getattr(layer, name).copy_(tensor),
    "registered": lambda layer, name, tensor: layer.register_buffer(name, tensor),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["qweight", "scales", "zeros", "bias"])
def test_a_buffer_may_be_replaced_at_any_time(usual, way, name):
    (layer, problem), (other, second) = layer_and_problem(m=12), layer_and_problem(m=12, seed=1)
    ran(layer, problem)
    ran(layer, problem)
    WAYS[way](layer, name, getattr(other, name).clone())
    theirs = {"qweight": "codes", "scales": "scale", "zeros": "zeros", "bias": "bias"}[name]
    changed = replace(problem, **{theirs: getattr(second, theirs)})
    if name == "zeros":
        changed = replace(changed, zero_values=second.zero_values)
    reference.assert_close(ran(layer, problem), changed)
    assert not torch.equal(changed.output(), problem.output())


def test_a_parameter_may_stand_in_a_buffers_place(usual):
    layer, problem = layer_and_problem(m=12)
    ran(layer, problem)
    for name in ("qweight", "scales", "bias"):
        tensor = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    for _ in range(2):
        reference.assert_close(ran(layer, problem), problem)
    layer.scales.data = layer.scales.data * 2
    doubled = replace(problem, scale=problem.scale * 2)
    for _ in range(2):
        reference.assert_close(ran(layer, problem), doubled)
    assert layer._bound is not None  # what was checked stays checked


def test_other_float_scales_are_converted_at_each_call():
    layer, problem = layer_and_problem(A_dtype="int8", group_size=-1, with_zeros=False, W_dtype="int4")
    layer.scales = layer.scales.half()
    problem = replace(problem, scale=problem.scale.half())
    for _ in range(2):
        reference.assert_close(ran(layer, problem), problem)


def test_a_wrong_buffer_is_named(usual):
    layer, problem = layer_and_problem()
    ran(layer, problem)
    layer.scales = layer.scales[:, :2]
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"scale has shape \(32, 2\); expected \(32, 4\)"):
            ran(layer, problem)
    layer.scales = None
    with pytest.raises(ArgumentError, match="scale is missing"):
        ran(layer, problem)


def test_other_data_of_a_buffer_is_looked_at():
    layer, problem = layer_and_problem()
    ran(layer, problem)
    layer.scales.data = layer.scales.data.half()
    with pytest.raises(ArgumentError, match=r"scale has dtype torch\.float16"):
        ran(layer, problem)
    layer.scales.data = problem.scale[:, :2].clone()
    with pytest.raises(ArgumentError, match=r"scale has shape \(32, 2\)"):
        ran(layer, problem)
    layer.scales.data = problem.scale
    reference.assert_close(ran(layer, problem), problem)


def test_a_buffer_that_is_not_wanted_is_noticed():
    layer, problem = layer_and_problem(with_bias=False)
    reference.assert_close(ran(layer, problem), problem)
    layer.bias = torch.ones(32)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="bias was given, but this operator was built with with_bias=False"):
            ran(layer, problem)
    layer.bias = None
    reference.assert_close(ran(layer, problem), problem)


class Counted(bitblas.Linear):
    """A layer with a parameter and a number of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.factor, self.calls = torch.nn.Parameter(torch.ones(())), 0

    def forward(self, A, output=None):
        self.calls += 1
        return super().forward(A, output)


def test_subclasses(usual):
    cfg, (_, problem) = config(), usual
    layer = Counted(64, 32, True, "float32", "uint4", "float32", "float32", 16, True, True, "quantized", list(cfg.M))
    layers.fill(layer, problem)
    for _ in range(2):
        reference.assert_close(layer(problem.A).detach(), problem)
    assert layer.calls == 2
    assert layer._bound is not None  # a parameter of its own does not slow it down
    assert repr(layer).startswith("Counted(in_features=64, out_features=32, bias=True, A_dtype=float32, W_dtype=uint4")
    assert set(layer.state_dict()) == {"qweight", "scales", "zeros", "bias", "format", "factor"}


# -- threads and forks -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_several_threads_on_one_layer(usual):
    for seed in range(20):  # the first call included
        layer, problem = layer_and_problem(seed=seed)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, layer=layer, problem=problem: ran(layer, problem), range(24)))
        reference.assert_close(found[0], problem)
        assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_uses_the_layer(usual):
    layer, problem = usual
    expected = ran(layer, problem)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(ran(layer, problem).tolist()))
    child.start()
    found = torch.tensor(queue.get(timeout=60))
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(found, expected)
    assert torch.equal(ran(layer, problem), expected)
