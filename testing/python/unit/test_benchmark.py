"""benchmark/: verdicts from made-up cells, filters, resuming, tables and plots, and each peer's result on a tiny shape."""

import builtins
import dataclasses
import importlib.util
import json
import types

import pytest
import torch
from benchmark import cases, goals, matmul, peers, plots, progress, report
from benchmark.peers import ggml_peers, operands

from bitblas import BitBLASError
from bitblas.bench import Comparison, Machine, Skipped, Timing, draw_workload, own_variant
from bitblas.bench import matmul as matmul_module

MACHINE = Machine("cpu", "isa", 2, 32 << 20, bandwidth=3e10, fma=1e11, int8=4e11)
UINT4 = "float16 x uint4 g128 + zeros"


def cell(m, times, name=UINT4, shape=(4096, 4096), ceilings=None, skipped=(), inexact=(), **workload):
    """A fabricated cell: `times` of bitblas and of its peers in seconds, None for a wrong result."""
    timings = [Timing(who, "float32", who not in inexact, t, t, 9, 0.0 if t else 2.0) for who, t in times.items()]
    work = {"N": shape[0], "K": shape[1], "A_dtype": name.split()[0], "m": m, **workload}
    size = shape[0] * shape[1]
    unit = "int8" if name.startswith("int8") else "fma"
    return name, Comparison(
        work, m, m * size, size // 2, 2, tuple(timings), tuple(skipped), size // 2, size // 2, ceilings or {}, unit
    )


def verdicts(*cells):
    """{goal: Goal} of the rules that speak of the cells."""
    found = {}
    for goal in goals.judge(cells):
        found.setdefault(goal.group, []).append(goal)
    return found


# -- goals -----------------------------------------------------------------------------------------------------------------


def test_exact_goals_of_one_row():
    size = 4096 * 4096 / 2
    ceilings = {"bandwidth": size / 1e-4, "decode table4": size / 2e-4, "fma": 1e12}
    times = {"bitblas": 2.5e-4, "torch float32": 2e-3, goals.ORT: 5e-4}
    found = verdicts(cell(1, times, ceilings=ceilings))
    (bound,) = found["exact uint4, M=1: roofline"]
    assert bound.passed is False
    assert bound.measured == "80% of decode table4"
    assert bound.margin == pytest.approx(0.8 / 0.85)
    assert found["exact uint4, M=1: onnxruntime"][0].passed is False
    assert found["uint4 beside torch"][0].passed is True
    better = verdicts(cell(1, {**times, "bitblas": 1.9e-4}, ceilings={**ceilings, "decode table4": size / 1.7e-4}))
    assert better["exact uint4, M=1: roofline"][0].passed is True
    assert better["exact uint4, M=1: roofline"][0].measured == "89% of decode table4"
    assert better["exact uint4, M=1: onnxruntime"][0].passed is True
    no_loop = verdicts(cell(1, times, ceilings={"bandwidth": size / 2.4e-4, "fma": 1e12}))
    assert no_loop["exact uint4, M=1: roofline"][0].passed is None
    assert verdicts(cell(1, times))["exact uint4, M=1: roofline"][0].passed is None


def test_exact_goals_of_many_rows():
    peak = {"fma": 128 * 4096 * 4096 / 0.018}
    times = {"bitblas": 0.02, "torch float32": 0.027, "OpenVINO": 0.022, "OpenVINO bf16": 0.001}
    found = verdicts(cell(128, times, ceilings=peak))
    assert found["exact uint4, M ≥ 16: peak"][0].passed is True
    assert found["exact uint4, M ≥ 16: torch"][0].passed is True
    assert found["exact uint4, M ≥ 16: OpenVINO"][0].measured == "1.10×"
    assert found["exact uint4, M ≥ 16: OpenVINO"][0].passed is False
    assert (
        verdicts(cell(128, times, ceilings={"fma": peak["fma"] * 1.1}))["exact uint4, M ≥ 16: peak"][0].passed is False
    )
    assert "exact uint4, M ≥ 16: peak" not in verdicts(cell(8, times, ceilings=peak))


