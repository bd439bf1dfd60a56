"""Operators for cards as a whole, where there is none: door, layout, plan, text, loader; only the card is the emulator."""

import pytest
import torch

import card_cases
import devices
import reference
from bitblas import ArgumentError, Matmul, MatmulConfig
from bitblas.schedule import RULES, Problem
from bitblas.target import resolve_target

pytest.importorskip("emulator")

RULE_NAMES = [rule.name for rule in RULES if rule.target_kind == "cuda" and rule.solves is Problem]


pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_each_rule(rule, arch):
    target = f"cuda -arch={arch}"
    found = card_cases.by_rule(resolve_target(target), few_rows=True)
    if rule not in found:
        pytest.skip(f"no plan for {arch} takes {rule}")
    card_cases.check(*found[rule], target, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "m"), [*((name, 1) for name in card_cases.QUANTIZED), ("ternary", 16), ("zeros", 16), ("group", 16)]
)
def test_each_rule_that_quantizes_activations(name, m):
    card_cases.check(*card_cases.quantized(name, m), devices.EMULATED, "cpu")


@pytest.fixture(scope="module")
def op():
    fields = {"with_scaling": True, "with_zeros": True, "with_bias": True, "group_size": 32, "accum_dtype": "float32"}
    config = MatmulConfig(M=(1, 16), N=64, K=96, A_dtype="float16", W_dtype="uint4", **fields)
    return Matmul(config, target=devices.EMULATED)


needs_rules = pytest.mark.skipif(not RULE_NAMES, reason="no rule is for cards")


@needs_rules
@pytest.mark.slow
@pytest.mark.parametrize("m", [0, 1, 5, 16, 23])
def test_tensors_of_any_rank_anywhere_in_memory(op, m):
    problem = reference.draw(op.config, m, exact=True)
    W = op.transform_weight(problem.weights)
    reference.assert_exact(op(problem.A, W, **problem.extras), problem)
    assert op(problem.A.view(1, m, 96), W, **problem.extras).shape == (1, m, 64)
    shifted = torch.empty(m * 96 + 1, dtype=torch.float16)[1:].view(m, 96).copy_(problem.A)
    strided = torch.empty(m, 192, dtype=torch.float16)[:, ::2].copy_(problem.A)
    room = torch.full((m + 2, 64), 77.0, dtype=torch.float16)
    for A in (shifted, strided):
        assert op(A, W, **problem.extras, output=room[1:-1]).data_ptr() == room[1:-1].data_ptr()
        reference.assert_exact(room[1:-1], problem)
        assert bool((room[[0, -1]] == 77).all())


@needs_rules
@pytest.mark.slow
def test_wrong_calls_are_refused(op):
    problem = reference.draw(op.config, 3)
    W = op.transform_weight(problem.weights)
    with pytest.raises(ArgumentError, match="A has dtype"):
        op(problem.A.float(), W, **problem.extras)
    with pytest.raises(ArgumentError, match="bias is missing"):
        op(problem.A, W, problem.scale, problem.zeros)


@needs_rules
@pytest.mark.slow
def test_it_is_built_once_and_loaded_again(op):
    again = Matmul(op.config, target=devices.EMULATED)
    assert (op.origin, again.origin) == ("compiled", "loaded")
    problem = reference.draw(op.config, 2, exact=True)
    reference.assert_exact(again(problem.A, again.transform_weight(problem.weights), **problem.extras), problem)
