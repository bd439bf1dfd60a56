"""What kernels for tensor cores compute: their text, run thread by thread in the emulator."""

import itertools
from dataclasses import replace

import pytest
import torch

import reference
from bitblas import Matmul, MatmulConfig
from bitblas.formats import FORMATS
from bitblas.plan import native_layout, plan_matmul
from bitblas.schedule import RULES, Problem
from bitblas.schedule.cuda.fragments import declines_fragments
from bitblas.target import resolve_target

FORMAT_NAMES = [name for name, fmt in FORMATS.items() if not fmt.is_native]
A_DTYPES = ("float16", "bfloat16", "int8", "float8_e4m3", "float8_e5m2")
#: N, K and group: whole tiles; a tail of a tile, groups within a block; one group; K of an odd number of blocks.
SHAPES = ((128, 256, 128), (48, 256, 32), (32, 512, -1), (80, 192, 64))
RULE_NAMES = ("cuda_mma_gemv", "cuda_mma")
pytestmark = pytest.mark.usefixtures("emulated")


def config(**fields):
    return MatmulConfig(**{"out_dtype": "float32", "accum_dtype": "float32", **fields})


def covering():
    """Every format with every A; shapes, scales, zeros and bias in turn: five at least of each format in the short run."""
    for i, (name, a_dtype) in enumerate(itertools.product(FORMAT_NAMES, A_DTYPES)):
        N, K, group = SHAPES[i % len(SHAPES)]
        fields = {
            "N": N,
            "K": K,
            "A_dtype": a_dtype,
            "W_dtype": name,
            "with_bias": i % 2 == 0,
            "with_scaling": i % 7 != 0,
        }
        fields["group_size"] = group
        fmt = FORMATS[name]
        if fmt.is_integer and i % 3:
            modes = ("original", "rescale", "quantized") if fmt.kind == "uint" else ("original", "rescale")
            fields.update(with_zeros=True, zeros_mode=modes[i // 3 % len(modes)])
        if not fields["with_scaling"] and not fields.get("with_zeros"):
            fields["group_size"] = -1
        marks = (
            ()
            if A_DTYPES[i // len(A_DTYPES) % len(A_DTYPES)] == a_dtype
            else (pytest.mark.slow, pytest.mark.exhaustive)
        )
        yield pytest.param(fields, id=f"{name}-{a_dtype}", marks=marks)


def check(op, rows):
    for exact in (True, False):
        problem = reference.draw(op.config, max(rows), exact=exact)
        problem = reference.on_tensor_cores(problem) if op.layout.is_fragments else problem
        W = op.transform_weight(problem.weights)
        for m in rows:
            part = replace(problem, A=problem.A[:m])
            (reference.assert_exact if exact else reference.assert_close)(op(part.A, W, **part.extras), part)


@pytest.mark.parametrize("fields", list(covering()))
def test_formats(fields):
    op = Matmul(config(M=(1, 32), **fields), target="cuda -arch=sm_80")
    if declines_fragments(op.plan.config, op.target):
        assert not op.layout.is_fragments
        pytest.skip("is not for tensor cores")
    assert [kernel.rule for kernel in op.plan.kernels] == list(RULE_NAMES)
    check(op, (1, 7, 8, 19, 33))


@pytest.mark.parametrize("w_dtype", ["int1", "int2", "uint4", "int8", "uint8"])
def test_integers_are_exact(w_dtype):
    fields = {"A_dtype": "int8", "W_dtype": w_dtype, "out_dtype": "int32", "accum_dtype": "int32"}
    op = Matmul(config(M=(1, 16), N=64, K=512, with_bias=True, **fields), target="cuda -arch=sm_80")
    check(op, (2, 17))


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "int8"])
def test_outputs(out_dtype):
    fields = {"accum_dtype": "int32"} if out_dtype == "int8" else {"with_scaling": True, "group_size": 64}
    a_dtype = {"int8": "int8"}.get(out_dtype, out_dtype)
    op = Matmul(
        config(M=(1, 16), N=32, K=256, A_dtype=a_dtype, W_dtype="int4", out_dtype=out_dtype, **fields),
        target="cuda -arch=sm_90",
    )
    check(op, (3, 16))


@pytest.mark.parametrize("a_dtype", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("w_dtype", ["float8_e4m3", "float8_e5m2"])
def test_float8_is_multiplied_as_it_is_where_16_bits_are_enough(a_dtype, w_dtype):
    fields = {
        "A_dtype": a_dtype,
        "W_dtype": w_dtype,
        "accum_dtype": "float16",
        "with_scaling": True,
        "group_size": 64,
    }
    for arch, name in (("sm_89", "mma8"), ("sm_80", "mma16")):
        op = Matmul(config(M=(1, 16), N=48, K=256, **fields), target=f"cuda -arch={arch}")
        assert op.layout.name == name
        check(op, (3, 17))


@pytest.mark.parametrize("zeros", [3.0, 3.25, -40.0, 1000.0, float("inf"), float("nan")])
def test_zero_points_that_are_whole_and_others(zeros):
    fields = {"with_scaling": True, "with_zeros": True, "group_size": 128, "accum_dtype": "float32"}
    op = Matmul(config(M=(1, 32), N=32, K=256, A_dtype="float16", W_dtype="uint4", **fields), target="cuda -arch=sm_80")
    problem = reference.draw(op.config, 17)
    given = problem.zeros.clone()
    given[3, 1] = given[17, 0] = zeros
    problem = replace(problem, zeros=given, zero_values=given.to(torch.float64))
    W = op.transform_weight(problem.weights)
    for m in (1, 17):
        part = replace(problem, A=problem.A[:m])
        out = op(part.A, W, **part.extras)
        touched = torch.zeros(32, dtype=torch.bool)
        touched[[3, 17]] = True
        expected, allowed = part.output(), reference.bound(part)
        assert bool(((out - expected).abs() <= allowed)[:, ~touched].all())
        if zeros == zeros and abs(zeros) != float("inf"):
            assert bool(((out - expected).abs() <= allowed).all())
        else:
            assert not bool(out[:, touched].isfinite().any())


def test_special_values_of_activations():
    op = Matmul(config(M=(1, 32), N=16, K=128, A_dtype="float16", W_dtype="float8_e5m2"), target="cuda -arch=sm_80")
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    codes[0, 5], codes[1, 6], codes[2, 7] = 0x7C, 0x7F, 0xFC  # infinity, a NaN, minus infinity
    A = torch.ones(9, 128, dtype=torch.float16)
    A[4, 100] = float("nan")
    W = op.transform_weight(codes)
    for m in (3, 9):
        out = op(A[:m], W)
        assert out[0, 0] == float("inf")
        assert out[0, 1].isnan()
        assert out[0, 2] == float("-inf")
        assert bool((out[:4, 3:] == 0).all())
        assert m == 3 or bool(out[4].isnan().all())


def test_oldest_cards():
    """Without asynchronous copies, and by smaller products."""
    fields = {"with_scaling": True, "with_zeros": True, "group_size": 64}
    op = Matmul(config(M=(1, 32), N=64, K=256, A_dtype="float16", W_dtype="uint4", **fields), target="cuda -arch=sm_75")
    check(op, (1, 20))
    fields = {"A_dtype": "int8", "W_dtype": "int4", "out_dtype": "int32", "accum_dtype": "int32"}
    check(Matmul(config(M=(1, 32), N=64, K=256, **fields), target="cuda -arch=sm_75"), (1, 20))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "w_dtype"),
    [
        *((1, "uint4"), (16, "uint2"), (64, "uint4")),
        *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in ((1, "uint2"), (16, "uint4"), (64, "uint2"))),
    ],
)
def test_every_tiling(m, w_dtype):
    """A long K and few columns, so that parts of K are among them."""
    fields = {"A_dtype": "float16", "W_dtype": w_dtype, "with_scaling": True, "group_size": 128}
    cfg, target = config(M=(m,), N=80, K=2048, **fields), resolve_target("cuda -arch=sm_86")
    layout = native_layout(cfg, target)
    rule = next(rule for rule in RULES if rule.name == RULE_NAMES[m > 8])
    tilings = rule.tilings(Problem(cfg, layout, target, m))
    assert len(set(tilings)) == len(tilings)
    assert any(tiling.split_k > 1 for tiling in tilings)
    for tiling in tilings:
        plan = plan_matmul(cfg, target, {m: tiling})
        assert plan.kernels[0].tiling == tiling
        check(Matmul.restore(cfg, plan), (max(1, m - 3), m + 1))


@pytest.mark.parametrize("a_dtype", ["float16", "int8"])
@pytest.mark.parametrize("m", [16, 32, 64, 128])
def test_loads_of_activations_meet_all_banks(m, a_dtype):
    """Shared memory serves 128 bytes at once: those of 8 threads of 16 bytes, or of 16 threads of 8, in 32 banks."""
    fields = {"A_dtype": a_dtype, "W_dtype": "int4", "with_scaling": True, "group_size": 64}
    cfg, target = config(M=(m,), N=4096, K=4096, **fields), resolve_target("cuda -arch=sm_90")
    rule = next(rule for rule in RULES if rule.name == "cuda_mma")
    for tiling in rule.tilings(Problem(cfg, native_layout(cfg, target), target, m)):
        size = 16 if a_dtype == "float16" else 8
        at_once = 128 // size
        for first in range(0, 32, at_once):
            starts = [lane // 4 * tiling.row_bytes(cfg) + lane % 4 * size for lane in range(first, first + at_once)]
            assert all(start % 16 == 0 or size == 8 for start in starts)
            assert len({(start + byte) % 128 for start in starts for byte in range(0, size, 4)}) == 32