def test_the_fma_peak_counts_whatever_unit_multiplies():
    name, row = cell(128, {"bitblas": 0.02, "torch float32": 1.0}, ceilings={"int8": 1e13})
    sliced = dataclasses.replace(row, unit="int8", products=3)
    group = "exact uint4, M ≥ 16: peak"
    assert verdicts((name, sliced))[group][0].passed is None
    sliced = dataclasses.replace(sliced, ceilings={**row.ceilings, "fma": 128 * 4096 * 4096 / 0.025})
    (goal,) = verdicts((name, sliced))[group]
    assert (goal.passed, goal.measured) == (True, "125% of fma, by int8")


def test_the_best_of_the_int8_peers_counts():
    times = {
        "bitblas": 1e-3,
        "torch _int_mm": 4e-3,
        "onnxruntime MatMulNBits 4": 5e-3,
        "OpenVINO dynamic 128": 2.1e-3,
        "ggml Q4_0": 6e-3,
        "torch float32": 1e-4,
    }
    peak = {"int8": 64 * 4096 * 4096 / 0.9e-3}
    found = verdicts(cell(64, times, "int8 x int4", ceilings=peak))
    (best,) = found["int8 × 4 and 2 bits, M ≥ 64: best peer"]
    assert (best.passed, best.measured) == (True, "2.10× OpenVINO dynamic 128")
    assert found["int8 × 4 and 2 bits, M ≥ 64: peak"][0].passed is True
    slower = {**times, "ggml Q4_0": 1.9e-3}
    (best,) = verdicts(cell(64, slower, "int8 x int4"))["int8 × 4 and 2 bits, M ≥ 64: best peer"]
    assert (best.passed, best.measured) == (False, "1.90× ggml Q4_0")
    (best,) = verdicts(cell(32, slower, "int8 x int2"))["int8 × 4 and 2 bits, M < 64: best peer"]
    assert best.passed is True
    assert not verdicts(cell(64, times, "int8 x int4", shape=(8192, 8192)))


def test_a_goal_that_the_machine_does_not_allow_says_so():
    times = {"bitblas": 1e-3, "torch float32": 1.2e-3}
    slow, fast = ({"fma": 128 * 4096 * 4096 / limit} for limit in (0.95e-3, 0.9e-3))
    group = "exact uint4, M ≥ 16: torch"
    assert verdicts(cell(128, times, ceilings=slow))[group][0].measured == "1.20×, 1.26 at its limit"
    assert verdicts(cell(128, times, ceilings=fast))[group][0].measured == "1.20×"


def test_a_goal_cannot_pass_without_a_peer_that_is_away():
    times = {"bitblas": 1e-3, "torch _int_mm": 4e-3, "onnxruntime MatMulNBits 4": 5e-3, "OpenVINO dynamic 128": 3e-3}
    group = "int8 × 4 and 2 bits, M ≥ 64: best peer"

    def judged(times, *skipped):
        return verdicts(cell(64, times, "int8 x int4", skipped=skipped))[group][0]

    gone = Skipped("ggml Q4_0", "No module named 'llama_cpp'", missing=True)
    serves_not = Skipped("ggml TQ2_0", "holds codes of 2 bits")
    assert judged(times, gone, serves_not).passed is None
    assert "without ggml" in judged(times, gone).measured
    assert judged(times).passed is None  # nobody asked ggml
    assert judged({**times, "torch _int_mm": 1.5e-3}, gone).passed is False  # too slow beside the others already
    assert judged(times, Skipped("ggml Q4_0", "has blocks of 32"), serves_not).passed is True
    assert judged({**times, "ggml Q4_0": None}).passed is True  # computes it wrong
    assert judged({"bitblas": 1e-3}).passed is None


