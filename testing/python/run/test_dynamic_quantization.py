"""Float activations that are quantized to int8 on the fly: the numbers that are documented, on every instruction set."""

import importlib.util
import itertools
import math
import pickle
from dataclasses import replace

import pytest
import torch

import bitblas
import reference
from bitblas import MatmulConfig
from bitblas.bench.workload import draw_workload
from bitblas.cache import OperatorCache
from bitblas.config import LAYOUTS
from bitblas.formats import FORMATS
from bitblas.ops import MatmulConfigWithSplitK, MatmulWithSplitK
from bitblas.target import host_features, resolve_target
from documents import ROOT, cells, rows_between

#: This CPU, and less of it: instructions for bytes, others for bytes that saturate, and none.
TARGETS = [
    name for name in ("llvm", "alderlake", "haswell", "x86-64-v2") if resolve_target(name).features <= host_features()
]
FLOATS = ("float16", "bfloat16", "float32")
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
#: N, K and group: whole words of bytes, and what is multiplied in floats: groups too small or odd, columns that fill no lane.
SHAPES = [
    (32, 128, 32),
    (48, 96, -1),
    (32, 64, 8),
    (5, 7, -1),
    (17, 33, 11),
    (64, 1056, 1056),
    (31, 50, 2),
    (32, 521, -1),
    (16, 72, 24),
]
UGLY_ROWS = (0, 1, 2, 13, 17)


def config(N=32, K=128, M=(1, 16), how="row", **fields):
    defaults = {"A_dtype": "float16", "W_dtype": "uint4", "out_dtype": "float32", "accum_dtype": "float32"}
    return MatmulConfig(M=M, N=N, K=K, dynamic_quantization=how, **{**defaults, **fields})


def weigh(op, problem):
    return op.transform_weight(problem.weights.mT if op.config.layout[1] == "n" else problem.weights)


def check(op, rows, seed=0, **options):
    """The bound and the exact case for each number of rows."""
    for exact in (False, True):
        problem = reference.draw(op.config, max(rows), seed=seed, exact=exact, **options)
        W = weigh(op, problem)
        for m in rows:
            part = replace(problem, A=problem.A[:m])
            A = part.A.mT if op.config.layout[0] == "t" else part.A
            (reference.assert_exact if exact else reference.assert_close)(op(A, W, **part.extras), part)


def ids(cases):
    return [pytest.param(*case, id="-".join(str(field) for field in case)) for case in cases]


# -- every kind of operand -------------------------------------------------------------------------------------------------


