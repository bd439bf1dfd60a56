"""python -m benchmark.bitlinear: verdicts and tables from made-up cells, each peer's result on a tiny shape, its document."""

import builtins
import dataclasses
import json
import re

import pytest
import torch
from benchmark import bitlinear, bitlinear_layers, cases, matmul, plots
from benchmark.bitlinear import ALONE, BY_DIFFERENCE, FEW, FEW_INT8, INT8, OPERATOR, SHAPES, SQUARE

import bitblas
from bitblas.bench import Comparison, Machine, Skipped, Timing
from documents import ROOT

MACHINE = Machine("cpu", "isa", 2, 32 << 20, bandwidth=3e10, int8=4e11)
VERSIONS = {"python": "3", "kernels": "abc"}
EXTRA = r"transformers.*pip install 'bitblas\[transformers\]'"


def cell(m, times, dtype="float32", shape=cases.HEADLINE, skipped=(), static=None, ceilings=None):
    """A fabricated cell: `times` of bitblas and of its peers in seconds, None for a wrong result."""
    timings = [Timing(who, "x", False, t, t, 9, 0.0 if t else 2.0) for who, t in times.items()]
    size = shape[0] * shape[1]
    work = {"N": shape[0], "K": shape[1], "A_dtype": dtype, "m": m}
    row = Comparison(
        work, m, m * size, size // 4, 2, tuple(timings), tuple(skipped), size // 4, static or size // 4, ceilings or {}
    )
    return f"BitLinear {dtype}", dataclasses.replace(row, unit="int8")


#: Of a cell in which every goal is reached.
GOOD = {
    "bitblas": 1e-4,
    OPERATOR: 1.02e-4,
    INT8: 0.95e-4,
    FEW: 2e-5,
    FEW_INT8: 1.5e-5,
    "torch.nn.Linear float32": 1.2e-3,
    "transformers BitLinear float32": 4e-2,
    "transformers BitLinear float32, eager": 2.5e-3,
}


def verdicts(*cells):
    """{group: Goal} of the rules that speak of the cells; each must speak of one."""
    found = {}
    for goal in bitlinear.judge(cells):
        assert (goal.group, goal.asked) not in found
        found[goal.group, goal.asked] = goal
    return {group: goal for (group, _), goal in found.items()}


# -- goals -----------------------------------------------------------------------------------------------------------------


def test_goals_of_one_row():
    found = verdicts(cell(1, GOOD))
    assert {group: goal.measured for group, goal in found.items()} == {
        "4096², M=1": "12.00×",
        "transformers' BitNet layer, M=1": "400.00×",
        "the same without torch.compile, M=1": "25.00×",
        "static memory": "93.8% less",
    }
    assert all(goal.passed for goal in found.values())


@pytest.mark.parametrize(
    ("group", "m", "shape", "changes"),
    [
        ("4096², M=1", 1, cases.HEADLINE, {"torch.nn.Linear float32": 9.9e-4}),
        ("4096², M=128", 128, cases.HEADLINE, {"torch.nn.Linear float32": 4.9e-4}),
        ("1024², M=1", 1, SQUARE, {"torch.nn.Linear float32": 2.9e-4}),
        ("transformers' BitNet layer, M=1", 1, cases.HEADLINE, {"transformers BitLinear float32": 1.9e-3}),
        ("the same without torch.compile, M=1", 1, SQUARE, {"transformers BitLinear float32, eager": 1.9e-3}),
        (BY_DIFFERENCE, 16, SQUARE, {INT8: 0.88e-4}),
        (ALONE, 512, cases.HEADLINE, {FEW_INT8: 0.9e-5}),
    ],
)
def test_each_goal_can_be_missed(group, m, shape, changes):
    assert verdicts(cell(m, GOOD, shape=shape))[group].passed is True
    found = verdicts(cell(m, {**GOOD, **changes}, shape=shape))
    assert found.pop(group).passed is False
    assert all(goal.passed for goal in found.values())


