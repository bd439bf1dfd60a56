"""Attentions tuned for real, on this CPU: the choice is used, kept, and found again; operators that are saved and loaded."""

import json
import logging
import pickle

import pytest
import torch

from bitblas import FlashAtten, FlashAttenConfig, cli, tuner
from bitblas.build import expression_module
from bitblas.cache import OperatorCache
from bitblas.errors import ArgumentError
from bitblas.plan import plan_attention
from bitblas.schedule import RULES, AttentionProblem, select_rule
from bitblas.target import host_target, resolve_target
from bitblas.tuner import local
from bitblas.tuner.record import record_path
from bitblas.tuner.search import candidates, tiling_of
from scripts import report

FLOAT = dict.fromkeys(("Q_dtype", "K_dtype", "V_dtype", "Out_dtype"), "float32")


def small(**options):
    return FlashAttenConfig(
        **{"heads": 4, "heads_kv": 2, "seq_len": 5, "dim": 16, "is_causal": True, **FLOAT, **options}
    )


def assert_right(op, keys=9):
    """Five queries of a causal attention with grouped heads, in float64."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, h, 16, generator=generator) for n, h in ((5, 4), (keys, 2), (keys, 2)))
    heads = torch.arange(4) // 2
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()[:, :, heads]) * op.config.softmax_scale
    scores = scores.masked_fill(torch.arange(keys) > torch.arange(5)[:, None] + keys - 5, -torch.inf)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double()[:, :, heads])
    torch.testing.assert_close(op(q, k, v).double(), expected, rtol=1e-4, atol=1e-5)


def offered(config, m):
    problem = AttentionProblem(config.kernel, host_target(), m)
    return select_rule(RULES, problem).tilings(problem)


def force(monkeypatch, chosen):
    """Let the race think that one candidate takes no time; the kernels run nevertheless."""
    real = local.ChildBench.turn

    def turn(self, plan, m, like):
        taken = real(self, plan, m, like)
        return [1e-9] if tiling_of(plan) == chosen else [max(seconds, 1e-6) for seconds in taken]

    monkeypatch.setattr(local.ChildBench, "turn", turn)


# -- tuning ----------------------------------------------------------------------------------------------------------------


def test_a_choice_is_used_stored_reused_and_travels(store, monkeypatch, tmp_path):
    config = small(seq_len_kv=None)
    op = FlashAtten(config)
    before, (default, other, *_) = op.plan, offered(config, 16)
    assert op.tuning_record is None
    force(monkeypatch, other)
    found = op.hardware_aware_finetune(topk=2, seconds=300)
    monkeypatch.setattr("bitblas.tuner.runs.tune_here", None)  # nothing measures from here on
    assert list(found) == [16]  # ten rows
    assert (found[16]["default"], found[16]["tiling"]) == (default.fields(), other.fields())
    assert found[16]["gain"] > 1
    assert found[16]["lost"] == []
    assert len(found[16]["candidates"]) == 2
    assert op.plan.tilings == {16: other} != before.tilings
    assert_right(op)
    for same in (FlashAtten(config, enable_tuning=True), pickle.loads(pickle.dumps(op))):
        assert same.plan == op.plan
        assert same.tuning_record == op.tuning_record
        assert_right(same)
    assert FlashAtten(config).plan == before
    wider = small(heads=16, heads_kv=8, seq_len=8)  # as many rows: the same kernel
    assert FlashAtten(wider, enable_tuning=True).plan.tilings == {16: other}

    saved = OperatorCache()
    saved.add(config, op)
    saved.save_into_database(tmp_path / "db")
    loaded = OperatorCache()
    loaded.load_from_database(tmp_path / "db")
    assert loaded.get(config).plan == op.plan
    assert loaded.get(config).tuning_record == op.tuning_record
    assert loaded.get(config).origin == "loaded"
    assert_right(loaded.get(config))


def test_the_likely_tilings_give_the_same_and_the_default_is_measured(store):
    """Nothing is forced: what is clearly faster is chosen, and no candidate is lost."""
    op = FlashAtten(small(seq_len=1, heads=2, heads_kv=2, layout="ntn", dim_v=24, **dict.fromkeys(FLOAT, "bfloat16")))
    (row,) = op.hardware_aware_finetune(topk=3, parallel_build=False, seconds=300).values()
    assert row["lost"] == []
    assert len(row["candidates"]) == 3
    assert row["candidates"][0]["tiling"] == row["default"]
    assert all(0 < one["seconds"] < 10 for one in row["candidates"])


def test_a_kernel_that_lies_loses_itself(store, tmp_path, monkeypatch):
    """Built right, but for the other causality: its results are those of another attention."""
    config = small(heads=2, heads_kv=2, seq_len=16, seq_len_kv=None)
    rows = candidates(config, host_target(), 2)[16]
    with local.building(False) as bench:
        wrong = plan_attention(
            small(seq_len=16, is_causal=False).for_bucket(16), host_target(), {16: tiling_of(rows[1])}
        )
        assert dict(bench.build([rows[0], wrong], lambda: True)) == {rows[0]: "", wrong: ""}
        bench._built[rows[1]] = bench._built[wrong]
        monkeypatch.setattr(bench, "build", lambda plans, go_on: ((plan, "") for plan in plans))
        found = tuner.tune(config, host_target(), 2, bench, 300.0)
    ((lost, reason),) = found.buckets[16].lost
    assert lost == tiling_of(rows[1])
    assert "gives other results" in reason
    assert found.buckets[16].tiling == tiling_of(rows[0])


def test_without_a_compiler_candidates_run_here(store, monkeypatch, caplog):
    monkeypatch.setattr(local, "find_compiler", lambda target=None: None)
    with caplog.at_level(logging.WARNING, "bitblas"):
        found = FlashAtten(small()).hardware_aware_finetune(topk=2, seconds=300)
    assert len(found[16]["candidates"]) == 2
    assert found[16]["lost"] == []
    assert "are built and run in this process" in caplog.text


def test_the_pass_measures_for_real():
    import tvm

    from bitblas.transform import PROBLEM_ATTR, ApplyFastTuning

    plan = plan_attention(small(), host_target())
    seen = []

    def measure(mod, problem):
        seen.append(tuner.measure_module(mod, problem))
        return seen[-1]

    tuned = ApplyFastTuning(RULES, measure, topk=2, target=host_target())(expression_module(plan))
    ((_, func),) = tuned.functions_items()
    assert isinstance(func, tvm.tirx.PrimFunc)
    assert len(seen) == 2
    assert all(0 < seconds < 10 for seconds in seen)
    fastest = offered(small(), 16)[seen.index(min(seen))]
    assert json.loads(str(func.attrs[PROBLEM_ATTR]))["tiling"] == fastest.fields()


def test_a_record_is_for_all_lengths_and_heads():
    fields = {"dim": 64, "is_causal": True}
    alike = [
        FlashAttenConfig(**fields),
        FlashAttenConfig(1, 8, 128, **fields),
        FlashAttenConfig(2, 8, 1, heads_kv=2, **fields),
    ]
    target = resolve_target("llvm")
    assert len({record_path(config, target) for config in alike}) == 1
    assert record_path(FlashAttenConfig(dim=64), target) != record_path(alike[0], target)


def test_another_target_brings_another_door(store):
    """What checks arguments, and what a graph calls the operator, are those of the plan."""
    op = FlashAtten(FlashAttenConfig(dim=64), target="llvm", from_database=True)
    door, spec = op._door, op._spec
    op._adopt(plan_attention(op.config, resolve_target("x86-64-v2")))
    assert op.target == resolve_target("x86-64-v2")
    assert op._door is not door
    assert op._spec != spec


def test_a_target_of_another_kind(store):
    op = FlashAtten(small(), from_database=True)
    with pytest.raises(ArgumentError, match=r"target is 'cuda -arch=sm_90'; this operator is for llvm"):
        op.hardware_aware_finetune(target="cuda -arch=sm_90")
    for options in ({"topk": 0}, {"seconds": 0}):
        with pytest.raises(ArgumentError, match="must be"):
            op.hardware_aware_finetune(**options)


# -- latency ---------------------------------------------------------------------------------------------------------------


def test_latency_is_in_milliseconds(build, monkeypatch):
    op = FlashAtten(FlashAttenConfig(dim=16, **FLOAT))
    assert 0 < op.profile_latency({"seq_len": 2, "heads": 2}) < 1000
    calls = []
    monkeypatch.setattr("bitblas.operands.time_kernels", lambda kernels, call: calls.append(call) or 0.25)
    assert op.profile_latency() == 250
    assert op.profile_latency({"batch": 2, "heads": 6, "heads_kv": 3, "seq_len": 4, "seq_len_kv": 7}) == 250
    assert calls[0].inputs[0].shape[1] == calls[0].inputs[1].shape[1] == 1024
    assert [tuple(t.shape) for t in calls[1].inputs] == [(2, 4, 6, 16), (2, 7, 3, 16), (2, 7, 3, 16)]
    assert calls[1].m == 8
    with pytest.raises(ArgumentError, match="'m' is no size of an attention"):
        op.profile_latency({"m": 3})
    with pytest.raises(ArgumentError, match="it must be a dict such as"):
        op.profile_latency([3])


# -- saving and loading ----------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
import torch, bitblas
from bitblas.cache import OperatorCache, set_database_path
config = bitblas.FlashAttenConfig({fields})
found = OperatorCache()
found.load_from_database({path!r})
op = found.get(config)
set_database_path({path!r})
lazy = bitblas.FlashAtten(config, from_database=True)
q = torch.ones(1, 5, 4, 16)
k = v = torch.ones(1, 5, 2, 16)
right = [bool(torch.allclose(one(q, k, v), torch.ones_like(q))) for one in (op, lazy)]
tilings = [one.plan.tilings == op.plan.tilings for one in (op, lazy)]
print(json.dumps([found.size(), op.origin, lazy.origin, right, tilings, "tvm" in sys.modules]))
"""


