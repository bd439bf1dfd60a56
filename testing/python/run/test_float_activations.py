"""Float activations that are multiplied as bytes, or as bfloat16: as accurate as float32 sums, whatever their sizes."""

import math
from dataclasses import replace

import pytest
import torch

import reference
from bitblas import MatmulConfig
from bitblas.formats import FORMATS
from bitblas.target import host_features

needs_vnni = pytest.mark.skipif("avx512vnni" not in host_features(), reason="this CPU has no AVX512-VNNI")
needs_bf16 = pytest.mark.skipif("avx512bf16" not in host_features(), reason="this CPU has no AVX512-BF16")
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]


def config(name="uint4", a_dtype="float32", **fields):
    base = {"M": (1, 8, 64), "N": 64, "K": 256, "group_size": 64, "with_scaling": True}
    base |= {"A_dtype": a_dtype, "W_dtype": name, "out_dtype": "float32", "accum_dtype": "float32"}
    return MatmulConfig(**{**base, **fields})


def call(op, problem):
    return op(problem.A, op.transform_weight(problem.weights), **problem.extras)


def relative_error(out, problem):
    """Root mean square of the errors, over that of the result."""
    expected = problem.output()
    return float((out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def outliers(A, size):
    A = A.clone()
    A[:, ::128] *= size
    return A


#: What activations may look like: whatever it is, a float32 sum of products is off by some 3e-7 of the result's size.
SIZES = {
    "normal": lambda A: A,
    "outliers of 50": lambda A: outliers(A, 50),
    "outliers of 10000": lambda A: outliers(A, 1e4),
    "lognormal": lambda A: A.sign() * torch.exp(2 * A),
    "tiny": lambda A: A * 2.0**-80,
    "huge": lambda A: A * 2.0**100,
    "all equal": lambda A: torch.full_like(A, 1 / 3),
    "just below a power of two": lambda A: A.sign() * (2 - 2.0**-20),
    "a power of two": lambda A: A.sign() * 2.0,
}


@needs_vnni
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "group"), [("uint4", 64), ("int8", 64), ("uint4", -1), ("int3", 32), ("uint1", 32)])
def test_slices_keep_what_float32_sums_keep(build, name, group, size):
    op = build(config(name, group_size=group, with_zeros=FORMATS[name].kind == "uint"))
    assert all(kernel.tiling.slices == 3 for kernel in op.plan.kernels)
    problem = reference.draw(op.config, 17)
    problem = replace(problem, A=SIZES[size](problem.A))
    assert relative_error(call(op, problem), problem) < 2e-6
    for m in (1, 3, 8):
        part = replace(problem, A=problem.A[:m])
        assert relative_error(call(op, part), part) < 2e-6


@needs_vnni
@pytest.mark.parametrize("a_dtype", ["float16", "float32", "bfloat16"])
def test_what_slices_hold_exactly_comes_out_exactly(build, a_dtype):
    """Activations whose bits lie within 2^-12 of their group's largest: fractions, negative ones, the ends of the range."""
    op = build(config("int8", a_dtype, with_scaling=False, group_size=-1, K=64))
    top = {"float16": 65504.0, "float32": 2.0**100, "bfloat16": 2.0**100}[a_dtype]
    steps = torch.tensor([1.0, -1.0, 0.5, -0.25, 1.5, 1 - 2.0**-7, -(2.0**-11), 0.0])
    rows = torch.stack([steps.repeat(8) * 2.0**p for p in (-60, 0, 13)])
    rows[2, 0] = top if a_dtype == "float16" else rows[2, 0]
    A = rows.to(getattr(torch, a_dtype))
    problem = replace(reference.draw(op.config, 3), A=A)
    out = call(op, problem)
    exact = problem.output()
    for row in (1, 2) if a_dtype == "float16" else (0, 1, 2):  # float16 has no 2^-60
        torch.testing.assert_close(out[row].double(), exact[row].float().double(), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("target", ["llvm", "haswell"])
@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_a_row_of_zeros_gives_zeros(build, a_dtype, m, target):
    op = build(config("uint4", a_dtype, with_zeros=True), target)
    problem = reference.draw(op.config, m)
    A = problem.A.clone()
    A[m // 2] = 0
    out = call(op, replace(problem, A=A))
    assert not out[m // 2].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_what_is_not_finite_stays_so_and_spoils_no_other_row(build, a_dtype, value, m):
    op = build(config("int4", a_dtype))
    problem = reference.draw(op.config, m)
    A, row = problem.A.clone(), m // 2
    A[row, 5] = value
    out = call(op, replace(problem, A=A))
    assert not out[row].isfinite().any()
    others = [i for i in range(m) if i != row]
    assert out[others].equal(call(op, problem)[others])


@needs_bf16
@pytest.mark.parametrize("m", [3, 16, 17, 130])
@pytest.mark.parametrize("name", INTEGERS)
def test_pairs_of_bfloat16_are_exact_but_for_the_sums(build, name, m):
    op = build(config(name, "bfloat16", M=m, K=128, group_size=32, with_zeros=FORMATS[name].kind == "uint"))
    expected = "avx512_bf16" if m > 16 or FORMATS[name].bits <= 5 else "avx512_vnni"
    assert {kernel.rule for kernel in op.plan.kernels} == {expected}
    for exact in (False, True):
        problem = reference.draw(op.config, m, exact=exact)
        (reference.assert_exact if exact else reference.assert_close)(call(op, problem), problem)
        assert relative_error(call(op, problem), problem) < 1e-6
