"""Every tiling that a rule offers computes the same, not only the default."""

from dataclasses import replace

import pytest
import torch

import reference
from bitblas import Matmul, MatmulConfig
from bitblas.ops.provider import provide
from bitblas.plan import KernelPlan, plan_matmul
from bitblas.schedule import RULES, select_rule
from bitblas.target import host_features, resolve_target

CASES = [  # a target, activations, weights, zeros, N and K, group
    ("llvm", "float16", "uint4", "quantized", 48, 256, 64),
    ("llvm", "float32", "int7", None, 144, 128, -1),
    ("llvm", "bfloat16", "uint3", "original", 48, 256, 64),
    ("llvm", "bfloat16", "int8", None, 48, 256, 64),
    ("llvm", "int8", "int2", None, 80, 256, -1),
    ("llvm", "int8", "uint4", "rescale", 80, 256, 32),
    ("llvm", "float16", "nf4", None, 48, 256, 64),
    ("skylake-avx512", "float16", "uint4", "original", 48, 128, 32),
    ("haswell", "float32", "uint4", "quantized", 48, 128, 32),
    ("haswell", "int8", "int4", None, 48, 128, 32),
    ("x86-64-v2", "float16", "uint5", "original", 23, 128, 32),
]


@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize(("target", "a_dtype", "name", "zeros", "N", "K", "group"), CASES)
def test_every_tiling(target, a_dtype, name, zeros, N, K, group, m):
    if not resolve_target(target).features <= host_features():
        pytest.skip(f"this CPU is no {target}")
    fields = {"with_scaling": True, "with_zeros": zeros is not None, "zeros_mode": zeros, "group_size": group}
    fields |= {"out_dtype": "float32", "accum_dtype": "float32"}
    check(MatmulConfig(M=m, N=N, K=K, A_dtype=a_dtype, W_dtype=name, **fields), target, m)


@pytest.mark.parametrize(
    ("a_dtype", "name", "out_dtype", "fields"),
    [
        ("float16", "uint4", "float32", {"with_scaling": True, "with_zeros": True, "group_size": 128}),
        ("bfloat16", "int3", "float32", {"with_scaling": True, "group_size": 64}),
        ("int8", "int2", "int32", {}),
        ("int8", "uint4", "int8", {"with_scaling": True, "with_bias": True}),
        ("int8", "uint4", "float16", {"with_scaling": True, "group_size": 128}),
        ("float16", "nf4", "float32", {"with_scaling": True, "group_size": 64}),
        ("float32", "float16", "float32", {}),
    ],
)
@pytest.mark.parametrize("N", [48, 20])
def test_k_in_parts(a_dtype, name, out_dtype, fields, N):
    """Few columns and much to do: K is shared out."""
    accum = "int32" if out_dtype.startswith("int") else "float32"
    config = MatmulConfig(
        M=40, N=N, K=2048, A_dtype=a_dtype, W_dtype=name, out_dtype=out_dtype, accum_dtype=accum, **fields
    )
    tilings = check(config, "llvm", 40)
    assert any(tiling.split_k > 1 for tiling in tilings)


def check(config, target, m):
    """Compile all tilings into one library, and compare what each computes with the reference; return them."""
    plan = plan_matmul(config, resolve_target(target))
    subject = plan.problem(plan.kernels[0])
    rule = select_rule(RULES, subject)
    tilings = rule.tilings(subject)
    kernels = tuple(KernelPlan(f"matmul_{i}", rule.name, tiling, (m + i,)) for i, tiling in enumerate(tilings))
    library = provide(replace(plan, kernels=kernels)).kernels.module
    op = Matmul.restore(config, plan)
    for exact in (False, True):
        problem = reference.draw(config, m, exact=exact)
        operands = [op.transform_weight(problem.weights).view(-1)]
        for wanted, given in (("scale", problem.scale), ("zeros", problem.zeros), ("bias", problem.bias)):
            if given is not None:
                kind = (
                    config.bias_dtype
                    if wanted == "bias"
                    else "int8"
                    if given.dtype == torch.int8
                    else config.scale_dtype
                )
                given = given.to(getattr(torch, kind))
                operands.append(given.view(-1) if kind == "int8" else given)
        for kernel in kernels:
            out = torch.empty(m, config.N, dtype=getattr(torch, config.out_dtype))
            library[kernel.name](problem.A, *operands, out)
            (reference.assert_exact if exact else reference.assert_close)(out, problem)
    return tilings