def test_static_memory():
    # float32: 1024² · 4 + 1024 · 4 bytes = 4198400, of which 8 % are 335872
    for size, saved, small in ((270_000, True, True), (270_001, True, False), (335_873, False, False)):
        found = verdicts(cell(1, GOOD, shape=SQUARE, static=size))
        assert found["static memory"].passed is saved
        assert found["static memory of 1024²"].passed is small
    assert found["static memory of 1024²"].measured == "335,873 bytes"


def test_the_layer_of_the_same_dtype_counts():
    times = {**GOOD, "transformers BitLinear bfloat16": 1e-3}
    assert verdicts(cell(1, times, "bfloat16"))["transformers' BitNet layer, M=1"].measured == "10.00×"
    assert "transformers' BitNet layer, M=1" not in verdicts(cell(1, times, "float16"))


def test_what_was_not_measured_does_not_pass():
    gone = Skipped("transformers BitLinear float32", "not there", missing=True)
    found = verdicts(cell(1, {"bitblas": 1e-4}, skipped=[gone]))
    assert found["4096², M=1"].passed is None
    assert found["transformers' BitNet layer, M=1"].passed is None
    found = verdicts(cell(16, {"bitblas": 1e-4, FEW: 1e-5, FEW_INT8: None}))
    assert found[BY_DIFFERENCE].passed is None
    assert found[ALONE].passed is None
    wrong = verdicts(cell(16, {**GOOD, "bitblas": None}))
    assert wrong[BY_DIFFERENCE].passed is False
    assert "wrong result" in wrong[ALONE].measured


def test_quantizing_is_found_in_two_ways():
    _, row = cell(16, GOOD)
    found = bitlinear.Quantization.of(row)
    assert (found.call, found.noise) == pytest.approx((1.01e-4, 2e-6))
    assert (found.by_difference, found.alone) == pytest.approx((6e-6, 5e-6))
    measured = {group: goal.measured for group, goal in verdicts(("BitLinear float32", row)).items()}
    assert (measured[BY_DIFFERENCE], measured[ALONE]) == ("5.9% ± 2.0%", "5.0%")
    # a difference may be less than nothing, and that is shown
    _, row = cell(16, {**GOOD, INT8: 1.03e-4})
    assert "| -2.0 (-2.0% ± 2.0%) |" in bitlinear.quantization_table([("BitLinear float32", row)])


@pytest.mark.parametrize(
    ("int8", "operator", "passed"),
    [
        (0.95e-4, 1.02e-4, True),
        (0.95e-4, 1.2e-4, None),
        (0.88e-4, 1e-4, False),
        (0.88e-4, 1.04e-4, None),
        (0.8e-4, 1.04e-4, False),
    ],
)
def test_a_difference_that_noise_hides_says_nothing(int8, operator, passed):
    assert verdicts(cell(16, {**GOOD, INT8: int8, OPERATOR: operator}))[BY_DIFFERENCE].passed is passed


def test_every_rule_speaks_of_a_cell_of_the_full_run():
    found = [(case.name, case.shape, m) for case in bitlinear.full() for m in case.rows]
    assert len(found) == len(set(found))
    for rule in bitlinear.RULES:
        assert any(rule.applies(*each) for each in found), rule
    for shape in SHAPES:
        assert {("BitLinear float32", shape, m) for m in cases.ROWS} <= set(found)
    assert {(case.name, case.shape, m) for case in bitlinear.quick() for m in case.rows} < set(found)


# -- reports ---------------------------------------------------------------------------------------------------------------


def filled():
    """A report with a few cells of two shapes."""
    found = bitlinear.LayerReport(MACHINE, dict(VERSIONS), "2026-01-01")
    for shape in ((32, 64), (64, 64)):
        for m in (16, 1, 128):
            found.add(*cell(m, {name: t * m for name, t in GOOD.items()}, shape=shape, ceilings={"bandwidth": 1e9}))
    return found