def test_a_wrong_result_fails_every_goal():
    found = verdicts(cell(1, {"bitblas": None, "torch float32": 1.0}, ceilings={"bandwidth": 1e9, "fma": 1e9}))
    assert found
    assert all(goal.passed is False for group in found.values() for goal in group)
    assert "wrong result" in found["uint4 beside torch"][0].measured


@pytest.mark.parametrize(("other", "passed"), [(1.04e-3, True), (0.97e-3, True), (1.07e-3, False), (0.93e-3, False)])
def test_float16_costs_what_float32_does(other, passed):
    found = verdicts(cell(16, {"bitblas": 1e-3, cases.FLOAT32_VARIANT: other}))
    assert found["float16 as fast as float32"][0].passed is passed


@pytest.mark.parametrize(("plain", "passed"), [(0.92e-3, True), (0.9e-3, False), (2e-3, True)])
def test_scales_cost_a_tenth_at_most(plain, passed):
    found = verdicts(cell(16, {"bitblas": 1e-3, cases.PLAIN_VARIANT: plain}, "int8 x int4 g128"))
    assert found["scales in groups, int8 × int4"][0].passed is passed


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_small_layers_compare_with_their_own_dtype(dtype):
    times = {"bitblas": 1e-5, f"torch {dtype}": 0.9e-5} | ({"torch float32": 1e-3} if dtype != "float32" else {})
    found = verdicts(cell(1, times, f"{dtype} x uint4 g128 + zeros", shape=(512, 512)))
    assert [goal.passed for goal in found["small layers"]] == [False]


def test_bfloat16_and_narrow_formats():
    found = verdicts(cell(2, {"bitblas": 1e-3, "torch bfloat16": 1.01e-3}, "bfloat16 x uint4 g128 + zeros"))
    assert found["bfloat16 × uint4"][0].passed is True
    for name in ("uint1", "uint2", "uint3", "nf4", "fp4_e2m1"):
        size = 4096 * 4096 / 2
        ceilings = {"bandwidth": size / 0.79e-3, "decode x": size / 0.5e-3, "fma": 1e15}
        found = verdicts(cell(1, {"bitblas": 1e-3, "torch float32": 1.0}, f"float16 x {name} g128", ceilings=ceilings))
        assert found["1 to 3 bits, nf4, fp4, M=1: roofline"][0].passed is False


def test_every_rule_speaks_of_a_cell_of_the_full_run():
    found = [(case.name, case.shape, m) for case in cases.full() for m in case.rows]
    assert len(found) == len(set(found))
    for rule in goals.RULES:
        assert any(rule.applies(*each) for each in found), rule
    for shape in cases.SHAPES:
        for name in (UINT4, "float16 x uint2 g128", "int8 x int4", "int8 x int2"):
            assert {(name, shape, m) for m in cases.ROWS} <= set(found)
    assert (UINT4, cases.HEADLINE, 2048) in found
    names = {case.name for case in cases.quick()} - {case.name for case in cases.full()}
    assert not names
    spoken = goals.concerned(cases.full())
    assert all(any(rule.applies(c.name, c.shape, m) for rule in goals.RULES) for c in spoken for m in c.rows)


# -- cases and filters -----------------------------------------------------------------------------------------------------


def test_filters():
    every = cases.full()
    found = cases.Filter("int8 x int4", (1, 128), ((4096, 4096), (1024, 8192))).apply(every)
    assert {case.name for case in found} == {"int8 x int4", "int8 x int4 g128"}
    assert {case.shape for case in found} == {(4096, 4096), (1024, 8192)}
    assert all(case.rows == (1, 128) for case in found)
    whole = next(case for case in every if case.name == "int8 x int4")
    assert next(case for case in found if case.name == "int8 x int4").config == whole.config  # the same kernels
    assert cases.Filter().apply(every) == every
    assert not cases.Filter(rows=(3,)).apply(every)


