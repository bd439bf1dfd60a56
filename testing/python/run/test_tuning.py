"""Tuning for real: children that crash, hang and lie, Ctrl-C, the store, the pass, and `bitblas tune`."""

import json
import logging
import os
import pickle
import signal
import time
from dataclasses import replace

import pytest
import torch

import reference
from bad_kernels import BODIES, library
from bitblas import BuildError, Matmul, MatmulConfig, cli, tuner
from bitblas.plan import plan_matmul
from bitblas.runtime import Kernels
from bitblas.schedule import RULES, Problem, select_rule
from bitblas.target import host_target
from bitblas.tuner import LostError, children, local
from bitblas.tuner.search import candidates, tiling_of
from scripts import finish, start

pytestmark = pytest.mark.slow  # children take seconds to start


def small(**fields):
    return MatmulConfig(**{"M": [1, 16], "N": 64, "K": 64, "W_dtype": "uint4", "accum_dtype": "float32", **fields})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Hangs are noticed sooner."""
    monkeypatch.setattr(local, "TURN_SECONDS", 1.0)
    monkeypatch.setattr(local, "SLOWER", 1.0)


@pytest.fixture(scope="module")
def bench():
    """A workbench whose children live as long as the tests that share it."""
    with local.local_bench(host_target()) as found:
        yield found


def always():
    return True


# -- children --------------------------------------------------------------------------------------------------------------


def test_children_survive_what_jobs_do():
    with children.Children(1) as found:
        child = found.first
        pid = child.call(os.getpid, seconds=30)
        assert pid not in (os.getpid(), os.getppid())
        assert child.call(os.getpid, seconds=30) == pid  # it is kept
        with pytest.raises(LostError, match="crashed with SIGABRT"):
            child.call(os.abort, seconds=30)
        with pytest.raises(LostError, match="crashed with status 7"):
            child.call(os._exit, 7, seconds=30)
        with pytest.raises(LostError, match="took more than"):
            child.call(time.sleep, 60, seconds=0.2)
        with pytest.raises(LostError, match="crashed with status 1: LLVM ERROR: no such register"):
            child.call(exec, "import os; os.write(2, b'LLVM ERROR: no such register\\n.'); os._exit(1)", seconds=30)
        with pytest.raises(ZeroDivisionError):
            child.call(divmod, 1, 0, seconds=30)
        again = child.call(os.getpid, seconds=30)
        assert again != pid
    with pytest.raises(ProcessLookupError):
        os.kill(again, 0)


def test_children_leave_an_interrupt_to_their_parent():
    with children.Children(1) as found:
        found.first.call(os.kill, found.first.call(os.getpid, seconds=30), signal.SIGINT, seconds=30)
        assert found.first.call(abs, -1, seconds=30) == 1


def test_jobs_are_shared_out_and_a_crash_loses_one():
    with children.Children(2) as found:
        jobs = [(f"import os, time; time.sleep(0.3); {'os.abort()' if number == 2 else ''}",) for number in range(4)]
        found.first.call(abs, 1, seconds=30)
        results = dict(found.each(exec, jobs, seconds=30))
        assert sorted(results) == [0, 1, 2, 3]
        assert [number for number, result in results.items() if isinstance(result, LostError)] == [2]
        assert dict(found.each(abs, [(-1,), (-2,)], 30, lambda: False)) == {}
        with pytest.raises(ZeroDivisionError):
            list(found.each(divmod, [(1, 1), (1, 0)], seconds=30))


def test_whoever_leaves_early_waits_for_nobody():
    with children.Children(2) as found:
        list(found.each(abs, [(1,), (1,)], seconds=30))
        began = time.monotonic()
        for _ in found.each(exec, [("",), ("import time; time.sleep(60)",), ("",)], seconds=90):
            break
        assert time.monotonic() - began < 20


def test_jobs_that_nobody_waits_for_any_more_end_with_the_children():
    """As where Ctrl-C strikes between two results: whatever iterates is still there, and nobody asks it for more."""
    began = time.monotonic()
    with children.Children(2) as found:
        results = found.each(exec, [("",), ("import time; time.sleep(600)",), ("",)], seconds=900)
        next(results)
    assert time.monotonic() - began < 120
    results.close()


# -- candidates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_kernel_loses_itself_and_nothing_else(bench, what, tmp_path, monkeypatch, store):
    config = small(M=[16])
    rows = candidates(config, host_target(), 3)[16]
    assert len(rows) == 3
    list(bench.build(rows, always))
    monkeypatch.setitem(bench._built, rows[1], library(tmp_path, what))
    monkeypatch.setattr(bench, "build", lambda plans, go_on: ((plan, "") for plan in plans))
    found = tuner.tune(config, host_target(), 3, bench, 300.0)
    ((lost, reason),) = found.buckets[16].lost
    assert lost == tiling_of(rows[1])
    expected = {
        "crashes": "crashed with SIGILL",
        "segfaults": "crashed with SIGSEGV",
        "hangs": "took more than",
        "lies": "gives other results: 1024 of 1024 numbers differ",
        "exits": "crashed with status 3",
    }
    assert expected[what] in reason
    assert {tiling for tiling, _ in found.buckets[16].seconds} == {tiling_of(rows[0]), tiling_of(rows[2])}
    assert found.buckets[16].tiling in (tiling_of(rows[0]), tiling_of(rows[2]))


def test_builds_that_fail_or_crash_lose_themselves(bench, monkeypatch):
    good, bad, _ = candidates(small(M=[1], N=80), host_target(), 3)[1]
    bad = replace(bad, target=replace(bad.target, mcpu="potato"))
    problems = dict(bench.build([good, bad], always))
    assert problems[good] == ""
    assert "no CPU 'potato'" in problems[bad]
    assert bench.turn(good, 1, None)
    abort = "import os; os.write(2, b'LLVM ERROR: do not know how to split this\\n'); os.abort()"
    real = bench._children.each
    monkeypatch.setattr(bench._children, "each", lambda job, jobs, *rest: real(exec, [(abort,)] * len(jobs), *rest))
    ((plan, problem),) = bench.build([good], always)
    assert plan == good
    assert problem == "the build crashed with SIGABRT: LLVM ERROR: do not know how to split this"


@pytest.mark.parametrize(
    ("got", "expected", "problem"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2]), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 integers differ"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.001, 2.0]), ""),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.2]), "1 of 2 numbers differ"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "1 of 2 numbers differ"),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("inf")]), ""),
        (torch.zeros(4), torch.ones(4), "4 of 4 numbers differ"),
    ],
)
def test_results_are_compared(got, expected, problem):
    assert problem in local.difference(got, expected)
    assert bool(problem) == bool(local.difference(got, expected))


# -- operators -------------------------------------------------------------------------------------------------------------


def force(monkeypatch, choose):
    """Let the race think that one candidate of each bucket takes no time; the kernels run nevertheless."""
    real = local.ChildBench.turn

    def turn(self, plan, m, like):
        taken = real(self, plan, m, like)
        return [1e-9] if tiling_of(plan) == choose(m) else [max(seconds, 1e-6) for seconds in taken]

    monkeypatch.setattr(local.ChildBench, "turn", turn)


def offered(config):
    plan = plan_matmul(config, host_target())
    problems = {m: Problem(plan.config, plan.layout, plan.target, m) for m in config.buckets}
    return {m: select_rule(RULES, problem).tilings(problem) for m, problem in problems.items()}


def test_a_choice_is_used_stored_reused_and_travels(store, monkeypatch, tmp_path):
    config = small(N=128, group_size=32, with_scaling=True)
    op = Matmul(config, enable_tuning=False)
    before = op.plan
    assert op.tuning_record is None
    tilings = offered(config)
    force(monkeypatch, lambda m: tilings[m][1])
    found = op.hardware_aware_finetune(topk=20, seconds=300)
    monkeypatch.setattr("bitblas.tuner.runs.tune_here", None)  # nothing measures from here on
    assert {m: row["tiling"] for m, row in found.items()} == {m: row[1].fields() for m, row in tilings.items()}
    assert {m: len(row["candidates"]) for m, row in found.items()} == {m: len(row) for m, row in tilings.items()}
    assert all(row["gain"] > 1 and row["lost"] == [] for row in found.values())
    assert op.plan.tilings == {m: row[1] for m, row in tilings.items()} != before.tilings
    problem = reference.draw(config, 16)
    reference.assert_close(op(problem.A, op.transform_weight(problem.weights), problem.scale), problem)
    for other in (Matmul(config), pickle.loads(pickle.dumps(op))):
        assert other.plan == op.plan
        assert other.tuning_record == op.tuning_record
    assert Matmul(config, enable_tuning=False).plan == before
    assert {"versions", "machine", "date", "buckets"} <= set(op.tuning_record)

    from bitblas.cache import OperatorCache

    saved = OperatorCache()
    saved.add(config, op)
    saved.save_into_database(tmp_path / "db")
    loaded = OperatorCache()
    loaded.load_from_database(tmp_path / "db")
    assert loaded.get(config).plan == op.plan
    assert loaded.get(config).tuning_record == op.tuning_record


def test_without_a_compiler_candidates_run_here(store, monkeypatch, caplog):
    monkeypatch.setattr(local, "find_compiler", lambda target=None: None)
    with caplog.at_level(logging.WARNING, "bitblas"):
        found = Matmul(small(M=[2])).hardware_aware_finetune(topk=2, seconds=300)
    assert len(found[2]["candidates"]) == 2
    assert "are built and run in this process" in caplog.text


def test_one_builder_or_as_many_as_there_are_cores(monkeypatch):
    counts = []
    monkeypatch.setattr(local, "Children", lambda count: counts.append(count) or children.Children(0))
    for parallel in (True, False):
        with local.building(parallel):
            pass
    assert counts == [local.num_builders(), 1]
    assert 1 <= local.num_builders() <= (os.cpu_count() or 1)


def test_nothing_is_left_behind(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    places = []
    with local.building(False) as found:
        places.append(found._directory)
        assert places[0].is_dir()
    assert not places[0].exists()


INTERRUPTED = """
import json, os, signal, threading, logging
import bitblas
from bitblas import tuner
from bitblas.tuner import local