def test_another_process_loads_what_was_saved(store, tmp_path, capsys):
    """Also an operator that is made later, without TVM and with other tilings than the default's, which nothing has built."""
    config = small()
    other = offered(config, 16)[1]
    op = FlashAtten.restore(config, plan_attention(config, host_target(), {16: other}))
    op.build()
    saved = OperatorCache()
    saved.add(config, op)
    assert saved.exists(small())
    assert saved.get(small(seq_len_kv=None)) is None
    saved.save_into_database(tmp_path / "db")
    fields = 'heads=4, heads_kv=2, seq_len=5, dim=16, is_causal=True, Q_dtype="float32", K_dtype="float32", V_dtype="float32", '
    code = LOAD.format(fields=f'{fields}Out_dtype="float32"', path=str(tmp_path / "db"))
    found, warnings = report(code, BITBLAS_CACHE_DIR=tmp_path / "nothing")
    assert found == [1, "loaded", "loaded", [True, True], [True, True], False]
    assert warnings == []
    assert cli.main(["cache", "list"]) == 0
    words = "attention float32 -> float32, dim=16, causal, rows=16\n"
    assert f"other    {words}" in capsys.readouterr().out


def test_configs_that_differ_in_keys_alone_are_saved_apart(store, tmp_path):
    saved = OperatorCache()
    for config in (small(), small(seq_len_kv=None), small(seq_len_kv=7)):
        saved.add(config, FlashAtten(config))
    saved.save_into_database(tmp_path / "db")
    loaded = OperatorCache()
    loaded.load_from_database(tmp_path / "db")
    assert loaded.size() == 3
    for config in (small(), small(seq_len_kv=None), small(seq_len_kv=7)):
        assert loaded.get(config).config == config
    assert_right(loaded.get(small(seq_len_kv=None)))


