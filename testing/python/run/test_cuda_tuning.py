"""Tuning on a card: kernels that crash it, hang and lie lose themselves; the record, the pass and the command."""

import json
import shutil

import pytest
import torch

import reference
from bad_kernels import CARD_BODIES, card_library
from bitblas import Matmul, MatmulConfig, cli, tuner
from bitblas.target import resolve_target
from bitblas.tuner import local
from bitblas.tuner.search import candidates, tiling_of

pytestmark = pytest.mark.slow  # children take seconds to start


def small(**fields):
    defaults = {"M": [1, 16], "N": 256, "K": 512, "W_dtype": "uint4", "with_scaling": True, "group_size": 128}
    return MatmulConfig(**{**defaults, "accum_dtype": "float32", **fields})


def right(op, m):
    problem = reference.draw(op.config, m)
    extras = {name: tensor.cuda() for name, tensor in problem.extras.items()}
    out = op(problem.A.cuda(), op.transform_weight(problem.weights).cuda(), **extras)
    reference.assert_close(out.cpu(), problem)


def test_a_choice_is_used_and_stored_with_the_card(store):
    op = Matmul(small(), target="cuda", enable_tuning=False)
    found = op.hardware_aware_finetune(topk=3, seconds=60)
    assert sorted(found) == [1, 16]
    for row in found.values():
        assert 1 <= len(row["candidates"]) + len(row["lost"]) <= 3
        assert all(0 < each["seconds"] < 1e-3 for each in row["candidates"])
        assert not row["lost"], row["lost"]
    assert op.tuning_record["machine"]["card"]["name"] == torch.cuda.get_device_name()
    again = Matmul(small(), target="cuda")
    assert again.tuning_record == op.tuning_record
    assert again.plan == op.plan
    for m in (1, 5, 16):
        right(op, m)


@pytest.mark.parametrize("what", CARD_BODIES)
def test_a_bad_kernel_loses_itself_and_nothing_else(what, tmp_path, monkeypatch, store):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    monkeypatch.setattr(local, "TURN_SECONDS", 5.0)
    config, target = small(M=[16]), resolve_target("cuda")
    rows = candidates(config, target, 3)[16]
    if len(rows) < 3:
        pytest.skip("the rule has fewer than three tilings")
    with local.local_bench(target) as bench:
        list(bench.build(rows, lambda: True))
        monkeypatch.setitem(bench._built, rows[1], card_library(tmp_path, what))
        monkeypatch.setattr(bench, "build", lambda plans, go_on: ((plan, "") for plan in plans))
        if what == "hangs":  # the default's first turn says how long others may take
            monkeypatch.setattr(local, "FIRST_SECONDS", 60.0)
        found = tuner.tune(config, target, 3, bench, 300.0)
    ((lost, reason),) = found.buckets[16].lost
    assert lost == tiling_of(rows[1])
    expected = {"strays": "illegal memory access", "hangs": "took more than", "lies": "gives other results"}
    assert expected[what] in reason
    assert {tiling for tiling, _ in found.buckets[16].seconds} == {tiling_of(rows[0]), tiling_of(rows[2])}


def test_the_pass_measures_on_the_card(store):
    from bitblas.build import expression_module
    from bitblas.plan import plan_matmul
    from bitblas.schedule import RULES
    from bitblas.transform import ApplyFastTuning

    target = resolve_target("cuda")
    plan = plan_matmul(small(M=[16]), target)
    seen = []

    def measure(mod, problem):
        seen.append(tuner.measure_module(mod, problem))
        return seen[-1]

    ApplyFastTuning(RULES, measure, topk=2, target=target)(expression_module(plan))
    assert 1 <= len(seen) <= 2
    assert all(0 < seconds < 1e-3 for seconds in seen)


def test_the_command(store, tmp_path, capsys):
    out = tmp_path / "record.json"
    arguments = ["tune", "--target", "cuda", "--N", "256", "--K", "512", "--M", "1", "16", "--topk", "2"]
    assert cli.main([*arguments, "--seconds", "60", "--out", str(out)]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert set(record["buckets"]) == {"1", "16"}
    assert Matmul(MatmulConfig(**record["config"]), target="cuda").tuning_record == record