@pytest.mark.parametrize("text", ["4096", "4096x", "axb", "1x2x3", "-1x2"])
def test_shapes_that_are_none(text):
    with pytest.raises(ValueError, match=r"a shape is NxK|invalid"):
        cases.parse_shapes(text)


def test_rows_and_shapes_from_text():
    assert cases.parse_rows("1,16") == (1, 16)
    assert cases.parse_shapes("4096x4096,1024x8192") == ((4096, 4096), (1024, 8192))
    with pytest.raises(ValueError, match="at least 1"):
        cases.parse_rows("0")


def test_any_field_of_the_config_makes_a_case():
    found = cases.case("float16", "int4", (64, 256), (1,), label="biased", with_bias=True)
    assert found.name == "float16 x int4 g128, biased"
    assert found.config.with_bias
    assert cases.case("int8", "int4", (64, 256), (1,), scaled=True).name == "int8 x int4 g128"


def test_an_estimate_grows_with_the_work():
    config = cases.case("int8", "int4", cases.HEADLINE, (1,)).config
    small = progress.estimate(config, 1, 8, 0.3)
    assert 1 < small < progress.estimate(config, 2048, 8, 0.3)
    assert small < progress.estimate(config, 1, 12, 0.3)
    said = []
    bar = progress.Progress(10.0, 2, said.append)
    bar.advance(6.0, "one")
    bar.advance(4.0, "two")
    bar.close()
    assert bar.cells_left == 0
    assert said[0] == "2 cells, about 10 s"
    assert said[1].startswith("[1/2, ")
    assert said[2].endswith("0 s left] two")


# -- reports ---------------------------------------------------------------------------------------------------------------


def filled():
    """A report with a few cells of several kinds."""
    ceilings = {"bandwidth": 3e10, "decode table4": 4e10, "fma": 1e11}
    exact = {
        "bitblas": 4e-4,
        cases.FLOAT32_VARIANT: 4.1e-4,
        "torch float32": 3e-3,
        "OpenVINO": None,
        "OpenVINO dynamic 128": 3e-4,
    }
    integers = {"bitblas": 2e-4, "torch _int_mm": 5e-4, "ggml Q4_0": 3e-4}
    found = report.Report(MACHINE, {"python": "3", "kernels": "abc"}, "2026-01-01")
    for m in (1, 16, 128):
        found.add(
            *cell(m, {k: v and v * m for k, v in exact.items()}, ceilings=ceilings, inexact=["OpenVINO dynamic 128"])
        )
    gone = [Skipped("ggml TQ2_0", "holds codes of 2 bits")]
    found.add(*cell(1, integers, "int8 x int4", ceilings={"bandwidth": 3e10}, skipped=gone, inexact=["ggml Q4_0"]))
    return found