# -- the commands ----------------------------------------------------------------------------------------------------------


def test_the_commands_for_attentions(store, tmp_path, capsys):
    """Tuned, and put into a bundle with the record and the kernels that it chose."""
    out, bundle = tmp_path / "record.json", tmp_path / "attention.tar"
    which = ["--attention", "8", "--dim-v", "16", "--dtype", "float32", "--causal", "--k-layout", "ntn"]
    assert cli.main(["tune", *which, "--topk", "1", "--seconds", "300", "--serial", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    config = FlashAttenConfig(dim=8, dim_v=16, layout="ntn", is_causal=True, **FLOAT)
    assert printed.startswith("attention float32 -> float32, dim=8 dim_v=16, causal, K transposed; llvm")
    lines = [line.split() for line in printed.splitlines()]
    assert ["rows", "default", "us", "tuned", "us", "times", "as", "fast", "tried", "lost", "tiling"] in lines
    assert [line[0] for line in lines if line[-1:] == ["default"]] == [str(m) for m in config.buckets]
    record = json.loads(out.read_text())
    assert tuner.read_record(config, host_target()) == record
    assert cli.main(["cache", "export", str(bundle), *which, "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert (len(exported["operators"]), exported["tuning"]) == (1, 1)
    assert FlashAtten(config, enable_tuning=True).artifact.key == exported["operators"][0]


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ("--attention 8 --seq-len 40", FlashAttenConfig(1, 2, 40, 8)),
        ("--attention 16 --seq-len 1", FlashAttenConfig(seq_len=1, dim=16)),
        ("--attention 16 --seq-len 1 --heads 2", FlashAttenConfig(4, 3, 1, 16)),
        (
            "--attention 8 --seq-len 5 --heads 6 --heads-kv 2 --softmax-scale -0.5",
            FlashAttenConfig(2, 6, 5, 8, heads_kv=2, softmax_scale=-0.5),
        ),
        (
            "--attention 8 --dtype bfloat16 --K-dtype float32 --out-dtype float16",
            FlashAttenConfig(dim=8, Q_dtype="bfloat16", K_dtype="float32", V_dtype="bfloat16"),
        ),
        (
            "--attention 8 --Q-dtype float32 --V-dtype bfloat16",
            FlashAttenConfig(dim=8, Q_dtype="float32", V_dtype="bfloat16"),
        ),
    ],
)
def test_every_attention_can_be_exported(store, tmp_path, capsys, arguments, config):
    """What is exported is what an operator with such a config, of any batch and number of keys, loads."""
    assert cli.main(["cache", "export", str(tmp_path / "one.tar"), *arguments.split(), "--json"]) == 0
    (key,) = json.loads(capsys.readouterr().out)["operators"]
    assert FlashAtten(config).artifact.key == key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--causal"], "--causal is of attentions: give --attention DIM as well"),
        (["tune", "--dim-v", "8"], "--dim-v is of attentions"),
        (["tune", "--seq-len", "8"], "--seq-len is of attentions"),
        (["tune", "--softmax-scale", "0"], "--softmax-scale is of attentions"),
        (["tune", "--attention", "8", "--M", "1"], "--M is of matmuls, --attention of attentions: give one of them"),
        (["tune", "--attention", "8", "--W-dtype", "int4"], "--W-dtype is of matmuls"),
        (["tune", "--attention", "8", "--no-scale"], "--no-scale is of matmuls"),
        (["tune", "--attention", "8", "--out-dtype", "int8"], "Out_dtype is 'int8'"),
        (["tune", "--attention", "8", "--heads-kv", "2"], "heads_kv is 2, but heads is not given"),
        (["cache", "export", "x.tar", "--attention", "8", "--N", "1", "--K", "1"], "--N is of matmuls"),
        (["tune", "--attention", "2000"], "dim is 2000; it must be at most 1024"),
        (["cache", "export", "x.tar", "--attention", "8", "--all"], "say what to export, one of"),
        (["cache", "export", "x.tar", "--dtype", "float32", "--all"], "--dtype is of attentions"),
    ],
)
def test_impossible_requests_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1
