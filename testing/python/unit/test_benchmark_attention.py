"""python -m benchmark.attention: its cells, references and verdicts, its tables from made-up cells, its measure of memory."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from benchmark import attention, attention_cells, attention_memory, matmul, plots
from benchmark.attention_cells import OURS, PEERS, SDPA, Place, make_case

from bitblas.bench import Comparison, Machine, Skipped, Timing
from bitblas.bench.card import CardMachine
from bitblas.cards import Batch
from bitblas.errors import BitBLASError
from documents import ROOT

MACHINE = Machine("cpu", "isa", 2, 32 << 20)
CARD = CardMachine("card", "9.0", "1", "13.0", 132, 50 << 20, 1 << 34, 4e12, {"float16": 4e14})
VERSIONS = {"python": "3", "kernels": "abc"}


def cell(case, seconds, skipped=(), error=1e-6):
    """A fabricated cell: seconds of ours and torch's, None for a wrong result; one number is torch's alone, ours 1 ms."""
    ours, torchs = seconds if isinstance(seconds, tuple) else (1e-3, seconds)
    timings = [Timing(OURS, "fma", True, ours, ours, 9, error if ours else 2.0)]
    timings += [] if torchs is None else [Timing(SDPA, "x", True, torchs, torchs, 9, 2e-6)]
    config = case.config
    work = {**config.fields(), "m": config.seq_len}
    macs = attention_cells.macs_of(config)
    return case.name, Comparison(
        work, config.seq_len, macs, 1000, 2, tuple(timings), tuple(skipped), ceilings={"fma": 1e11}
    )


def options(*given):
    return attention._parser().parse_args(given)


# -- cells -----------------------------------------------------------------------------------------------------------------


def test_the_goal_speaks_of_the_cells_of_the_issue():
    found = {(case.name, *case.shape, *case.rows) for case in attention.goal_cells("cpu")}
    assert found == {
        (dtype + causal, 1, 8, 8, length, dim, length)
        for dtype in ("float32", "bfloat16")
        for causal in ("", ", causal")
        for length in (128, 256, 512, 1024, 2048, 4096)
        for dim in (64, 128)
    }
    on_cards = {(case.config.Q_dtype, case.rows[0]) for case in attention.goal_cells("cuda")}
    assert on_cards == {(dtype, length) for dtype in ("float16", "bfloat16") for length in (1024, 2048, 4096)}


def test_a_run_measures_the_goals_and_calls_of_few_queries():
    for device in ("cpu", "cuda"):
        found = attention.chosen(options("--device", device))
        assert len(set(found)) == len(found)
        assert set(attention.goal_cells(device)) < set(found)
    few = [case for case in attention.chosen(options()) if case.rows[0] != case.config.seq_len_kv]
    assert {(case.rows[0], case.config.seq_len_kv, case.config.heads, case.config.heads_kv) for case in few} == {
        (1, 4096, 8, 8),
        (16, 4096, 8, 8),
        (1, 4096, 32, 8),
        (16, 4096, 32, 8),
    }
    assert not any(case.config.is_causal for case in few)
    lengths = [case.rows[0] for case in attention.chosen(options("--no-few-queries"))]
    assert lengths == sorted(lengths)  # what takes long comes last


def test_options_choose_cells():
    given = ("--dtypes", "float16", "--lengths", "7", "--dims", "16,24", "--heads", "4", "--heads-kv", "2")
    found = attention.chosen(options(*given, "--no-few-queries"))
    shapes = {(case.name, case.shape, case.rows) for case in found}
    assert shapes == {(f"float16{causal}", (1, 4, 2, 7, dim), (7,)) for causal in ("", ", causal") for dim in (16, 24)}
    assert {case.rows[0] for case in attention.chosen(options("--quick", "--no-few-queries"))} == {128, 1024}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3)])
def test_masked_pairs_are_no_work(queries, keys, causal):
    config = make_case("float32", causal, queries, 8, 2, 1, keys).config
    seen = sum(not causal or j <= i + keys - queries for i in range(queries) for j in range(keys))
    assert attention_cells.macs_of(config) == 2 * seen * (8 + 8)


# -- references ------------------------------------------------------------------------------------------------------------


def by_definition(work):
    """The output, one query of one head after another."""
    config, out = work.config, torch.zeros(work.output_shape, dtype=torch.float64)
    keys, queries = config.seq_len_kv, config.seq_len
    for b in range(config.batch):
        for h in range(config.heads):
            head = h // (config.heads // config.heads_kv)
            for i in range(queries):
                seen = min(keys, i + keys - queries + 1) if config.is_causal else keys
                if seen > 0:
                    k, v = (t[b, :seen, head].double() for t in (work.k, work.v))
                    scores = [float(work.q[b, i, h].double() @ k[j]) / math.sqrt(config.dim) for j in range(seen)]
                    weights = [math.exp(score - max(scores)) for score in scores]
                    out[b, i, h] = sum(w / sum(weights) * v[j] for j, w in enumerate(weights))
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "heads", "heads_kv"), [(6, 6, 2, 2), (3, 8, 4, 2), (5, 2, 2, 1)])
def test_the_reference(queries, keys, heads, heads_kv, causal):
    work = attention_cells.draw_attention(make_case("float32", causal, queries, 8, heads, heads_kv, keys).config)
    exact = by_definition(work)
    verdict = work.check(exact)
    assert verdict.right
    assert verdict.error < 1e-13
    assert work.check(exact.float()).right
    shifted = work.check(exact.roll(1, 2 if heads_kv > 1 else 1))
    assert not shifted.right
    worse = exact.clone()
    worse[0, queries - 1, heads - 1, 7] += 1e-3
    assert 1e-4 < work.check(worse).error < 1e-1
    assert not work.check(worse).right
    assert not work.check(exact[:, :-1]).right
    worse[0, queries - 1, 0, 0] = float("nan")
    assert not work.check(worse).right


def test_of_many_queries_some_of_each_part_are_checked():
    work = attention_cells.draw_attention(make_case("float32", True, 640, 8, 1).config)
    picked = work.checked.tolist()
    assert len(picked) == len(set(picked)) <= attention_cells.CHECKED + 2
    assert {0, 639} <= set(picked)
    assert {i // 10 for i in picked} == set(range(64))
    few = attention_cells.draw_attention(make_case("float32", True, 63, 8, 1).config)
    assert few.checked.tolist() == list(range(63))
    # what is not finite is seen wherever it is
    out = torch.nn.functional.scaled_dot_product_attention(
        *(attention_cells.native(t) for t in (work.q, work.k, work.v)), is_causal=True
    ).transpose(1, 2)
    assert work.check(out).right
    unseen = next(i for i in range(640) if i not in picked)
    out[0, unseen, 0, 0] = float("inf")
    assert not work.check(out).right


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_peers_compute_what_they_are_asked(name, dtype, causal, heads):
    def made(work):
        found = PEERS[name](work, None)
        if isinstance(found, Skipped):
            pytest.skip(f"{found.name} {found.reason}")
        return found

    work = attention_cells.draw_attention(make_case(dtype, causal, 70, 16, heads, 2).config)
    candidate = made(work)
    assert candidate.name == name
    verdict = candidate.check(candidate.call(0))
    assert verdict.right, verdict
    other = dataclasses.replace(work, q=work.q.flip(-1))
    assert not candidate.check(made(other).call(0)).right


def test_torch_aligns_a_causal_mask_otherwise():
    work = attention_cells.draw_attention(make_case("float32", True, 3, 8, 1, 1, 5).config)
    assert PEERS[SDPA](work, None) == Skipped(SDPA, "aligns a causal mask at the first key")


def test_keys_come_from_memory_where_queries_are_few():
    def copies(queries, heads, heads_kv, cache):
        config = make_case("float32", False, queries, 8, heads, heads_kv, 64).config
        return attention_cells.draw_attention(config).copies(cache)

    cache = 1 << 25  # of K and V of one head, 4096 bytes, four times as much is 32768 copies
    assert copies(1, 1, 1, cache) == 1024  # the most that there are
    assert copies(63, 1, 1, cache) == 1024
    assert copies(64, 1, 1, cache) == copies(16, 4, 1, cache) == 1
    work = attention_cells.draw_attention(make_case("float32", False, 1, 8, 1, 1, 4096).config)
    for peer in PEERS.values():
        found = peer(work, cache)
        assert isinstance(found, Skipped) or found.copies == work.copies(cache) == 512


# -- measuring -------------------------------------------------------------------------------------------------------------


class FakeOp:
    """An operator that computes by the definition, or something else."""

    def __init__(self, case, kind="cpu", dot="bf16", factor=1.0):
        self.config, self.factor = case.config, factor
        self.target = SimpleNamespace(kind=kind)
        self.plan = SimpleNamespace(kernels=[SimpleNamespace(tiling=SimpleNamespace(dot=dot))])

    def __call__(self, q, k, v):
        work = attention_cells.Attention(self.config, q, k, v, torch.arange(q.shape[1]))
        return (work.expected.permute(0, 3, 1, 2, 4).flatten(2, 3) * self.factor).to(q.dtype)


class FakeProbes:
    """Loops that do nothing."""

    def unit(self, name, threads):
        return self._ceiling(name)

    def bandwidth(self, size, threads):
        return self._ceiling("bandwidth")

    def _ceiling(self, name):
        from bitblas.bench import Ceiling

        return Ceiling(name, lambda: sum(range(1000)), 1000)


@pytest.fixture
def _hurry(monkeypatch):
    monkeypatch.setattr("bitblas.bench.timing.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(attention_cells, "read_bytes", lambda: 1 << 16)
    monkeypatch.setattr(attention_cells, "num_copies", lambda size, budget, cache: 3)


@pytest.mark.usefixtures("_hurry")
@pytest.mark.parametrize(("queries", "ceilings"), [(70, {"bf16"}), (3, {"bf16", "bandwidth"})])
def test_a_cell(queries, ceilings):
    case = make_case("bfloat16", False, queries, 8, 2, 1, 70)
    row = attention_cells.compare(FakeOp(case), [PEERS[SDPA]], 0.01, Place(FakeProbes()))
    assert [timing.name for timing in row.timings] == [OURS, SDPA]
    assert all(timing.seconds and timing.calls for timing in row.timings)
    assert set(row.ceilings) == ceilings
    assert row.roofline()[0] in ceilings
    assert (row.m, row.macs, row.threads) == (queries, 2 * queries * 70 * 16, torch.get_num_threads())
    assert row.moved == 2 * (2 * 2 * queries * 8 + 2 * 70 * 8)
    assert attention.key_of(case.name, row) == (case.name, *case.shape, *case.rows)
    assert Comparison.parse(json.loads(json.dumps(row.fields()))) == row
    plain = attention_cells.compare(FakeOp(case, dot=""), [], 0.01, Place())
    assert (plain.unit, plain.ceilings, plain.roofline()) == ("fma", {}, None)


@pytest.mark.usefixtures("_hurry")
def test_what_is_wrong_has_no_time():
    case = make_case("float32", True, 9, 8, 2)
    row = attention_cells.compare(FakeOp(case, factor=1.001), [PEERS[SDPA]], 0.01, Place())
    assert row.ours.seconds is None
    assert row.ours.error > 1e-3
    assert row.timing(SDPA).seconds


class FakeStopwatch:
    """Batches that take a millisecond for each launch."""

    def once(self, call):
        return 1e-3

    def prepare(self, call, count, captured=True):
        return Batch(lambda: count * 1e-3, count, [call(0)])


def test_a_cell_on_a_card():
    case = make_case("float16", True, 80, 8, 2)
    place = Place(None, FakeStopwatch(), CARD)
    row = attention_cells.compare(FakeOp(case, "cuda"), [PEERS[SDPA]], 0.01, place)
    assert [timing.seconds for timing in row.timings] == [1e-3, 1e-3]
    assert (row.unit, row.ceilings) == ("float16", {"bandwidth": 4e12, "float16": 4e14})


def test_a_failure_on_a_card_is_a_result_and_ends_the_run(capsys):
    case = make_case("float16", True, 80, 8, 2)
    session = attention.AttentionSession(attention.AttentionCardReport(CARD, {}), None, 0.1, None, math.inf, "")
    session.card = Place(None, FakeStopwatch(), CARD)

    class Broken(FakeOp):
        def __call__(self, q, k, v):
            raise RuntimeError("illegal address\nand more")

    row = session.compare(Broken(case, "cuda"), 80, [])
    assert (row.ours.seconds, row.m) == (None, 80)
    assert session.is_late
    assert "FAILED: illegal address; repeat" in capsys.readouterr().err


# -- goals -----------------------------------------------------------------------------------------------------------------


def verdicts(cells, device="cpu"):
    return {goal.name: goal for goal in attention.judge(cells, device)}


@pytest.mark.parametrize(
    ("device", "dtype", "length", "seconds", "passed"),
    [
        ("cpu", "float32", 128, 1.0e-3, True),
        ("cpu", "float32", 128, 0.99e-3, False),
        ("cpu", "bfloat16", 4096, (None, 1e-3), False),
        ("cpu", "bfloat16", 4096, None, None),
        ("cuda", "float16", 1024, 0.91e-3, True),
        ("cuda", "float16", 1024, 0.89e-3, False),
    ],
)
def test_verdicts(device, dtype, length, seconds, passed):
    found = verdicts([cell(make_case(dtype, True, length, 64), seconds)], device)
    assert len(found) == len(attention.goal_cells(device))
    assert found.pop(f"{dtype}, causal, (1, 8, {length}, 64)").passed is passed
    assert {(goal.passed, goal.measured) for goal in found.values()} == {(None, "not measured")}


def test_other_cells_have_no_goal():
    others = [
        make_case("float32", False, 1, 128, 8, 8, 4096),
        make_case("float32", False, 128, 64, 8, 2),
        make_case("float16", False, 128, 64),
    ]
    found = verdicts([cell(case, 1e-9) for case in others])
    assert {goal.passed for goal in found.values()} == {None}


# -- reports ---------------------------------------------------------------------------------------------------------------


def filled(kind=attention.AttentionReport, machine=MACHINE, dtype="float32"):
    found = kind(machine, dict(VERSIONS), "2026-01-01")
    found.add(*cell(make_case(dtype, False, 1, 128, 32, 8, 4096), 2e-3))
    for length in (1024, 2048, 128):
        for dim in (64, 128):
            found.add(*cell(make_case(dtype, False, length, dim), length * dim * 1e-7))
    return found


def test_markdown():
    text = filled().markdown()
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({row.count("|") for row in block}) == 1, block
    goals, beside, rows = blocks
    assert goals[2] == (
        "| beside torch | ≥ 1.0× torch SDPA | **5 of 48, 42 not measured** | 0.82× (float32, (1, 8, 128, 64)) |"
    )
    assert beside[0] == "|  | heads | dim | 128 | 1024 | 2048 |"
    assert beside[2:] == ["| float32 | 8 | 64 | 0.82 | 6.55 | 13.11 |", "| float32 | 8 | 128 | 1.64 | 13.11 | 26.21 |"]
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == [
        *(f"(1, 8, {length}, {dim})" for dim in (64, 128) for length in (128, 1024, 2048)),
        "(1, 32/8, 1 of 4096, 128)",
    ]
    # 8 · 128 · 128 · 128 multiply-accumulates, of 1e11 a second, in 1 ms; torch in 0.8192 ms
    assert rows[2] == "| (1, 8, 128, 64) | 1000 | 17% fma | 34 | 1.0e-06 | 819 (0.82) | 41 | 2.0e-06 |"


def test_what_is_wrong_or_was_skipped_is_said():
    found = attention.AttentionReport(MACHINE, dict(VERSIONS))
    found.add(*cell(make_case("float32", True, 128, 64), (None, 1e-3)))
    found.add(*cell(make_case("float32", True, 16, 64, keys=4096), None, [Skipped(SDPA, "aligns otherwise")]))
    text = found.markdown()
    assert "| (1, 8, 128, 64) | wrong | – | – | 2.0e+00 | 1000 |" in text
    assert "- float32, causal, M=128: bitblas is off by 2 and has no time" in text
    assert "- torch SDPA: aligns otherwise" in text
    assert "| (1, 8, 16 of 4096, 64) | 1000 | 67% fma | 134 | 1.0e-06 | – | – | – |" in text


def test_files_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    written = {path.name: path for path in filled().write(tmp_path)}
    assert set(written) == {"attention.json", "attention.md", "attention.png", "attention.svg"}
    assert written["attention.png"].stat().st_size > 5000
    on_card = filled(attention.AttentionCardReport, CARD, "float16").write(tmp_path / "card")
    assert {path.name for path in on_card} == {f"attention_gpu.{kind}" for kind in ("json", "md", "png", "svg")}
    text = (tmp_path / "card" / "attention_gpu.md").read_text()
    assert "| beside torch | ≥ 0.9× torch SDPA | 4 of 24, 20 not measured | 6.55× (float16, (1, 8, 1024, 64)) |" in text
    assert "card (compute capability 9.0" in text


def test_the_figure():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    drawn = attention.figure(filled().results)
    rates, speeds = drawn.axes
    assert [line.get_label() for line in rates.lines] == [
        f"{who}, dim {dim}" for dim in (64, 128) for who in (OURS, SDPA)
    ]
    assert rates.lines[0].get_xdata() == pytest.approx([128, 1024, 2048])
    assert rates.lines[0].get_ydata()[0] == pytest.approx(2 * 8 * 128**3 / 1e-3 / 1e9)
    assert speeds.lines[1].get_ydata() == pytest.approx([0.8192, 6.5536, 13.1072])
    matplotlib.pyplot.close(drawn)
    assert attention.figure(filled().results[:3]) is None


def test_a_run_is_taken_up_again(tmp_path):
    first = filled()
    first.costs.append(attention.Goal("memory", "≤ 1", "0.5", True, margin=2.0))
    first.save(tmp_path)
    second = attention.AttentionReport(MACHINE, dict(VERSIONS))
    assert second.resume(tmp_path) == f"7 cells are in {tmp_path / 'attention.json'} already"
    assert (second.results, second.goals, second.costs) == (first.results, first.goals, first.costs)
    case = make_case("float32", False, 128, 64)
    assert second.has((case.name, *case.shape, *case.rows), [SDPA])
    assert not second.has((case.name, *case.shape, 64), [SDPA])
    second.add(*cell(case, 5.0))
    assert len(second.results) == 7
    other = attention.AttentionReport(MACHINE, {**VERSIONS, "kernels": "abd"})
    assert "is of other kernels" in other.resume(tmp_path)


def test_versions_are_those_that_take_part():
    assert set(attention.AttentionReport(MACHINE).versions) == {
        *("python", "bitblas", "kernels", "torch", "apache-tvm", "apache-tvm-ffi", "openvino"),
    }


# -- the command -----------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch, capsys):
    asked, speed = [], 2e-3

    def measure(self, found):
        asked.extend(found)
        for case in found:
            self.report.add(*cell(case, speed))

    monkeypatch.setattr(attention.AttentionSession, "measure", measure)
    monkeypatch.setattr(matmul, "Probes", lambda: None)
    monkeypatch.setattr(matmul, "measure_machine", lambda threads, probes: MACHINE)
    monkeypatch.setattr(plots, "draw", lambda results, directory, figures: [])
    grown = iter([attention_memory.Growth(1_999_999, 10, 2), attention_memory.Growth(9_000_000, 0, 2)] * 2)
    monkeypatch.setattr(attention_memory, "measure", lambda who, config, threads: next(grown))
    given = ["--dtypes", "float32", "--lengths", "128,256", "--no-few-queries", "--out", str(tmp_path)]
    assert attention.main([*given, "--threads", "2"]) == 0
    assert asked == attention.chosen(options(*given))
    said = capsys.readouterr().out
    assert "| beside torch | ≥ 1.0× torch SDPA | 8 of 48, 40 not measured | 2.00× (float32, (1, 8, 128, 64)) |" in said
    name = "memory of a call beyond inputs and output, float32, (1, 8, 256, 64)"
    measured = "1.00 and 0.00 MB in the first call and a later one; torch SDPA 4.50 and 0.00"
    assert f"| {name} | ≤ 1 MB a thread | pass | {measured} |" in said
    assert json.loads((tmp_path / "attention.json").read_text())["goals"][-1]["name"].endswith("(1, 8, 256, 128)")
    # memory that is known is not measured again, and a missed goal is a status
    speed = 0.5e-3
    assert attention.main([*given, "--threads", "2", "--resume"]) == 1
    assert attention.main(["--resume"]) == 2
    assert attention.main(["--dtypes", "int8"]) == 2
    assert "int8" in capsys.readouterr().err


def test_a_session_runs_cells_and_keeps_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "FlashAtten", lambda config, target: SimpleNamespace(config=config))
    monkeypatch.setattr(
        attention, "compare", lambda op, named, seconds, place: cell(attention_cells.AttentionCase(op.config), 2e-3)[1]
    )
    report = attention.AttentionReport(MACHINE, dict(VERSIONS))
    session = attention.AttentionSession(report, None, 0.1, tmp_path, math.inf, "nobody")
    found = attention.chosen(options("--lengths", "128", "--dtypes", "float32"))
    session.measure(found)
    assert [attention.key_of(*each) for each in report.results] == [(c.name, *c.shape, *c.rows) for c in found]
    assert (
        "float32, causal, (1, 8, 128, 64): bitblas 1000 us [8% of fma], torch SDPA 2000 us" in capsys.readouterr().err
    )
    session.measure(found)
    assert "0 cells" in capsys.readouterr().err
    again = attention.AttentionReport(MACHINE, dict(VERSIONS))
    again.resume(tmp_path)
    assert again.results == report.results


def test_memory_waits_where_it_is_late(monkeypatch):
    report = attention.AttentionReport(MACHINE, dict(VERSIONS))
    session = attention.AttentionSession(report, None, 0.1, None, 0.0, "")
    assert not list(attention.memory_goals(session, ["float32"], [64], 128))
    grown = {OURS: attention_memory.Growth(2_000_001, 0, 2), SDPA: attention_memory.Growth(0, 0, 2)}
    monkeypatch.setattr(attention_memory, "measure", lambda who, config, threads: grown[who])
    session.deadline = math.inf
    assert [goal.passed for goal in attention.memory_goals(session, ["float32"], [64], 128)] == [False]


# -- memory ----------------------------------------------------------------------------------------------------------------


def test_a_peak_is_seen_though_it_is_freed():
    size = 64 << 20
    assert 0.95 * size < attention_memory.growth(lambda: torch.ones(size, dtype=torch.uint8)) < 1.1 * size
    assert attention_memory.growth(lambda: None) < 1 << 20


def test_a_process_that_fails_is_said():
    config = make_case("float32", False, 2, 8, 1).config
    with pytest.raises(BitBLASError, match="no memory of nobody was measured: AssertionError"):
        attention_memory.measure("nobody", config, 1)


# -- the document ----------------------------------------------------------------------------------------------------------


def test_the_document_holds_a_run():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    section = text.split("\n## Attention\n")[1].split("\n## ")[0]
    assert "](images/attention.png)" in section
    assert re.search(r"^\| beside torch \| ≥ 1\.0× torch SDPA \| \S*48 of 48\S* \|", section, re.MULTILINE)
    found = set()
    for kind, block in re.findall(r"^\*\*(b?float\d+(?:, causal)?)\*\*\n\n((?:^\|.*\n)+)", section, re.MULTILINE):
        heading, _, *rows = ([part.strip() for part in row.strip("|").split("|")] for row in block.splitlines())
        place = heading.index(SDPA)
        for row in rows:
            found.add((kind, row[0]))
            theirs, times = (float(part) for part in re.fullmatch(r"([\d.]+) \(([\d.]+)\)", row[place]).groups())
            assert times == pytest.approx(theirs / float(row[1]), rel=0.02, abs=0.01), row
    cases = attention.chosen(options())
    assert found == {(case.name, attention.shape_text(cell(case, 1.0)[1])) for case in cases}