def tables(text):
    """Lists of cells for each line of each table, by the first cell of the heading line's table number."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1, block
    return [[[part.strip() for part in line.strip("|").split("|")] for line in block] for block in blocks]


def test_markdown():
    text = filled().markdown()
    goal_table, exact, quantized, beside, memory = tables(text)
    assert goal_table[2][:3] == ["uint4 beside torch", "≥ 5× torch float32", "pass"]
    assert exact[0][5:] == ["torch float32", "OpenVINO"]
    assert exact[2] == [UINT4, "4096 × 4096", "1", "400", "70% bandwidth", "3000 (7.50)", "wrong"]
    assert [row[0] for row in exact[2:]] == [UINT4] * 3  # no int8
    assert quantized[0][5:] == ["torch _int_mm", "OpenVINO dynamic 128", "ggml Q4_0"]
    assert quantized[-1][-3:] == ["500 (2.50)", "–", "300 (1.50)"]
    assert beside[2][3:] == ["400", "float32 activations", "410 (1.02)"]
    assert memory[2] == [UINT4, "4096 × 4096", "8.39", "33.55", "25%"]
    assert memory[3] == ["int8 x int4", "4096 × 4096", "8.39", "16.78", "50%"]
    assert "OpenVINO is off by 2 and has no time" in text
    assert "- ggml TQ2_0: holds codes of 2 bits" in text


def test_goals_are_summed_up_by_group():
    found = filled()
    found.add(*cell(16, {"bitblas": 1.0, "torch float32": 1.2}))
    lines = [row for row in tables(found.markdown())[0] if row[0] == "exact uint4, M ≥ 16: torch"]
    assert lines == [
        ["exact uint4, M ≥ 16: torch", "≥ 1.3× torch float32", "**1 of 2**", f"1.20× ({UINT4}, 4096 × 4096, M=16)"]
    ]


def test_an_empty_report_is_no_error(tmp_path):
    empty = report.Report(MACHINE)
    assert "cpu" in empty.markdown()
    assert {path.name for path in empty.write(tmp_path)} == {"matmul.json", "matmul.md"}


def test_files_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    written = {path.name: path for path in filled().write(tmp_path / "new")}
    names = {f"{name}.{kind}" for name in ("latency", "speedup", "roofline", "memory") for kind in ("png", "svg")}
    assert set(written) == {"matmul.json", "matmul.md", *names}
    assert all(path.stat().st_size > 2000 for name, path in written.items() if name in names)
    assert written["latency.png"].read_bytes().startswith(b"\x89PNG")
    found = json.loads(written["matmul.json"].read_text())
    assert found["results"][0]["binds"] == "bandwidth"
    assert found["results"][0]["roofline_fraction"] == pytest.approx(0.699, abs=1e-3)
    assert len(found["goals"]) > 5


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert {path.name for path in filled().write(tmp_path)} == {"matmul.json", "matmul.md"}
    assert "SKIPPED the plots" in capsys.readouterr().err


def test_the_memory_of_a_layer():
    name, row = cell(1, {"bitblas": 1.0})
    assert plots.memory_of([(name, row), cell(1, {"bitblas": 1.0}, f"{name} on haswell")]) == {
        name: ((4096, 4096), 1 << 23, 1 << 25)
    }


# -- resuming --------------------------------------------------------------------------------------------------------------


def test_cells_are_taken_over(tmp_path):
    first = filled()
    first.costs = [goals.Goal("import", "≤ 1 s", "2 s", False)]
    first.save(tmp_path)
    second = report.Report(MACHINE, dict(first.versions))
    assert second.resume(tmp_path) == f"4 cells are in {tmp_path / 'matmul.json'} already"
    assert second.results == first.results
    assert second.goals == first.goals
    key = (UINT4, 4096, 4096, 16)
    assert second.has(key, ["torch float32", "OpenVINO"])
    assert not second.has(key, ["torch float32", "ggml Q4_0"])
    assert second.has(("int8 x int4", 4096, 4096, 1), ["ggml TQ2_0"])  # does not serve it
    assert not second.has((UINT4, 4096, 4096, 2), [])
    second.add(*cell(16, {"bitblas": 9.0}))
    assert len(second.results) == 4
    assert second.results[1][1].ours.seconds == 9.0


@pytest.mark.parametrize(
    ("machine", "versions", "said"),
    [
        ({"cpu": "another"}, {}, "cpu"),
        ({"threads": 1}, {}, "threads"),
        ({}, {"kernels": "def"}, "kernels"),
        ({"bandwidth": 1.0}, {}, None),
    ],
)
def test_cells_of_another_machine_or_version_are_not(tmp_path, machine, versions, said):
    filled().save(tmp_path)
    other = report.Report(dataclasses.replace(MACHINE, **machine), {"python": "3", "kernels": "abc", **versions})
    text = other.resume(tmp_path)
    assert (f"is of other {said}" in text) if said else "already" in text
    assert bool(other.results) == (said is None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": {}}', '{"machine": 1, "versions": 2}'])
def test_a_file_that_is_no_report_is_said(tmp_path, content):
    (tmp_path / "matmul.json").write_text(content)
    found = report.Report(MACHINE)
    assert "not used" in found.resume(tmp_path)
    assert not found.results
    assert "a new run" in report.Report(MACHINE).resume(tmp_path / "absent")


class Operator:
    """Stands in for Matmul."""

    def __init__(self, config, target=None):
        self.config = config


@pytest.fixture
def measured(monkeypatch):
    """The (case's config, m, number of peers) that were measured, by a stand-in for compare; no operator is built."""
    found = []

    def compare(op, m, named, seconds, probes=None):
        found.append((op.config, m, len(named)))
        return cell(m, {"bitblas": 1.0, "torch float32": 2.0}, shape=(op.config.N, op.config.K))[1]

    monkeypatch.setattr(matmul, "Matmul", Operator)
    monkeypatch.setattr(matmul, "compare", compare)
    return found


def session(out, match="torch float32", deadline=float("inf")):
    return matmul.Session(report.Report(MACHINE), None, 0.1, out, deadline, match)


def test_what_is_there_is_not_measured_again(tmp_path, measured, capsys):
    case = dataclasses.replace(cases.uint4("float16", cases.HEADLINE, (1, 16)), variants=())
    run = session(tmp_path)
    run.measure([case])
    assert [m for _, m, _ in measured] == [1, 16]
    again = session(tmp_path)
    again.report.resume(tmp_path)
    again.measure([cases.with_rows(case, (1, 2, 16))])
    assert [m for _, m, _ in measured] == [1, 16, 2]
    assert "1 cells, about" in capsys.readouterr().err
    more = session(tmp_path, match="torch")  # peers that the cells lack
    more.report.resume(tmp_path)
    more.measure([case])
    assert [m for _, m, _ in measured] == [1, 16, 2, 1, 16]


def test_a_run_that_is_late_or_interrupted_keeps_what_it_has(tmp_path, measured, monkeypatch, capsys):
    case = cases.case("float16", "uint2", cases.HEADLINE, (1, 16, 128))
    late = session(tmp_path, deadline=0.0)
    late.measure([case])
    assert not measured
    assert "3 cells are left" in capsys.readouterr().err
    whole = matmul.compare

    def interrupted(op, m, *args, **kwargs):
        if m == 16:
            raise KeyboardInterrupt
        return whole(op, m, *args, **kwargs)

    monkeypatch.setattr(matmul, "compare", interrupted)
    run = session(tmp_path)
    run.measure([case])
    assert run.is_late
    assert "2 cells are left" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "matmul.json").read_text())["results"]) == 1