def test_markdown():
    blocks = [block.splitlines() for block in filled().markdown().split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({row.count("|") for row in block}) == 1, block
    goals, beside, other, layers, quantizing, memory = blocks
    assert [row.split(" | ")[2] for row in layers[2:5]] == ["1", "16", "128"]
    assert goals[2].startswith("| static memory | ≥ 92% less than float32 |")
    assert beside[2] == "| BitLinear float32 | 32 × 64 | 12.00 | 12.00 | 12.00 |"
    assert other[2] == "| BitLinear float32 | 32 × 64 | 400.00 | 400.00 | 400.00 |"
    assert layers[0].endswith("| bitblas | limit | " + " | ".join([*GOOD][5:]) + " |")
    assert layers[3].startswith("| BitLinear float32 | 32 × 64 | 16 | 1600 | 0% bandwidth | 19200 (12.00) |")
    cells = "| 1600 | 1632 | 1520 | 96.0 (5.9% ± 2.0%) | 320 | 240 | 80.0 (5.0%) |"
    assert quantizing[2] == f"| BitLinear float32 | 32 × 64 | 16 {cells}"
    assert len(quantizing) == 2 + 4
    assert [row.split(" | ")[0] for row in memory[2:5]] == [
        "| bitblas BitLinear float32", "| bitblas BitLinear bfloat16", "| torch.nn.Linear float32"
    ]  # fmt: skip


def test_bytes_of_layers():
    sizes = bitlinear_layers.layer_bytes((32, 64))
    # codes, one scale, bias, format
    assert sizes["bitblas BitLinear float32"] == 32 * 64 // 4 + 4 + 32 * 4 + 128
    assert sizes["bitblas BitLinear bfloat16"] == 32 * 64 // 4 + 4 + 32 * 2 + 128
    assert sizes["torch.nn.Linear float32"] == bitlinear_layers.dense_bytes((32, 64)) == 32 * 64 * 4 + 32 * 4
    assert sizes["torch.nn.Linear bfloat16"] == 32 * 64 * 2 + 32 * 2
    if "transformers BitLinear bfloat16" in sizes:
        assert sizes["transformers BitLinear bfloat16"] == 32 * 64 // 4 + 2 + 32 * 2
        assert sizes["transformers AutoBitLinear bfloat16"] == 32 * 64 * 2 + 2 + 32 * 2
    assert bitlinear_layers.layer_bytes(SQUARE)["bitblas BitLinear float32"] <= bitlinear.SQUARE_BYTES


def test_files_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    written = {path.name: path for path in filled().write(tmp_path)}
    names = {f"bitlinear_{n}.{kind}" for n in ("latency", "throughput", "memory") for kind in ("png", "svg")}
    assert set(written) == {"bitlinear.json", "bitlinear.md", *names}
    assert all(written[name].stat().st_size > 2000 for name in names)
    svg = written["bitlinear_throughput.svg"].read_text()
    assert "<!-- tokens/s -->" in svg
    assert "<!-- GMAC/s -->" in svg
    found = json.loads(written["bitlinear.json"].read_text())
    assert set(found["static_bytes"]) == {"32 x 64", "64 x 64"}
    assert found["results"][0]["static_bytes"] == 32 * 64 // 4


def test_tokens_and_products_a_second():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = bitlinear.throughput(filled().results)
    axis = figure.axes[0]
    ours = next(line for line in axis.lines if line.get_label() == "bitblas")
    assert ours.get_xdata() == pytest.approx([1, 16, 128])
    assert ours.get_ydata() == pytest.approx([1e4] * 3)  # m rows in m · 1e-4 s
    right = axis.child_axes[0]
    figure.canvas.draw()
    factors = [high / low for high, low in zip(right.get_ylim(), axis.get_ylim(), strict=True)]
    assert factors == pytest.approx([32 * 64 / 1e9] * 2)
    matplotlib.pyplot.close(figure)
    assert plots.grid([], "µs", lambda row, name: None, "bitblas") is None


def test_a_run_is_taken_up_again(tmp_path):
    first = filled()
    first.save(tmp_path)
    second = bitlinear.LayerReport(MACHINE, dict(VERSIONS))
    assert second.resume(tmp_path) == f"6 cells are in {tmp_path / 'bitlinear.json'} already"
    assert second.results == first.results
    assert second.goals == first.goals
    other = bitlinear.LayerReport(dataclasses.replace(MACHINE, threads=1), dict(VERSIONS))
    assert "is of other threads" in other.resume(tmp_path)


def test_an_empty_report_is_no_error(tmp_path):
    empty = bitlinear.LayerReport(MACHINE)
    assert "transformers" in empty.versions
    assert {path.name for path in empty.write(tmp_path)} == {"bitlinear.json", "bitlinear.md"}


def test_the_command(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(self, found):
        asked.extend((case.name, case.shape, case.rows) for case in found)
        self.report.add(*cell(1, GOOD))

    monkeypatch.setattr(bitlinear.LayerSession, "measure", measure)
    monkeypatch.setattr(matmul, "Probes", lambda: None)
    monkeypatch.setattr(matmul, "measure_machine", lambda threads, probes: MACHINE)
    monkeypatch.setattr(plots, "draw", lambda results, directory, figures: [])
    options = ["--rows", "1,128", "--shapes", "4096x4096", "--match", "bfloat16", "--out", str(tmp_path)]
    assert bitlinear.main(options) == 0
    assert asked == [("BitLinear bfloat16", cases.HEADLINE, (1, 128))]
    assert "| 4096², M=1 | ≥ 10× torch.nn.Linear float32 | pass | 12.00× (BitLinear float32" in capsys.readouterr().out
    monkeypatch.setattr(
        bitlinear.LayerSession, "measure", lambda self, found: self.report.add(*cell(1, {"bitblas": 1.0}))
    )
    assert bitlinear.main(["--quick"]) == 0  # nothing to compare with, nothing missed
    slow = {**GOOD, "torch.nn.Linear float32": 1e-4}
    monkeypatch.setattr(bitlinear.LayerSession, "measure", lambda self, found: self.report.add(*cell(1, slow)))
    assert bitlinear.main(["--quick"]) == 1
    assert bitlinear.main(["--resume"]) == 2


# -- layers ----------------------------------------------------------------------------------------------------------------


def workload(dtype, m, shape=(32, 256)):
    return bitlinear_layers.draw_ternary(bitlinear_layers.config_of(dtype, shape), m)


def test_a_workload_holds_what_a_layer_holds():
    work = workload("bfloat16", 3)
    assert (work.a.dtype, work.bias.dtype, work.scale.dtype, work.scale.shape) == (
        torch.bfloat16, torch.bfloat16, torch.float32, (1,)
    )  # fmt: skip
    assert work.weight.unique().tolist() == [-1, 0, 1]
    assert not torch.equal(work.weight, bitlinear_layers.draw_ternary(work.config, 3, seed=1).weight)
    layer = bitlinear_layers.deployed(work)
    assert layer.config == work.config
    assert layer.config.activation_eps == bitblas.BitLinear(8, 8).eps
    assert torch.equal(layer.to_quantized().dequantize(), work.dense(torch.float32))


def made(name, work):
    """A candidate with two copies or more, or a skip of the test."""
    found = bitlinear_layers.PEERS[name](work, 1 << 20)
    if isinstance(found, Skipped):
        assert found.missing, found
        pytest.skip(f"SKIPPED {name}: {found.reason}")
    assert found.copies > 1
    return found


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith("transformers") and "eager" not in name else [])
        for name in bitlinear_layers.PEERS
    ],
)
def test_a_layer_computes_what_it_is_asked(name, m):
    work = workload(re.search("float32|bfloat16", name)[0], m)
    candidate = made(name, work)
    assert candidate.name == name
    for index in (0, 1, 2 * candidate.copies):
        verdict = candidate.check(candidate.call(index))
        assert verdict.right, verdict
    assert 0 < verdict.error < 0.06
    # the check is no formality: what is computed of other activations is wrong
    other = dataclasses.replace(work, a=work.a.flip(-1))
    assert not candidate.check(made(name, other).call(0)).right