def covering():
    """Every integer format by row and by group on every target; A, shapes, zeros, scaling, bias and out_dtype in turn."""
    cases = itertools.product(INTEGERS, ("row", "group"), TARGETS)
    for i, (name, how, target) in enumerate(cases):
        modes = (None, "original", "rescale", "quantized" if name[0] == "u" else "original")
        turn = i + i // 8 + i // 64
        mode, scaling = modes[turn % 4], turn % 5 != 0
        yield (
            name,
            how,
            target,
            FLOATS[i % 3],
            turn % len(SHAPES),
            mode,
            scaling,
            (i // 2) % 2 == 0,
            FLOATS[(i // 3) % 3],
        )


@pytest.mark.parametrize(
    ("name", "how", "target", "a_dtype", "shape", "mode", "scaling", "bias", "out_dtype"), ids(covering())
)
def test_formats(build, name, how, target, a_dtype, shape, mode, scaling, bias, out_dtype):
    N, K, group = SHAPES[shape]
    fields = {
        "A_dtype": a_dtype,
        "W_dtype": name,
        "out_dtype": out_dtype,
        "group_size": group,
        "with_zeros": mode is not None,
        "zeros_mode": mode,
        "with_scaling": scaling,
        "with_bias": bias,
    }
    check(build(config(N, K, how=how, **fields), target), (1, 3, 17))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["row", "group"])
@pytest.mark.parametrize("mode", ["original", "rescale", "quantized"])
def test_groups_with_zeros(build, target, how, mode):
    fields = {"group_size": 32, "with_scaling": True, "with_zeros": True, "zeros_mode": mode, "with_bias": True}
    check(build(config(96, 160, (1, 4, 16), how, **fields), target), (1, 4, 18))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("how", ["row", "group"])
def test_ugly_rows(build, shape, how):
    N, K, group = shape
    check(build(config(N, K, None, how, group_size=group, with_scaling=True)), UGLY_ROWS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(build, layout):
    check(build(config(how="group", group_size=32, layout=layout, with_scaling=True)), (1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["row", "group"])
def test_real_shapes(build, how, target):
    fields = {"group_size": 128, "with_scaling": True, "with_zeros": True, "zeros_mode": "quantized"}
    check(build(config(1024, 4096, (1, 128), how, **fields), target), (1, 130))


# -- what is documented ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a_dtype", FLOATS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("K", [24, 128], ids=["floats", "bytes"])
def test_each_rounded_value_is_the_documented_one(build, target, a_dtype, K):
    """Weights of one pick single activations, and an output of float32 shows their q·s to the last bit."""
    op = build(config(K, K, A_dtype=a_dtype, W_dtype="int2"), target)
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(40, K, generator=generator) * 10.0 ** torch.arange(-3, 1).repeat(10)[:, None]
    ties = torch.arange(K) % 127 + 0.5
    A[0], A[1], A[2] = ties, -ties, torch.arange(K) - K // 2
    A[:3, -1] = 127
    A = A.to(getattr(torch, a_dtype))
    out = op(A, op.transform_weight(torch.eye(K, dtype=torch.int8)))
    whole, scale = reference.quantize(A, 1)
    assert torch.equal(out, torch.from_numpy(whole * scale).view(40, K))
    assert set(out[0].tolist()) <= {float(v) for v in range(0, 128, 2)} | {127.0}  # halves go to the even number


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("how", "K"), [("row", 128), ("row", 27), ("group", 128)])
def test_eps_stands_for_smaller_magnitudes(build, target, how, K):
    """… in float32, whatever A's dtype; larger rows are as they are without."""
    eps = 1e-3
    fields = {"A_dtype": "float16", "W_dtype": "int2", "group_size": 32 if how == "group" else -1}
    op = build(config(K, K, how=how, activation_eps=eps, **fields), target)
    plain = build(config(K, K, how=how, **fields), target)
    A = torch.randn(6, K, generator=torch.Generator().manual_seed(1)) * 3e-4 / 3
    A[1] *= 1e-3
    A[2], A[3], A[4] = 0, A[3] * 1e4, eps
    A[5, 0], A[5, 32:] = 1.0, 2e-4
    A = A.half()
    W = op.transform_weight(torch.eye(K, dtype=torch.int8))
    whole, scale = reference.quantize(A, K // 32 if how == "group" else 1, eps)
    out = op(A, W)
    assert torch.equal(out, torch.from_numpy(whole * scale).view(6, K))
    assert not torch.equal(out[0], plain(A, W)[0])
    assert torch.equal(out[2], torch.zeros(K))
    assert torch.equal(out[3], plain(A, W)[3])
    assert abs(float(out[4, 0]) - eps) < 1e-6
    assert op.config != plain.config
    assert op.artifact.key != plain.artifact.key


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a_dtype", [*FLOATS, "int8"])
@pytest.mark.parametrize("shape", [(32, 128), (17, 33), (5, 7), (48, 1056)], ids=str)
def test_one_scale_of_all_weights(build, target, a_dtype, shape):
    """float32 whatever A's dtype, of any shape and float dtype with one element; quantized on the fly, and not."""
    fields = {"with_scaling": True, "scale_per_tensor": True, "with_bias": True, "A_dtype": a_dtype, "W_dtype": "int2"}
    for how in ("row", None) if a_dtype != "int8" else (None,):
        op = build(config(*shape, how=how, **fields), target)
        check(op, (1, 3, 17))
        problem = reference.draw(op.config, 3)
        assert problem.scale.dtype is torch.float32
        W, bias = weigh(op, problem), problem.bias
        for scale in (problem.scale.view(1, 1), problem.scale[0], problem.scale.double().float().view(1, 1, 1)):
            assert torch.equal(op(problem.A, W, scale, bias=bias), op(problem.A, W, problem.scale, bias=bias))
        half = op(problem.A, W, problem.scale.half(), bias=bias)
        assert torch.equal(half, op(problem.A, W, problem.scale.half().float(), bias=bias))
        dense = problem.dense().float()
        assert torch.equal(op.dequantize(W, problem.scale), dense)
        with pytest.raises(bitblas.ArgumentError, match=r"scale has shape \(2,\); expected \(1,\)"):
            op(problem.A, W, torch.ones(2), bias=bias)


def covering_int8():
    """Every zeros mode by row and by group on every target; formats and shapes in turn."""
    names, shapes = ("uint4", "int8", "int2", "uint8", "uint1"), ((64, 256, 64), (64, 256, -1), (9, 28, 7))
    modes = (None, "original", "rescale", "quantized")
    for i, (target, how, mode) in enumerate(itertools.product(TARGETS, ("row", "group"), modes)):
        yield target, how, mode, names[i % 5], shapes[(i + i // 3) % 3]
        yield target, how, mode, names[(i + 2) % 5], shapes[(i + i // 3 + 1) % 3]


@pytest.mark.parametrize(("target", "how", "mode", "name", "shape"), ids(covering_int8()))
def test_what_is_quantized_exactly_is_bit_equal_to_int8(build, target, how, mode, name, shape):
    """… activations given as int8, with any scales and bias."""
    N, K, group = shape
    mode = None if mode == "quantized" and name.startswith("int") else mode
    fields = {"W_dtype": name, "group_size": group, "with_scaling": True, "with_bias": True}
    fields |= {"with_zeros": mode is not None, "zeros_mode": mode}
    op = build(config(N, K, how=how, A_dtype="float32", **fields), target)
    given = build(config(N, K, how=None, A_dtype="int8", **fields), target)
    problem = reference.draw(given.config, 17)
    A = problem.A.clamp(min=-127)
    A.view(17, -1, group if group > 0 else K)[:, :, 3] = 127
    smaller = {"scale": problem.scale / 64}
    if mode == "rescale":
        smaller["zeros"] = problem.zeros / 64
    for factor, extras in ((1, problem.extras), (1 / 64, {**problem.extras, **smaller})):
        for m in (1, 17):
            expected = given(A[:m], weigh(given, problem), **extras)
            assert torch.equal(op(A[:m].float() * factor, weigh(op, problem), **problem.extras), expected)


@pytest.mark.parametrize("how", ["row", "group"])
def test_one_group_is_a_row(build, how):
    """… and both are the same kernels."""
    one = [build(config(how=how, group_size=group, with_scaling=True)) for group in (-1, 128)]
    row = build(config(how="row", with_scaling=True))
    assert all(op.plan.kernels == row.plan.kernels for op in one)
    assert one[0].artifact.key == row.artifact.key


@pytest.mark.parametrize("how", ["row", "group"])
def test_the_benchmark_knows_what_is_computed(build, how):
    """Its check takes these results, and no exact ones; its expectation is the exact result."""
    op, exact = (build(config(how=how, group_size=32, with_scaling=True)) for how in (how, None))
    work = draw_workload(op.config, 5)
    outs = [each(work.a, each.transform_weight(work.weight), **work.extras) for each in (op, exact)]
    assert work.check(outs[0]).right
    assert not work.check(outs[1]).right
    assert replace(work, config=exact.config).check(outs[1]).right
    assert torch.equal(replace(work, config=exact.config).expected, work.expected)
    assert work.check_within(outs[0], 0.05).right
    assert not work.check_within(outs[0], 1e-4).right


def test_the_documented_errors():
    """Fewer rows and columns show the same errors: they depend on K and the activations, and hardly on the weights."""
    spec = importlib.util.spec_from_file_location("quantization_error", ROOT / "benchmark" / "quantization_error.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = [cells(line) for line in rows_between(ROOT / "docs" / "PythonAPI.md", "quantization")]
    found = list(script.errors(32, 128, 4096))
    assert [line[:2] for line in lines] == [[weights, activations] for weights, activations, _ in found]
    for line, (weights, activations, errors) in zip(lines, found, strict=True):
        documented = [float(cell.removesuffix(" %")) / 100 for cell in line[2:]]
        assert documented == pytest.approx(errors, rel=0.25), (weights, activations)
        assert documented == sorted(documented, reverse=True)


# -- rows that are not like others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a_dtype", FLOATS)
@pytest.mark.parametrize("how", ["row", "group"])
def test_rows_of_zeros_give_zeros(build, target, a_dtype, how):
    fields = {"A_dtype": a_dtype, "group_size": 32, "with_scaling": True, "with_zeros": True, "with_bias": True}
    op = build(config(how=how, **fields), target)
    problem = reference.draw(op.config, 6)
    problem.A[2] = 0
    problem.A[4] = -0.0
    problem.A[5, 32:64] = 0
    out = op(problem.A, weigh(op, problem), **problem.extras)
    reference.assert_close(out, problem)
    assert torch.equal(out[2], problem.bias)
    assert torch.equal(out[4], problem.bias)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a_dtype", FLOATS)
@pytest.mark.parametrize("how", ["row", "group"])
@pytest.mark.parametrize("N", [32, 7])
def test_the_ends_of_each_dtype(build, target, a_dtype, how, N):
    """Largest numbers, smallest ones, subnormal ones, and an outlier beside which all else vanishes."""
    info = torch.finfo(getattr(torch, a_dtype))
    op = build(config(N, how=how, A_dtype=a_dtype, W_dtype="int4", group_size=32), target)
    problem = reference.draw(op.config, 8)
    sign = torch.where(problem.A > 0, 1.0, -1.0).double()
    problem.A[0] = (sign[0] * info.max / 1024).to(problem.A.dtype)
    problem.A[1] *= float(info.max) / 2.0**11
    problem.A[2] = sign[2] * info.tiny
    problem.A[3] = (sign[3] * info.smallest_normal * info.eps).to(problem.A.dtype)  # the smallest of all
    problem.A[4, 7] = float(info.max) / 2048
    problem.A[5] = sign[5] * 2.0**-24
    problem.A[6] *= 2.0**-10
    out = op(problem.A, weigh(op, problem))
    assert out.isfinite().all()
    reference.assert_close(out, problem)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("a_dtype", FLOATS)
@pytest.mark.parametrize("how", ["row", "group"])
@pytest.mark.parametrize("N", [32, 7])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_and_others_do_not(build, target, a_dtype, how, N, bad):
    for mode, scaling in (("quantized", False), ("original", True)):
        fields = {"with_zeros": True, "zeros_mode": mode, "with_scaling": scaling, "with_bias": True}
        op = build(config(N, how=how, A_dtype=a_dtype, group_size=32, **fields), target)
        problem = reference.draw(op.config, 5)
        clean = op(problem.A, weigh(op, problem), **problem.extras)
        problem.A[1, 40], problem.A[3, 0] = bad, bad
        problem.A[3, 127] = math.inf
        for m in (2, 5):
            out = op(problem.A[:m], weigh(op, problem), **problem.extras)
            assert out[[1, 3][: m // 2]].isnan().all()
            assert torch.equal(out[0::2], clean[:m][0::2])


def test_no_rows(build):
    op = build(config(group_size=32, how="group", with_scaling=True))
    problem = reference.draw(op.config, 1)
    out = op(torch.empty(3, 0, 128, dtype=torch.float16), weigh(op, problem), **problem.extras)
    assert out.shape == (3, 0, 32)


# -- as an operator --------------------------------------------------------------------------------------------------------


def test_its_facts(build):
    op = build(config(how="group", group_size=32))
    assert op.dynamic_quantization == "group"
    assert build(config(how=None)).dynamic_quantization is None
    assert "dynamic_quantization='group'" in repr(op)
    assert "activations quantized by group" in op.plan.describe()
    assert "quantized" not in build(config(how=None)).plan.describe()
    again = pickle.loads(pickle.dumps(op))
    assert again.config == op.config
    problem = reference.draw(op.config, 3)
    W = weigh(op, problem)
    assert torch.equal(again(problem.A, W), op(problem.A, W))


def test_operators_with_and_without_do_not_meet(build):
    ops = [build(config(how=how, group_size=32)) for how in (None, "row", "group")]
    assert len({op.artifact.key for op in ops}) == 3
    assert len({op.config for op in ops}) == 3
    problem = reference.draw(ops[0].config, 3)
    outs = [op(problem.A, weigh(op, problem)) for op in ops]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


def test_through_a_database(store, tmp_path):
    path = tmp_path / "database"
    path.mkdir(mode=0o700)
    saved = {}
    for how in (None, "row", "group"):
        op = bitblas.Matmul(config(how=how, group_size=32, with_scaling=True), target="llvm", enable_tuning=False)
        saved[how] = op
    cache = OperatorCache()
    for op in saved.values():
        cache.add(op.config, op)
    cache.save_into_database(path)
    loaded = OperatorCache()
    loaded.load_from_database(path, saved[None].target)
    assert loaded.size() == 3
    for op in saved.values():
        found = loaded.get(op.config)
        assert found.origin == "loaded"
        problem = reference.draw(op.config, 4)
        W = weigh(op, problem)
        assert torch.equal(found(problem.A, W, **problem.extras), op(problem.A, W, **problem.extras))


def test_with_a_split(build):
    fields = {name: value for name, value in config(group_size=32, with_scaling=True).fields().items() if name != "M"}
    split = MatmulWithSplitK(MatmulConfigWithSplitK(M=[1, 16], **fields, k_split=2), enable_tuning=False)
    plain = build(config(group_size=32, with_scaling=True))
    assert split.artifact.key == plain.artifact.key
    check(split, (1, 3))


def test_tuning(store):
    op = bitblas.Matmul(config(M=[1, 16], how="group", group_size=32, with_scaling=True), target="llvm")
    assert sorted(op.hardware_aware_finetune(topk=2)) == [1, 16]
    check(op, (1, 17))
