"""On a card: every rule, also under compute-sanitizer; operators that are loaded without a compiler, saved, pickled."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

import card_cases
import reference
import sanitizer
from bitblas import Matmul, MatmulConfig, cli
from bitblas.cache import OperatorCache
from bitblas.plan import plan_matmul
from bitblas.schedule import RULES, Problem, select_rule
from bitblas.target import resolve_target
from scripts import report

SMALL = MatmulConfig(M=(1, 16), N=64, K=128, W_dtype="uint4", accum_dtype="float32", with_scaling=True, group_size=32)
#: Names of rules, with which tests are parametrised before a card is looked at.
CUDA_RULES = [rule.name for rule in RULES if rule.target_kind == "cuda" and rule.solves is Problem]


def right(op, m=5):
    problem = reference.draw(op.config, m)
    extras = {name: tensor.cuda() for name, tensor in problem.extras.items()}
    out = op(problem.A.cuda(), op.transform_weight(problem.weights).cuda(), **extras)
    reference.assert_close(out.cpu(), problem)
    return True


# -- every rule ------------------------------------------------------------------------------------------------------------


def case_of(rule):
    """A problem for a rule; skips where this card's plans do not take it."""
    found = card_cases.by_rule(resolve_target("cuda"))
    if rule not in found:
        pytest.skip(f"no problem of card_cases.py takes {rule} on this card")
    return found[rule]


@pytest.mark.parametrize("rule", CUDA_RULES)
def test_each_rule(rule):
    card_cases.check(*case_of(rule))


@pytest.mark.parametrize("m", [1, 32, 128])
@pytest.mark.parametrize("name", card_cases.QUANTIZED)
def test_each_rule_that_quantizes_activations(name, m):
    card_cases.check(*card_cases.quantized(name, m))


@pytest.mark.slow
@pytest.mark.parametrize("rule", CUDA_RULES)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_each_rule_under_compute_sanitizer(rule, tool):
    config, _ = case_of(rule)
    Matmul(config, target="cuda")  # built here, so that only the kernel is watched
    sanitizer.watch(card_cases.__file__, rule, tool)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 32])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_quantized_activations_under_compute_sanitizer(m, tool):
    config, _ = card_cases.quantized("ternary", m)
    Matmul(config, target="cuda")
    sanitizer.watch(card_cases.__file__, f"ternary-{m}", tool)


def every_tiling():
    """A problem, its target and a tiling, of the first ones of a rule and each of what tuning may choose."""
    if not torch.cuda.is_available():
        return
    target = resolve_target("cuda")
    cases = card_cases.by_rule(target) | {f"ternary-{m}": card_cases.quantized("ternary", m) for m in (1, 16, 128)}
    for rule, (config, m) in cases.items():
        plan = plan_matmul(config, target)
        problem = Problem(plan.config, plan.layout, target, m)
        for index, tiling in enumerate(select_rule(RULES, problem).tilings(problem)):
            yield pytest.param(config, m, tiling, id=f"{rule}-{index}")


@pytest.mark.slow
@pytest.mark.parametrize(("config", "m", "tiling"), list(every_tiling()))
def test_every_tiling_that_tuning_may_choose(config, m, tiling):
    op = Matmul(config, target="cuda", from_database=True)
    op.plan = plan_matmul(config, op.target, {m: tiling})
    assert [kernel.tiling for kernel in op.plan.kernels] == [tiling]
    right(op, m)
    right(op, m + 1)


# -- the life of an operator -----------------------------------------------------------------------------------------------

FRESH = """
import json, sys, time
import torch
torch.zeros(1, device="cuda")
import bitblas
{before}
config = bitblas.{config!r}
began = time.perf_counter()
op = bitblas.Matmul(config, target="cuda")
seconds = time.perf_counter() - began
A, W = torch.ones(2, config.K, dtype=torch.float16, device="cuda"), op.transform_weight(torch.ones(config.N, config.K))
out = op(A, W.cuda(), torch.ones(config.N, config.K // 32, dtype=torch.float16, device="cuda"))
assert (out == config.K).all(), out
print(json.dumps([op.origin, "tvm" in sys.modules, seconds]))
"""


def test_a_fresh_process_loads_it_without_tvm_and_without_a_compiler(store, tmp_path):
    Matmul(SMALL, target="cuda")
    before = "import sys; sys.modules['tvm'] = None"
    (origin, _, _), errors = report(
        FRESH.format(config=SMALL, before=before), BITBLAS_CACHE_DIR=store, PATH=str(tmp_path)
    )
    assert origin == "loaded"
    assert not [line for line in errors if "bitblas" in line]
    (origin, loaded, _), _ = report(FRESH.format(config=SMALL, before=""), BITBLAS_CACHE_DIR=store)
    assert (origin, loaded) == ("loaded", False)


def test_it_is_saved_loaded_and_pickled(store, tmp_path):
    op = Matmul(SMALL, target="cuda")
    assert op.origin == "compiled"
    assert right(op)
    cache = OperatorCache()
    cache.add(SMALL, op)
    cache.save_into_database(tmp_path / "db", "cuda")
    loaded = OperatorCache()
    loaded.load_from_database(tmp_path / "db", "cuda")
    assert loaded.get(SMALL).origin == "loaded"
    assert right(loaded.get(SMALL))
    again = pickle.loads(pickle.dumps(op))
    assert (again.config, again.plan, again.origin) == (op.config, op.plan, "loaded")
    assert right(again)


def test_its_code_can_be_read():
    op = Matmul(SMALL, target="cuda")
    assert "__global__" in op.get_source()
    assert op.plan.kernels[0].name in op.get_source()


def test_cards_and_cpus_have_artifacts_of_their_own():
    there, here = Matmul(SMALL, target="cuda"), Matmul(SMALL, target="x86-64", from_database=True)
    assert there.plan != here.plan
    assert there.artifact is not None


def test_bench(capsys):
    arguments = ["bench", "--target", "cuda", "--N", "256", "--K", "512", "--M", "1", "17", "--seconds", "0.05"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["workload"]["m"] for row in found["results"]] == [1, 17]
    for row in found["results"]:
        assert row["timings"][0]["name"] == "bitblas"
        assert all(timing["seconds"] for timing in row["timings"])
    assert cli.main(arguments) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out


def test_latency_is_the_kernels():
    op = Matmul(replace(SMALL, N=4096, K=4096), target="cuda")
    assert 0.001 < op.profile_latency({"m": 1}) < 1