def test_transformers_layers_are_compiled_for_some_rows():
    for name in ("transformers BitLinear float32", "transformers AutoBitLinear bfloat16"):
        found = bitlinear_layers.PEERS[name](workload("float32", 2), 1)
        assert found == Skipped(name, "is compiled for each M: timed for 1, 16, 128")


def test_without_transformers_its_layers_are_skipped_loudly(monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    session = bitlinear.LayerSession(filled(), None, 0.1, None, 0.0, "")
    for name in [name for name in bitlinear_layers.PEERS if name.startswith("transformers")]:
        found = bitlinear_layers.PEERS[name](workload("float32", 1), 1)
        assert found.missing
        session._announce(cell(1, {"bitblas": 1.0}, skipped=[found])[1])
        assert re.search(f"SKIPPED {name}: No module named .{EXTRA}", capsys.readouterr().err)
    assert set(bitlinear_layers.layer_bytes.__wrapped__((32, 64))) == {
        f"{kind} {dtype}" for kind in ("bitblas BitLinear", "torch.nn.Linear") for dtype in ("float32", "bfloat16")
    }


def test_a_layer_that_cannot_be_compiled_is_skipped(monkeypatch):
    pytest.importorskip("transformers", minversion="5", reason="pip install 'bitblas[transformers]'")

    class Broken(torch.nn.Linear):
        def forward(self, x):
            raise RuntimeError("no C++ compiler\nand more")

    peer = bitlinear_layers.transformers_layer("name {}", lambda work, dtype: Broken(256, 32), "float32")
    assert peer(workload("float32", 1), 1) == Skipped(
        "name float32", "cannot be compiled: no C++ compiler", missing=True
    )


def test_peers_are_chosen_by_case_and_name():
    def names(dtype, match=""):
        session = bitlinear.LayerSession(filled(), None, 0.1, None, 0.0, match)
        return set(session.peers_of(bitlinear.case(dtype, (32, 64))))

    dense, parts = {"torch.nn.Linear float32", "torch.nn.Linear bfloat16"}, set(cases.LAYER_VARIANTS)
    assert names("float16") == dense | parts
    bitnet = {f"transformers {kind}" for kind in ("BitLinear {}", "BitLinear {}, eager", "AutoBitLinear {}")}
    assert names("bfloat16") == dense | parts | {name.format("bfloat16") for name in bitnet}
    assert names("float32", "eager") == {"torch.nn.Linear float32", "transformers BitLinear float32, eager"}


# -- the document ----------------------------------------------------------------------------------------------------------


def test_the_document_holds_a_run():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    section = text.split("\n## BitLinear\n")[1].split("\n## ")[0]
    for name in ("latency", "throughput", "memory"):
        assert f"](images/bitlinear_{name}.png)" in section
    asked = {(rule.group, rule.asked) for rule in bitlinear.RULES}
    assert asked <= {tuple(row.strip("| ").split(" | ")[:2]) for row in section.splitlines() if row.startswith("| ")}
    cells = []
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        heading, _, *rows = ([part.strip() for part in row.strip("|").split("|")] for row in block.splitlines())
        cells += [row for row in rows if heading[:5] == ["", "N × K", "M", "bitblas", "limit"]]
    assert {(row[0], row[1], int(row[2])) for row in cells} == {
        (case.name, "{} × {}".format(*case.shape), m) for case in bitlinear.full() for m in case.rows
    }
    for row in cells:
        for value in row[5:]:
            if value != "–":
                peer, times = (float(part) for part in re.fullmatch(r"([\d.]+) \(([\d.]+)\)", value).groups())
                assert times == pytest.approx(peer / float(row[3]), rel=0.02, abs=0.01), row
