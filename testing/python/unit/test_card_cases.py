"""The problems with which cards are checked reach every rule."""

import pytest

import card_cases
from bitblas.plan import plan_matmul
from bitblas.schedule import RULES, Problem
from bitblas.target import resolve_target

NAMES = {rule.name for rule in RULES if rule.target_kind == "cuda" and rule.solves is Problem}
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90")


@pytest.mark.skipif(not NAMES, reason="no rule is for cards")
def test_every_rule_has_a_problem():
    reached = {arch: set(card_cases.by_rule(resolve_target(f"cuda -arch={arch}"))) for arch in ARCHS}
    assert set().union(*reached.values()) == NAMES


def test_quantized_activations_meet_every_rule_that_takes_them():
    target = resolve_target("cuda -arch=sm_80")
    found = {name: [kernel.rule for kernel in plan_matmul(config, target).kernels]
             for name, config in card_cases.QUANTIZED.items()}  # fmt: skip
    threads = {name for name, rules in found.items() if not rules[0].startswith("cuda_mma")}
    assert threads == {"tails", "group"}
    assert {rule for rules in found.values() for rule in rules} == NAMES - {card_cases.DENSE_RULE}


@pytest.mark.parametrize(
    "config",
    [*card_cases.CONFIGS, *card_cases.QUANTIZED.values()],
    ids=lambda config: f"{config.A_dtype}-{config.W_dtype}-{config.N}",
)
def test_problems_are_small(config):
    assert config.N * config.K <= 1 << 20
    assert config.M == card_cases.ROWS