op = bitblas.Matmul(bitblas.MatmulConfig(M=[1, 16, 32], N=64, K=64, W_dtype="uint4"), enable_tuning=False)
real, turns = local.ChildBench.turn, []
def turn(self, plan, m, like):
    turns.append(m)
    if {when}:
        os.killpg(os.getpgrp(), signal.SIGINT)
    return real(self, plan, m, like)
local.ChildBench.turn = turn
try:
    found = op.hardware_aware_finetune(topk=3, seconds=300)
    ended = "found"
except KeyboardInterrupt:
    found, ended = {{}}, "interrupted"
stored = bitblas.Matmul(op.config).tuning_record
left = [line for line in os.popen(f"ps --ppid {{os.getpid()}} -o args=").read().splitlines() if "popen_worker" in line]
print(json.dumps([ended, sorted(found), stored and sorted(map(int, stored["buckets"])), left]))
"""


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("len(turns) == 1", ["interrupted", [], None, []]),
        ("len(turns) == 2", ["found", [1], [1], []]),
        ("m == 16 and turns.count(16) == 2", ["found", [1, 16], [1, 16], []]),
    ],
)
def test_an_interrupt_keeps_the_best_so_far(when, expected, store):
    """Ctrl-C reaches the whole group of processes, as it does from a terminal."""
    # whoever is started in the background ignores the signal, and so would we
    script = "import os, signal\nos.setsid()\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += INTERRUPTED.format(when=when)
    result, errors = finish(start(script, BITBLAS_CACHE_DIR=store))
    assert result == expected
    warned = any("tuning ended early, it was interrupted: tuned for m = 1" in line for line in errors)
    assert warned == (expected[0] == "found")


# -- the pass --------------------------------------------------------------------------------------------------------------


def test_the_pass_takes_the_fastest_that_is_not_lost():
    import tvm

    from bitblas.build import expression_module
    from bitblas.transform import PROBLEM_ATTR, ApplyDefaultSchedule, ApplyFastTuning

    config, target = small(M=[1, 16], N=128), host_target()
    plan, seen = plan_matmul(config, target), []

    def measure(mod, problem):
        (func,) = (func for _, func in mod.functions_items())
        facts = json.loads(str(func.attrs[PROBLEM_ATTR]))
        seen.append((problem.m, facts["tiling"]))
        if len(seen) in (1, 3):
            raise BuildError("no luck")
        return 1.0 / len(seen)

    before = expression_module(plan)
    after = ApplyFastTuning(RULES, measure, topk=4, target=target)(before)
    chosen = {
        json.loads(str(func.attrs[PROBLEM_ATTR]))["m"]: json.loads(str(func.attrs[PROBLEM_ATTR]))["tiling"]
        for _, func in after.functions_items()
    }
    for m in (1, 16):
        tried = [tiling for row, tiling in seen if row == m]
        assert len(tried) == 4
        assert tried[0] == plan.tilings[m].fields()
        assert chosen[m] == tried[-1]  # the later the faster
    tuned = {m: next(t for t in offered(config)[m] if t.fields() == tiling) for m, tiling in chosen.items()}
    expected = ApplyDefaultSchedule(RULES, target)(expression_module(plan_matmul(config, target, tuned)))
    tvm.ir.assert_structural_equal(after, expected)

    def never(mod, problem):
        raise BuildError("no luck at all")

    with pytest.raises(RuntimeError, match=r"none of 2 tilings of matmul_\d could be measured(.|\n)*no luck at all"):
        ApplyFastTuning(RULES, never, topk=2, target=target)(before)


def test_the_pass_measures_for_real():
    from bitblas.build import compile_module, expression_module
    from bitblas.transform import ApplyFastTuning

    config = small(M=[16], N=64)
    plan = plan_matmul(config, host_target())
    tuned = ApplyFastTuning(RULES, tuner.measure_module, topk=2)(expression_module(plan))
    problem = reference.draw(config, 16)
    op = Matmul(config)
    kernels = Kernels(compile_module(tuned, plan.target).jit(), [(16, "matmul_0", 16)])
    out = torch.empty(16, 64, dtype=torch.float16)
    kernels.launch(16, [problem.A, op.transform_weight(problem.weights).view(-1)], out)
    reference.assert_close(out, problem)


# -- the command -----------------------------------------------------------------------------------------------------------


def test_the_command(store, tmp_path, capsys):
    out = tmp_path / "record.json"
    arguments = [
        "tune",
        "--N",
        "64",
        "--K",
        "64",
        "--M",
        "1",
        "16",
        "--zeros",
        "original",
        "--topk",
        "2",
        "--seconds",
        "300",
    ]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    record = json.loads(out.read_text())
    assert set(record["buckets"]) == {"1", "16"}
    lines = [line.split() for line in printed.out.splitlines()]
    assert ["M", "default", "us", "tuned", "us", "times", "as", "fast", "tried", "lost", "tiling"] in lines
    for m in ("1", "16"):
        (row,) = (line for line in lines if line[:1] == [m])
        default, chosen, gain = (float(text) for text in row[1:4])
        assert default > 0
        assert chosen > 0
        assert gain >= 1
        assert row[4:6] == ["2", "0"]
    (path,) = store.glob("tuning/*.json")
    assert f"kept in {path}" in printed.out
    config = MatmulConfig(**record["config"])
    assert Matmul(config).tuning_record == record


def test_an_interrupted_command_prints_what_it_has(store, monkeypatch, capsys):
    real, turns = local.ChildBench.turn, []

    def turn(self, plan, m, like):
        turns.append(m)
        if m == 16:
            raise KeyboardInterrupt
        return real(self, plan, m, like)

    monkeypatch.setattr(local.ChildBench, "turn", turn)
    assert cli.main(["tune", "--N", "64", "--K", "64", "--M", "1", "16", "--topk", "1", "--seconds", "300"]) == 130
    printed = capsys.readouterr()
    assert "not reached" in printed.out
    monkeypatch.setattr(local.ChildBench, "turn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["tune", "--N", "64", "--K", "64", "--M", "1", "--topk", "1"]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--W-dtype", "uint9"], "W_dtype is 'uint9', which is no format"),
        (["--target", "potato"], "target is 'potato'"),
        (["--target", "neoverse-n1"], "cannot run on this machine"),
        (["--rpc", "127.0.0.1:9190"], "--rpc and --key go together"),
        (["--key", "k"], "--rpc and --key go together"),
        (["--rpc", "nowhere", "--key", "k"], "the tracker is 'nowhere'; it must be of the form host:port"),
        (["--rpc", "127.0.0.1:1", "--key", "k"], "the tracker 127.0.0.1:1 cannot be reached"),
        (["--rpc", "127.0.0.1:1", "--key", "k", "--threads", "2"], "--threads is of this machine"),
        (["--out", "/nonexistent/directory/record.json"], "is no directory"),
    ],
)
def test_impossible_requests_are_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(["tune", "--N", "64", "--K", "64", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.startswith("bitblas: error: ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--topk", "0"], ["--seconds", "0"], ["--seconds", "-1"], ["--M", "x"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["tune", *arguments])
    assert left.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err
