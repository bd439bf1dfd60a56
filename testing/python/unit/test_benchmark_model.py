"""python -m benchmark.model: its goals and tables from made-up findings, its turns, and what it takes over."""

import json
from dataclasses import replace

import pytest
import torch
from benchmark import model

from bitblas.bench import Machine

START = {
    "torch and transformers": 4.0,
    "import bitblas": 0.1,
    "load": 0.7,
    "first token": 0.1,
    "in all": 4.9,
    "reading the weights": 0.2,
    "resident": 6e8,
    "of files": 2e8,
    "peak": 7e8,
}


def findings(**changes):
    """Made-up ones, in which every goal is reached."""
    found = model.Findings(
        model.Shape(),
        Machine("cpu", "isa", 2, 32 << 20),
        {"torch": "2"},
        "2026-01-01",
        starts={
            "bitblas, cold": {**START, "load": 6.0, "in all": 10.2},
            "bitblas, warm": START,
            "torch float32": {**START, "in all": 5.0},
        },
        speeds={
            "torch float32": {"decode": 0.06, "prefill": 0.4},
            "bitblas float32": {"decode": 0.015, "prefill": 0.25},
        },
        errors={"torch float32": 1e-6, "bitblas float32": 2e-6},
        ratio=0.27,
    )
    return replace(found, **changes)


def verdicts(found):
    return {goal.name.split(",")[0]: goal.passed for goal in model.judge(found)}


def test_goals_that_are_reached():
    names = ["cold start", "warm start", "decode", "prefill", "bytes of quantized layers"]
    assert verdicts(findings()) == dict.fromkeys(names, True)
    measured = {goal.name.split(",")[0]: goal.measured for goal in model.judge(findings())}
    assert measured["warm start"] == "0.7 s"  # 0.1 + 0.7 + 0.1 - 0.2
    assert measured["decode"] == "4.00×"
    assert measured["prefill"] == "1.60×"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cold start", {"starts": {**findings().starts, "bitblas, cold": {**START, "in all": 20.1}}}),
        ("warm start", {"starts": {**findings().starts, "bitblas, warm": {**START, "load": 1.1}}}),
        ("decode", {"speeds": {**findings().speeds, "bitblas float32": {"decode": 0.021, "prefill": 0.25}}}),
        ("prefill", {"speeds": {**findings().speeds, "bitblas float32": {"decode": 0.01, "prefill": 0.34}}}),
        ("bytes of quantized layers", {"ratio": 0.31}),
    ],
)
def test_each_goal_can_be_missed(name, changes):
    found = verdicts(findings(**changes))
    assert found.pop(name) is False
    assert set(found.values()) == {True}


def test_what_was_not_measured_is_no_goal():
    assert verdicts(findings(starts={}, speeds={}, errors={}, ratio=None)) == {}
    assert "tokens/s" not in model.markdown(findings(speeds={}))


def test_tables():
    text = model.markdown(findings())
    assert "| torch float32 | 16.7 | 1.00× | 400 | 1.00× | 1.0e-06 |" in text
    assert "| bitblas float32 | 66.7 | 4.00× | 250 | 1.60× | 2.0e-06 |" in text
    assert "| bitblas, warm | 4.00 | 0.10 | 0.70 | 0.10 | 4.90 | 0.20 | 600 | 200 | 700 |" in text
    assert "2026-01-01, cpu (isa), 2 threads; torch 2." in text


def test_turns_alternate_and_the_first_is_not_counted():
    order = []

    def call(name, *seconds):
        left = list(seconds)

        def once():
            order.append(name)
            return [left.pop(0)]

        return once

    assert model.in_turns({"a": call("a", 9, 1, 3, 2), "b": call("b", 9, 5, 5, 5)}, 3) == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 4


def test_an_earlier_run_is_taken_over_where_all_is_the_same(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model.fields(findings())))
    empty = {"starts": {}, "speeds": {}, "errors": {}, "ratio": None}
    same = findings(**empty)
    model.take_over(same, path)
    assert (same.starts, same.speeds, same.ratio) == (findings().starts, findings().speeds, 0.27)
    for other in ({"versions": {"torch": "3"}}, {"shape": model.Shape(hidden=1024)}):
        found = findings(**empty, **other)
        model.take_over(found, path)
        assert not found.starts
    model.take_over(findings(), tmp_path / "none")


def test_decoding_is_greedy_and_uses_the_cache():
    transformers = pytest.importorskip("transformers", minversion="5", reason="pip install 'bitblas[transformers]'")
    assert transformers
    shape = model.Shape(1, 32, 2, 64, 16)
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(shape.config()).eval()
    rows = []
    handle = llama.model.register_forward_hook(lambda module, inputs, out: rows.append(out.last_hidden_state.shape[1]))
    assert len(model.decode(llama, torch.arange(4)[None], 3)) == 3
    assert rows == [4, 1, 1, 1]
    handle.remove()
    assert len(model.prefill(llama, torch.arange(8)[None])) == 1