def test_resuming_needs_a_directory():
    assert matmul.main(["--resume"]) == 2
    with pytest.raises(BitBLASError, match="--resume needs --out"):
        matmul._run(matmul._parser().parse_args(["--resume"]))


# -- peers -----------------------------------------------------------------------------------------------------------------

#: Each peer with workloads that it serves.
SERVED = {
    "torch float32": [("float16", "nf4", None), ("bfloat16", "uint4", "rescale")],
    "torch float16": [("float16", "uint4", "quantized")],
    "torch bfloat16": [("bfloat16", "uint4", "quantized")],
    "torch int4pack": [("float16", "uint4", "quantized"), ("float32", "int4", None)],
    "torch _int_mm": [("int8", "int4", None), ("int8", "int2", None)],
    "onnxruntime MatMulNBits 0": [("float16", "uint4", "quantized"), ("float32", "int4", None)],
    "onnxruntime MatMulNBits 4": [("float32", "uint4", "quantized"), ("int8", "int4", None), ("int8", "int2", None),
                                  ("float16", "uint8", None)],
    "OpenVINO": [("float16", "uint4", "quantized"), ("float32", "int4", None), ("float16", "uint2", None),
                 ("float16", "nf4", None), ("float16", "int8", None), ("float16", "uint8", "original")],
    "OpenVINO bf16": [("bfloat16", "uint4", "quantized")],
    "OpenVINO dynamic 128": [("float16", "uint4", "quantized"), ("int8", "int4", None), ("int8", "int2", None)],
    "ggml Q4_0": [("int8", "int4", None), ("float16", "int4", None)],
    "ggml Q4_1": [("float16", "uint4", "quantized"), ("int8", "uint4", None)],
    "ggml Q8_0": [("float16", "int8", None), ("int8", "int8", None)],
    "ggml TQ2_0": [("int8", "int2", None)],
}  # fmt: skip


