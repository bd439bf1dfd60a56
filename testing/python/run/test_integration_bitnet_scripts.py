"""integration/BitNet/*.py: every script explains itself, runs on a small model, refuses what is wrong."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bitblas
import eval_correctness
import eval_ppl
import scripting

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "integration" / "BitNet"
LIBRARY = {"configuration_bitnet", "modeling_bitnet", "utils_quant", "scripting"}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in LIBRARY)
SMALL = ["--hidden", "64", "--layers", "1", "--vocab", "97", "--threads", "1"]
#: Arguments beside those, by script, that make it fast.
FAST = {
    "benchmark_generate": ["--batches", "1,2", "--new-tokens", "2", "--prompt-tokens", "3", "--rounds", "1"],
    "benchmark_inference_latency": ["--sets", "1x5,2x3", "--rounds", "1"],
    "eval_correctness": ["--tokens", "8", "--new-tokens", "4"],
    "eval_ppl": ["--train", "2", "--most", "256", "--length", "16"],
    "load_from_quantized": ["--new-tokens", "3"],
    "create_bitblas_ckpt": ["--new-tokens", "3"],
    "eval_gpu_memory": [],
}
#: Heads of the tables that they print.
HEADS = {
    "benchmark_generate": "| batch | dense tokens/s | packed tokens/s | times |",
    "benchmark_inference_latency": "| batch | tokens |    pass | dense ms | packed ms | times | packed tokens/s |",
    "eval_correctness": "found",
    "eval_ppl": "perplexity",
    "load_from_quantized": "| files MB | load s | prompt | new tokens | tokens/s |",
    "create_bitblas_ckpt": "| files MB | load s | prompt | new tokens | tokens/s |",
    "eval_gpu_memory": "float MiB",
}


def start(script, *arguments):
    """Run a script as a user does."""
    command = [sys.executable, str(FOLDER / f"{script}.py"), *arguments]
    paths = f"{ROOT / 'python'}:{ROOT / 'integration' / 'transformers'}"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment(paths))
    assert "Traceback" not in done.stderr, done.stderr
    return done


def environment(paths):
    return {**os.environ, "PYTHONPATH": paths}


def main(script, monkeypatch, capsys, *arguments):
    """Run a script in this process; its exit status and what it printed."""
    module = __import__(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    threads = torch.get_num_threads()
    try:
        status = scripting.run(module.arguments(), module.convert if hasattr(module, "convert") else module.measure)
    finally:
        torch.set_num_threads(threads)
    return status, capsys.readouterr()


def test_all_scripts_are_known():
    assert set(SCRIPTS) == set(FAST) == set(HEADS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_explains(script, capsys):
    module = __import__(script)
    text = module.arguments().format_help()
    assert module.__doc__.split(":")[0].split(".")[0] in " ".join(text.split())
    assert f"python {script}.py" in text
    assert all(len(line) <= 128 for line in text.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["eval_correctness"])
def test_a_script_runs_as_a_process(script):
    done = start(script, *SMALL, *FAST[script])
    assert done.returncode == 0, done.stdout + done.stderr
    assert HEADS[script] in done.stdout
    wrong = start(script, "--hidden", "100")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--hidden is 100; it must be a multiple of 64" in wrong.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_on_a_small_model(script, monkeypatch, capsys):
    status, printed = main(script, monkeypatch, capsys, *SMALL, *FAST[script])
    assert status == 0, printed.out + printed.err
    assert HEADS[script] in printed.out
    assert "bitblas " + bitblas.__version__ in printed.out
    lines = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert len(lines) >= 3


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "100"], "--hidden is 100; it must be a multiple of 64"),
        (["--device", "cuda:77"], "--device cuda:77: torch sees"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--device", "meta"], "--device meta: there are kernels for cpu and cuda"),
    ],
)
def test_mistakes_have_a_message(script, arguments, message, monkeypatch, capsys):
    status, printed = main(script, monkeypatch, capsys, *arguments)
    assert status == 2
    assert f"{script}.py: error: {message}" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "arguments", [["--layers", "0"], ["--layers", "many"], ["--dtype", "int8"], ["--nonsense"], ["--threads", "-1"]]
)
def test_arguments_that_do_not_parse(script, arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        main(script, monkeypatch, capsys, *arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith(("eval", "benchmark"))])
def test_a_model_that_is_nowhere(script, monkeypatch, capsys, tmp_path):
    status, printed = main(script, monkeypatch, capsys, "--model", str(tmp_path))
    assert status == 2
    assert f"{tmp_path} cannot be loaded" in printed.err


def test_a_model_that_torch_cannot_read():
    def load(name):
        raise error

    error = RuntimeError("no such operator")
    with pytest.raises(bitblas.errors.ArgumentError, match="somewhere cannot be loaded: no such operator"):
        scripting.from_hub("somewhere", load)
    error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        scripting.from_hub("somewhere", load)


@pytest.mark.parametrize("script", ["load_from_quantized", "create_bitblas_ckpt"])
def test_a_folder_that_is_nowhere(script, monkeypatch, capsys, tmp_path):
    status, printed = main(
        script, monkeypatch, capsys, str(tmp_path / "no"), *[str(tmp_path / "new")][: script[0] == "c"]
    )
    assert status == 2
    assert f"{tmp_path / 'no'} is no folder" in printed.err


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed folder of a small model."""
    folder = tmp_path_factory.mktemp("packed")
    options = scripting.parser("").parse_args([*SMALL])
    options.device = torch.device("cpu")
    scripting.float_model(options).quantize().save_quantized(folder)
    return str(folder)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith(("eval_ppl", "eval_gpu", "benchmark"))])
