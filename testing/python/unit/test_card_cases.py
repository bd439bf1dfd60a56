"""The problems with which cards are checked reach every rule."""

import pytest

import card_cases
from bitblas.schedule import RULES
from bitblas.target import resolve_target

NAMES = {rule.name for rule in RULES if rule.target_kind == "cuda"}
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90")


@pytest.mark.skipif(not NAMES, reason="no rule is for cards")
def test_every_rule_has_a_problem():
    reached = {arch: set(card_cases.by_rule(resolve_target(f"cuda -arch={arch}"))) for arch in ARCHS}
    assert set().union(*reached.values()) == NAMES


@pytest.mark.parametrize(
    "config", card_cases.CONFIGS, ids=lambda config: f"{config.A_dtype}-{config.W_dtype}-{config.N}"
)
def test_problems_are_small(config):
    assert config.N * config.K <= 1 << 20
    assert config.M == card_cases.ROWS