def workload(a_dtype, w_dtype, zeros, m, shape=(32, 512)):
    return draw_workload(cases.case(a_dtype, w_dtype, shape, (m,), zeros).config, m)


def test_every_peer_has_a_workload():
    assert set(SERVED) == set(peers.PEERS)


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize(("name", "served"), [(name, each) for name, found in SERVED.items() for each in found])
def test_a_peer_computes_what_it_is_asked(name, served, m):
    work = workload(*served, m)
    made = peers.PEERS[name](work, 64 << 10)
    if isinstance(made, Skipped):
        assert made.missing, made
        pytest.skip(f"SKIPPED {name}: {made.reason}")
    for index in range(2):
        verdict = made.check(made.call(index))
        assert verdict.right, verdict
    assert made.name == name
    assert verdict.error < 0.06
    # the check is no formality: what is computed of other activations is wrong
    other = dataclasses.replace(work, a=work.a.flip(-1))
    other.__dict__["expected"] = work.expected
    wrong = peers.PEERS[name](other, 64 << 10)
    assert not wrong.check(wrong.call(0)).right


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_cannot_says_so(name):
    for served in (("float16", "uint3", "rescale"), ("int8", "uint3", None), ("float16", "int1", None)):
        made = peers.PEERS[name](workload(*served, 2), 1 << 20)
        if isinstance(made, Skipped):
            assert made.reason
            if made.missing:
                pytest.skip(made.reason)
        else:
            assert name.startswith("torch ")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("onnxruntime MatMulNBits 0", "onnxruntime", "bench"),
        ("onnxruntime MatMulNBits 4", "onnx", "bench"),
        ("OpenVINO", "openvino", "bench"),
        ("OpenVINO dynamic 128", "openvino", "bench"),
        ("ggml Q4_1", "llama_cpp", "bench-ggml"),
    ],
)
def test_a_peer_that_is_missing_says_how_to_get_it(name, module, extra, monkeypatch, capsys):
    if module == "onnxruntime":
        pytest.importorskip("onnx")  # which it looks for first
    real_import, real_find = builtins.__import__, importlib.util.find_spec

    def refuse(wanted, *args, **kwargs):
        if wanted.split(".")[0] == module:
            raise ImportError(f"No module named {module!r}")
        return real_import(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else real_find(wanted))
    monkeypatch.setattr(operands, "_kept", {})
    ggml_peers._library.cache_clear()
    try:
        made = peers.PEERS[name](workload("float16", "uint4", "quantized", 1), 1 << 20)
    finally:
        ggml_peers._library.cache_clear()
    assert made == Skipped(name, f"No module named {module!r}: pip install 'bitblas[{extra}]'", missing=True)
    run = session(None)
    for _ in range(2):
        run._announce(cell(1, {"bitblas": 1.0}, skipped=[made])[1])
    assert capsys.readouterr().err.count(f"SKIPPED {name}: No module") == 1