def test_a_packed_folder_is_measured_by_itself(script, packed, monkeypatch, capsys):
    extra = ["--train", "0"] if script == "eval_ppl" else []
    status, printed = main(script, monkeypatch, capsys, "--packed", packed, *FAST[script], *extra)
    assert status == 0, printed.out + printed.err
    assert "packed" in printed.out
    assert "dense" not in printed.out
    assert packed in printed.out
    with pytest.raises(SystemExit):
        main(script, monkeypatch, capsys, "--packed", packed, "--model", packed)


def test_a_packed_folder_is_loaded(packed, monkeypatch, capsys):
    status, printed = main("load_from_quantized", monkeypatch, capsys, packed, "--new-tokens", "3")
    assert status == 0, printed.out + printed.err
    assert len(printed.out.splitlines()[-1].split()) == 2 + 3  # "generated: tokens", and three
    status, printed = main("load_from_quantized", monkeypatch, capsys, packed, "--prompt", "Hello")
    assert (status, "--prompt needs a folder with a tokenizer" in printed.err) == (2, True)
    status, printed = main("eval_correctness", monkeypatch, capsys, "--model", packed)
    assert (status, "from_quantized" in printed.err) == (1, True)


def test_differences_that_are_too_large_fail(monkeypatch, capsys):
    status, printed = main("eval_ppl", monkeypatch, capsys, *SMALL, *FAST["eval_ppl"], "--tolerance", "-1")
    assert status == 1, printed.out
    status, printed = main("eval_gpu_memory", monkeypatch, capsys, *SMALL, "--limit", "1.9")
    assert status == 1, printed.out
    monkeypatch.setattr(eval_correctness, "EPS", 0.06)  # more than the mean magnitude, and than some activations
    status, printed = main("eval_correctness", monkeypatch, capsys, *SMALL, *FAST["eval_correctness"])
    assert status == 1, printed.out


# -- perplexity ------------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A model whose logits are a row of a table for each token."""

    device = torch.device("cpu")

    def __init__(self, vocab):
        super().__init__()
        self.rows = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens, **options):
        return SimpleNamespace(logits=self.rows[tokens])


@pytest.mark.parametrize(("count", "length", "batch"), [(40, 8, 2), (47, 8, 3), (8, 8, 1), (30, 2, 8)])
def test_perplexity(count, length, batch):
    tokens = torch.randint(11, (count,), generator=torch.Generator().manual_seed(1))
    model = Table(11)
    rows, text = model.rows.double().numpy(), tokens.tolist()
    losses = []
    for first in range(0, count - length + 1, length):
        for place in range(first + 1, first + length):
            row = rows[text[place - 1]]
            losses.append(np.log(np.exp(row).sum()) - row[text[place]])
    assert eval_ppl.perplexity(model, tokens, length, batch) == pytest.approx(math.exp(np.mean(losses)), rel=1e-12)


def test_files_of_tokens(monkeypatch, capsys, tmp_path):
    wanted = np.arange(200) % 97
    np.save(tmp_path / "tokens.npy", wanted.astype(np.int32))
    assert np.array_equal(eval_ppl.read_array(tmp_path / "tokens.npy").numpy(), wanted)
    for name, array, message in (
        ("floats", np.ones(100), "expected integers in one dimension"),
        ("square", np.ones((10, 10), np.int64), "expected integers in one dimension"),
        ("many", np.full(100, 97), "the model knows 0 to 96"),
        ("few", np.ones(3, np.int64), "there are 3 tokens; a window takes 16"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        arguments = [*SMALL, *FAST["eval_ppl"], "--tokens", str(tmp_path / f"{name}.npy")]
        status, printed = main("eval_ppl", monkeypatch, capsys, *arguments)
        assert (status, message in printed.err) == (2, True), printed.err
    (tmp_path / "text.npy").write_text("no array")
    status, printed = main("eval_ppl", monkeypatch, capsys, *SMALL, "--tokens", str(tmp_path / "text.npy"))
    assert (status, "is no file of NumPy" in printed.err) == (2, True)
    status, printed = main("eval_ppl", monkeypatch, capsys, *SMALL, "--text", str(tmp_path / "text.npy"))
    assert (status, "needs a folder with a tokenizer" in printed.err) == (2, True)


def test_the_synthetic_text_can_be_learnt():
    text = eval_ppl.synthetic(0, 50, 4000)
    assert text.min() >= 0
    assert text.max() < 50
    pairs = torch.stack([text[:-1], text[1:]], 1)
    _, counts = pairs.unique(dim=0, return_counts=True)
    assert counts.sort(descending=True).values[:50].sum() > 0.8 * len(pairs)  # 50 successors make up 7 of 8 pairs
    other = eval_ppl.synthetic(1, 50, 4000)
    assert not torch.equal(text, other)


# -- what they share -------------------------------------------------------------------------------------------------------


def test_tables_are_aligned():
    found = scripting.table(["name", "ms"], [("a", "1.00"), ("longer", "10.00")])
    assert found.splitlines() == [
        "| name   |    ms |",
        "| :----- | ----: |",
        "| a      |  1.00 |",
        "| longer | 10.00 |",
    ]


def test_turns(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(scripting.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    found = scripting.in_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, torch.device("cpu"), rounds=2
    )
    assert calls == ["a", "b"] * 3
    assert found == {"a": 1.0, "b": 1.0}
