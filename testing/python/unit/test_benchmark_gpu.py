"""benchmark/gpu, without a card: cases, verdicts, turns, reports, and what a kernel that fails leaves behind."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from benchmark.cases import Filter
from benchmark.gpu import cases, costs, goals, peers, run
from benchmark.gpu.report import CardReport, speedups

from bitblas import ArgumentError, Matmul, MatmulConfig, cards
from bitblas.bench import Candidate, Comparison, Skipped, Timing, Verdict, card, draw_workload
from bitblas.measuring import CPU

MACHINE = card.CardMachine("NVIDIA H200", "9.0", "580.1", "13.0", 132, 60 << 20, 141 << 30, 4.3e12, {"float16": 4e14})
W4 = "float16 x int4 g128"


class FakeStopwatch:
    """Batches run when they are told to, and take the seconds of their candidate."""

    def __init__(self, seconds=lambda call: 5e-3):  # so long that a batch is of few launches
        self.seconds, self.log, self.captured = seconds, [], []

    def once(self, call):
        call(0)
        return self.seconds(call)

    def prepare(self, call, count, captured=True):
        result = []
        self.captured.append(captured)

        def work():
            self.log.append(call)
            for index in range(count):
                result[:] = [call(index)]
            return count * self.seconds(call)

        return cards.Batch(work, count, result)


def ticking(step=0.01):
    now = [0.0]

    def clock():
        now[0] += step
        return now[0]

    return clock


# -- cases -----------------------------------------------------------------------------------------------------------------


def test_goals_come_first_and_every_cell_once():
    found = cases.full()
    assert [each.name for each in found[:3]] == [W4] * 3
    assert [each.shape for each in found[:3]] == list(cases.SQUARES)
    cells = [(each.name, *each.shape, m) for each in found for m in each.rows]
    assert len(cells) == len(set(cells))
    assert all(set(cases.GOAL_ROWS) <= set(each.rows) for each in found[:3])
    assert sorted(found[0].rows) == sorted(cases.ROWS)
    names = {each.name for each in found}
    assert {W4, "float16 x uint4 g128 + zeros", "float16 x uint2 g128", "int8 x int2", "int8 x int4"} <= names
    assert {"float16 x nf4 g128", "float16 x uint3 g128", "float8_e4m3 x float8_e4m3", "int8 x int8"} <= names
    assert {each.shape for each in found if each.name == W4} == {*cases.SQUARES, *cases.SHAPES}


@pytest.mark.parametrize("rule", goals.RULES, ids=lambda rule: f"{rule.group}-{rule.shapes[0][0]}")
def test_the_short_run_has_a_cell_for_each_rule(rule):
    found = [(each.name, each.shape, m) for each in cases.goal_cases() for m in each.rows]
    for shape in rule.shapes:
        assert any(rule.applies(name, at, m) for name, at, m in found if at == shape)


def test_each_dtype_has_its_peers():
    def named(found):
        session = run.CardSession(CardReport(MACHINE, {}), PLACE, 0.1, None, 1e9, "")
        return list(session.peers_of(found))

    shape = cases.HEADLINE
    assert named(cases.goal_cases()[0]) == [cases.FP16, cases.INT4PACK, cases.GEMLITE, cases.DENSE_CACHE]
    assert named(cases.card_case("bfloat16", "uint4", shape, (1,), "quantized")) == [cases.BF16, cases.INT4PACK]
    assert named(cases.card_case("int8", "int2", shape, (1,))) == [cases.FP16, cases.INT_MM]
    assert named(cases.card_case("float8_e4m3", "float8_e4m3", shape, (1,))) == [cases.FP16, cases.SCALED_MM]


def test_options_choose_cells():
    options = run._parser().parse_args(["--rows", "1,16", "--shapes", "4096x4096", "--match", "int8", "--quick"])
    assert [(each.name, each.rows) for each in run.chosen(options)] == [("int8 x int2", (1, 16)), ("int8 x int4", (1,))]
    assert run.main(["--list", "--goals"]) == 0
    assert run.main(["--resume"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so(capsys):
    assert run.main(["--quick"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


# -- goals -----------------------------------------------------------------------------------------------------------------


def cell(m, speed, name=W4, shape=(4096, 4096), **others):
    times = {"bitblas": 1e-4, "torch float16": speed * 1e-4, **others}
    timings = tuple(Timing(who, "float16", True, t, t, 9, 0.0) for who, t in times.items())
    work = {"N": shape[0], "K": shape[1], "A_dtype": name.split()[0], "m": m}
    size = shape[0] * shape[1]
    return name, Comparison(work, m, m * size, size // 2, 0, timings, ceilings={"bandwidth": 4e12}, unit="float16")


@pytest.mark.parametrize(
    ("m", "shape", "limit", "name"),
    [
        (1, (4096, 4096), 2.4, W4),
        (1, (16384, 16384), 2.6, W4),
        (16, (4096, 4096), 2.28, W4),
        (16, (16384, 16384), 2.47, W4),
        (32, (8192, 8192), 2.0, W4),
        (32, (16384, 16384), 2.0, W4),
        (128, (4096, 4096), 0.97, W4),
        (256, (8192, 8192), 0.85, W4),
        (1024, (16384, 16384), 0.85, "float16 x uint4 g128 + zeros"),
        (4096, (4096, 4096), 0.94, W4),
        (1, (16384, 16384), 6.0, "int8 x int2"),
    ],
)
def test_each_goal_is_reached_just_so(m, shape, limit, name):
    for speed, passed in ((limit * 1.001, True), (limit * 0.999, False)):
        first, *_ = goals.judge([cell(m, speed, name, shape)])
        assert first.passed is passed, first


def test_no_goal_speaks_of_other_cells():
    assert not list(goals.judge([cell(32, 1.0), cell(64, 0.1), cell(1, 1.0, "float16 x nf4 g128"), cell(2048, 0.1)]))


def test_the_dense_cache_is_judged_by_its_own_time():
    both = {"bitblas, dense cache": 1e-4 / 0.98}
    found = {goal.group: goal.passed for goal in goals.judge([cell(4096, 0.95, **both)])}
    assert found == {"W4A16, M=4096": True, "W4A16, M=4096, dense_cache": False}
    found = {goal.group: goal.passed for goal in goals.judge([cell(4096, 0.95)])}
    assert found["W4A16, M=4096, dense_cache"] is None


def test_a_wrong_result_fails():
    name, row = cell(1, 3.0)
    wrong = replace(row, timings=(replace(row.timings[0], seconds=None), *row.timings[1:]))
    assert [goal.passed for goal in goals.judge([(name, wrong)])] == [False]


# -- turns -----------------------------------------------------------------------------------------------------------------


def candidate(name, result=lambda index: index, copies=1, right=lambda out: True):
    return Candidate(name, result, lambda out: Verdict(0.0, right(out)), "float16", copies=copies)


def test_candidates_take_turns_and_medians_count():
    a, b = candidate("a", lambda index: index, copies=3), candidate("b", lambda index: -index)
    watch = FakeStopwatch(lambda call: 2e-3 if call is a.call else 1e-3)
    found = card.turns_on_card([a, b], watch, 0.2, ticking())
    assert [(each.name, each.seconds, each.fastest) for each in found] == [("a", 2e-3, 2e-3), ("b", 1e-3, 1e-3)]
    order = ["a" if call is a.call else "b" for call in watch.log]
    turns = "".join(order).replace("a" * card.TURN_BATCHES, "A").replace("b" * card.TURN_BATCHES, "B")
    assert turns.startswith("ABAB")
    assert found[0].calls >= card.MIN_BATCHES


def test_what_is_wrong_first_or_last_has_no_time():
    looks = []

    def spoiled(out):
        looks.append(out)
        return len(looks) == 1

    found = card.turns_on_card(
        [candidate("right"), candidate("wrong", right=lambda out: False), candidate("spoiled", right=spoiled)],
        FakeStopwatch(),
        0.05,
        ticking(),
    )
    assert [each.seconds is None for each in found] == [False, True, True]
    assert found[1].calls == 0


def test_a_peer_that_raises_is_skipped_and_ours_is_not():
    def fail(index):
        raise RuntimeError("no kernel for this shape\nat line 3")

    found = card.turns_on_card([candidate("ours"), candidate("peer", fail)], FakeStopwatch(), 0.05, ticking())
    assert found[1] == Skipped("peer", "this torch or this card cannot: no kernel for this shape")
    with pytest.raises(RuntimeError, match="no kernel"):
        card.turns_on_card([candidate("ours", fail)], FakeStopwatch(), 0.05, ticking())


@pytest.fixture(scope="module")
def operator():
    return Matmul(MatmulConfig(M=(1, 32), N=64, K=128, W_dtype="int4", **SCALED), target="llvm")


SCALED = {"A_dtype": "float16", "accum_dtype": "float32", "with_scaling": True, "group_size": 128}


@pytest.mark.parametrize("m", [1, 32])
def test_a_cell_is_checked_and_timed(operator, m):
    named = list(peers.card_peers(1 << 20, None).values())
    row = card.compare_on_card(operator, m, named, FakeStopwatch(), MACHINE, CPU, 0.01)
    assert [each.name for each in row.timings] == ["bitblas", cases.FP16, cases.BF16]
    assert all(each.seconds == 5e-3 for each in row.timings)
    assert (row.macs, row.unit, row.weight_bytes) == (m * 64 * 128, "float16", 64 * 64)
    assert row.ceilings == {"bandwidth": 4.3e12, "float16": 4e14}
    assert row.speedup(cases.FP16) == 1.0
    reasons = {each.name: each for each in row.skipped}
    assert set(reasons) == {cases.INT4PACK, cases.GEMLITE, cases.INT_MM, cases.SCALED_MM, cases.DENSE_CACHE}
    assert reasons[cases.GEMLITE].missing
    assert Comparison.parse(json.loads(json.dumps(row.fields()))) == row


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({"A_dtype": "int8", "W_dtype": "int2", "out_dtype": "int32", "accum_dtype": "int32"}, cases.INT_MM),
        ({"A_dtype": "float8_e4m3", "W_dtype": "float8_e4m3", "out_dtype": "float16"}, cases.SCALED_MM),
    ],
)
def test_peers_of_eight_bits(fields, own):
    op = Matmul(MatmulConfig(M=32, N=64, K=512, **{"accum_dtype": "float32", **fields}), target="llvm")
    named = [peers.card_peers(1 << 20)[name] for name in (cases.FP16, own)]
    row = card.compare_on_card(op, 32, named, FakeStopwatch(), MACHINE, CPU, 0.01)
    assert [each.name for each in row.timings] == ["bitblas", cases.FP16, own]
    assert all(each.seconds for each in row.timings), row.timings


def test_what_an_operator_keeps_is_not_timed_in_a_graph(operator):
    watch = FakeStopwatch()
    kept = peers.dense_cache(1 << 20, lambda workload: operator)
    work = draw_workload(operator.config, 1024)
    made = kept(work, 1 << 20)
    found = card.turns_on_card([candidate("ours"), made], watch, 0.01, ticking())
    assert watch.captured == [True, False]
    assert found[1].name == cases.DENSE_CACHE
    assert found[1].seconds == 5e-3
    assert isinstance(kept(draw_workload(operator.config, 16), 1 << 20), Skipped)


def test_the_bound_allows_rounded_weights_where_they_are_decoded_to_sixteen_bits():
    work = draw_workload(MatmulConfig(M=1, N=64, K=128, W_dtype="int4", **{**SCALED, "out_dtype": "float32"}), 1)
    rounded = work.a.double() @ work.dense(torch.float16).double().T
    assert not work.check(rounded.float()).right
    assert replace(work, decoded="float16").check(rounded.float()).right
    assert not replace(work, decoded="float16").check((rounded * 1.05).float()).right


def test_what_a_card_does_at_best(monkeypatch):
    facts = {"name": "N", "capability": "9.0", "sms": 1, "l2_bytes": 1, "memory_bytes": 1 << 24, "cuda": "13"}
    monkeypatch.setattr(card, "describe_card", lambda device: facts)
    watch = FakeStopwatch(lambda call: 1e-3)
    found = card.measure_card(watch, CPU, "580", side=32)
    assert found.driver == "580"
    assert found.bandwidth == pytest.approx(2 * (1 << 21) / 1e-3)
    assert found.peaks["float16"] == pytest.approx(32**3 / 1e-3)
    assert set(found.peaks) | {note.split()[3].rstrip(":") for note in found.notes} == {
        *("float16", "bfloat16", "float32", "int8", "float8_e4m3")
    }


# -- runs ------------------------------------------------------------------------------------------------------------------

PLACE = run.Place(target=None, device=CPU, stopwatch=FakeStopwatch(), machine=MACHINE)


@pytest.fixture
def session(tmp_path, monkeypatch, operator):
    report = CardReport(MACHINE, {"bitblas": "1"}, "2026-11-21")
    found = run.CardSession(report, PLACE, 0.01, tmp_path, 1e18, "")
    monkeypatch.setattr(found, "operator", lambda case: operator)
    monkeypatch.setattr(found, "synchronize", lambda: None)
    return found


CASE = cases.card_case("float16", "int4", (64, 128), (1, 32))


def test_a_run_is_kept_and_goes_on(session, tmp_path):
    session.measure([replace(CASE, rows=(1,))])
    other = CardReport(MACHINE, {"bitblas": "1"}, "2026-11-22")
    assert other.resume(tmp_path) == "1 cells are in {} already".format(tmp_path / "gpu.json")
    assert other.has((CASE.name, 64, 128, 1), session.peers_of(CASE))
    assert not other.has((CASE.name, 64, 128, 32), session.peers_of(CASE))
    changed = CardReport(replace(MACHINE, driver="600"), {"bitblas": "1"})
    assert "is of other driver" in changed.resume(tmp_path)


def test_a_kernel_that_fails_is_a_cell_without_a_time(session, monkeypatch, capsys):
    def fail(op, m, *_):
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(run, "compare_on_card", fail)
    session.measure([CASE])
    assert [row.ours.seconds for _, row in session.report.results] == [None, None]
    assert "FAILED float16 x int4 64 x 128 M=1: CUDA error: invalid argument" in capsys.readouterr().err


def test_a_lost_card_ends_the_run_with_what_there_is(session, monkeypatch, tmp_path):
    def fail(op, m, *_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "compare_on_card", fail)
    monkeypatch.setattr(session, "synchronize", lambda: fail(None, 0))
    with pytest.raises(run.CardLostError, match="illegal memory access"):
        session.measure([CASE])
    kept = CardReport(MACHINE, {"bitblas": "1"})
    kept.resume(tmp_path)
    ((name, row),) = kept.results
    assert (name, row.m, row.ours.seconds) == (CASE.name, 1, None)
    assert kept.has((CASE.name, 64, 128, 1), {})


def test_a_whole_run_on_a_card_that_is_made_up(monkeypatch, tmp_path, capsys, operator):
    monkeypatch.setattr(run, "resolve_target", lambda text: operator.target)
    monkeypatch.setattr(run, "device_of", lambda target: CPU)
    monkeypatch.setattr(run, "CardClock", lambda device: FakeStopwatch())
    monkeypatch.setattr(run, "measure_card", lambda *_: MACHINE)
    monkeypatch.setattr(run, "driver_version", lambda: "580.1")
    monkeypatch.setattr(run, "versions", lambda target: {"bitblas": "1"})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(cases, "goal_cases", lambda: [CASE, cases.card_case("int8", "int2", (64, 128), (32,))])
    monkeypatch.setattr(costs, "cost_goals", lambda: [costs.at_most("a call", "µs", 1e-5, lambda: 9e-6, 1e6)])
    arguments = ["--goals", "--seconds", "0.001", "--out", str(tmp_path / "out")]
    assert run.main([*arguments, "--rows", "1"]) == 0
    assert run.main([*arguments, "--resume"]) == 0
    printed = capsys.readouterr()
    assert "1 cells are in" in printed.err
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(row["case"], row["workload"]["m"]) for row in found["results"]] == [(W4, 1), (W4, 32), ("int8 x int2", 32)]
    assert found["machine"]["name"] == "NVIDIA H200"
    assert [goal["name"] for goal in found["goals"]] == ["a call"]
    assert "| float16 x int4 g128 | 64 × 128 | 1.00 | 1.00 |" in (tmp_path / "out" / "gpu.md").read_text()


def test_the_command_for_one_shape(monkeypatch, capsys, operator):
    from bitblas.cli import bench

    monkeypatch.setattr(cards, "device_of", lambda target: CPU)
    monkeypatch.setattr(cards, "CardClock", lambda device: FakeStopwatch())
    monkeypatch.setattr(card, "measure_card", lambda *_: MACHINE)
    options = argparse.Namespace(threads=None, M=[1, 32], seconds=0.001, json=False)
    assert bench._run_on_card(options, operator) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "NVIDIA H200, compute capability 9.0, CUDA 13.0" in lines
    assert "measured: 4300 GB/s copied, 800 TFLOP/s of float16" in lines
    assert lines[-3].split() == ["M", "bitblas", "us", "of", "what", "binds", "torch", "float16", "us", "times", "ours"]
    assert [line.split()[:2] for line in lines[-2:]] == [["1", "5000.0"], ["32", "5000.0"]]
    options.json = True
    assert bench._run_on_card(options, operator) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["name"] == "NVIDIA H200"
    options.threads = 2
    with pytest.raises(ArgumentError, match="--threads is of CPUs"):
        bench._run_on_card(options, operator)


def test_the_tables():
    report = CardReport(MACHINE, {"torch": "2.13"}, "2026-11-21")
    for m, speed in ((1, 2.5), (16, 2.0)):
        report.add(*cell(m, speed))
    report.add(*cell(1, 6.1, "int8 x int2", (16384, 16384)))
    report.costs += [costs.at_most("the host's part of a call", "µs", 10e-6, lambda: 8e-6, 1e6)]
    text = report.markdown()
    assert "2026-11-21, NVIDIA H200 (compute capability 9.0, 132 multiprocessors)" in text
    assert "4300 GB/s copied, 800 TFLOP/s of float16" in text
    assert "| W4A16, M=1 | ≥ 2.4× torch float16 | pass |" in text
    assert "| W4A16, M=16 | ≥ 2.28× torch float16 | **fail** |" in text
    assert "| the host's part of a call | ≤ 10 µs | pass | 8 µs |" in text
    table = speedups(report.results).splitlines()
    assert table[0] == "|  | N × K | M=1 | M=16 |"
    assert table[2:] == [
        "| float16 x int4 g128 | 4096 × 4096 | 2.50 | 2.00 |",
        "| int8 x int2 | 16384 × 16384 | 6.10 | – |",
    ]


def test_operators_are_built_ahead_and_a_failure_is_said(monkeypatch, capsys):
    class Pool:
        def __init__(self, jobs, context):
            assert jobs == 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, function, *arguments):
            value = function(*arguments)
            return type("Future", (), {"result": lambda self, timeout: value})()

    monkeypatch.setattr(run, "ProcessPoolExecutor", Pool)
    good = MatmulConfig(M=1, N=16, K=16, W_dtype="int4")
    bad = MatmulConfig(M=1, N=1 << 27, K=16, W_dtype="int4")
    problems = run.build_ahead([good, bad, good], "llvm", 2, 1e18)
    assert len(problems) == 1
    assert problems[0].startswith("float16 x int4 134217728 x 16: N = 134217728")
    assert Filter(rows=(1,)).apply(cases.quick())