def test_peers_are_chosen_by_case_and_name():
    plain = matmul.Session(report.Report(MACHINE), None, 0.1, None, 0.0, "")
    found = plain.peers_of(cases.uint4("float16", cases.HEADLINE, (1,)))
    assert cases.FLOAT32_VARIANT in found
    assert "torch bfloat16" in found
    assert "torch float16" not in found
    assert "torch bfloat16" not in plain.peers_of(cases.case("int8", "int4", cases.HEADLINE, (1,)))
    small = next(case for case in cases.small() if case.config.A_dtype == "float16")
    assert set(plain.peers_of(small)) == {"torch float32", "torch float16"}
    assert set(session(None, "ggml").peers_of(cases.case("int8", "int4", cases.HEADLINE, (1,)))) == {
        "torch float32", "ggml Q4_0", "ggml Q4_1", "ggml Q8_0", "ggml TQ2_0"
    }  # fmt: skip


def test_a_variant_has_operands_of_its_own(monkeypatch):
    made = {}

    def ours(op, work, budget, name):
        made[name] = op.config, work
        return name

    monkeypatch.setattr(matmul_module, "Matmul", Operator)
    monkeypatch.setattr(matmul_module, "_ours", ours)
    work = workload("float16", "uint4", "quantized", 3)
    assert own_variant("other", **cases.VARIANTS[cases.FLOAT32_VARIANT])(work, 1) == "other"
    config, own = made["other"]
    assert config == dataclasses.replace(work.config, A_dtype="float32", out_dtype="float32")
    assert (own.m, own.a.dtype, own.scale.dtype) == (3, torch.float32, torch.float32)
    monkeypatch.undo()
    refused = own_variant("none", A_dtype="int8", W_dtype="nf4", out_dtype="int32", with_scaling=False)(work, 1)
    assert isinstance(refused, Skipped)
    assert not refused.missing


def test_ours_is_not_exact_where_it_quantizes(monkeypatch):
    monkeypatch.setattr(matmul_module, "unit_of", lambda op, m: "int8")
    monkeypatch.setattr(matmul_module, "products_of", lambda op, m: 1)
    work = workload("float16", "int4", None, 2)
    for how, computes in (("row", "int8 by row"), (None, "int32")):
        config = types.SimpleNamespace(N=32, out_dtype="float16", dynamic_quantization=how)
        op = types.SimpleNamespace(config=config, transform_weight=lambda weight: weight)
        found = matmul_module._ours(op, work, 1)
        assert (found.exact, found.computes) == (how is None, computes)


# -- weights as others take them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uint2", "uint3", "uint4", "uint8", "int2", "int4", "int8"])
@pytest.mark.parametrize("zeros", [None, "original"])
def test_codes_mean_the_weight(name, zeros):
    work = workload("float32", name, zeros if name.startswith("u") else None, 1)
    codes = operands.integer_codes(work)
    for found in (codes, codes.in_groups(32)):
        scale, points = (t.repeat_interleave(found.group, 1) for t in (found.scale, found.points))
        assert torch.allclose((found.codes - points) * scale, work.dense(torch.float32), rtol=1e-6)
    assert codes.codes.dtype == torch.uint8
    if 8 % codes.bits == 0:
        packed, per_byte = codes.packed(), 8 // codes.bits
        assert packed.shape == (32, 512 // per_byte)
        mask = (1 << codes.bits) - 1
        assert all(torch.equal(packed >> (codes.bits * i) & mask, codes.codes[:, i::per_byte]) for i in range(per_byte))


def test_what_has_no_codes():
    assert operands.integer_codes(workload("float16", "nf4", None, 1)) is None
    assert operands.integer_codes(workload("float16", "int1", None, 1)) is None
    assert not operands.integer_codes(workload("float32", "uint4", "rescale", 1)).has_whole_points


def test_graphs_hold_copies_where_memory_matters():
    codes = operands.integer_codes(workload("float16", "uint4", None, 1))
    assert operands.graph_copies(codes, 1, 1 << 40) == operands.MAX_COPIES
    assert operands.graph_copies(codes, 1, 3 * 8192) == 3
    assert operands.graph_copies(codes, 17, 1 << 40) == 1
