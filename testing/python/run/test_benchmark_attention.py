"""python -m benchmark.attention: a cell is measured; a call holds no matrix of scores, and one that does is seen."""

import sys

import pytest
from benchmark import attention, attention_cells, attention_memory, matmul
from benchmark.attention_cells import OURS, PEERS, SDPA, Place, make_case

from bitblas import FlashAtten
from bitblas.bench import Machine

THREADS = 2


@pytest.fixture
def _hurry(monkeypatch):
    monkeypatch.setattr("bitblas.bench.timing.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(attention_cells, "MEMORY_CAP", 1 << 16)


@pytest.mark.usefixtures("_hurry")
@pytest.mark.parametrize(
    ("dtype", "causal", "queries", "heads", "heads_kv", "keys"),
    [("float32", True, 130, 2, 2, None), ("bfloat16", False, 1, 4, 2, 200), ("float16", True, 70, 2, 1, None)],
)
def test_a_cell(dtype, causal, queries, heads, heads_kv, keys):
    case = make_case(dtype, causal, queries, 16, heads, heads_kv, keys)
    row = attention_cells.compare(FlashAtten(case.config, target="llvm"), [PEERS[SDPA]], 0.01, Place())
    assert [timing.name for timing in row.timings] == [OURS, SDPA]
    assert all(timing.seconds and timing.calls for timing in row.timings)
    assert attention.key_of(case.name, row) == (case.name, *case.shape, *case.rows)


@pytest.mark.usefixtures("_hurry")
def test_a_wrong_operator_has_no_time():
    case = make_case("float32", False, 130, 16, 2)
    op = FlashAtten(make_case("float32", True, 130, 16, 2).config, target="llvm")
    op.config = case.config
    row = attention_cells.compare(op, [PEERS[SDPA]], 0.01, Place())
    assert row.ours.seconds is None
    assert row.timing(SDPA).seconds


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_matrix_of_scores_is_held(dtype):
    """Of 4096 x 4096 scores in float32, 64 MiB, a call holds less than a megabyte a thread."""
    config = make_case(dtype, True, 4096, 64, 1).config
    FlashAtten(config, target="llvm")  # built here, so that the process only loads it
    found = attention_memory.measure(OURS, config, THREADS)
    assert 0 < found.per_thread <= attention.THREAD_BYTES, found
    assert found.later <= found.first + (1 << 18), found


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_a_matrix_of_scores_is_seen():
    found = attention_memory.measure(attention_memory.NAIVE, make_case("float32", False, 2048, 64, 1).config, THREADS)
    assert min(found.first, found.later) > 0.9 * 2048**2 * 4


def test_the_command_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bitblas.bench.timing.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(matmul, "measure_machine", lambda threads, probes: Machine("cpu", "isa", threads, 1 << 20))
    shape = ["--dtypes", "float32", "--dims", "16", "--heads", "2", "--no-few-queries", "--no-memory"]
    given = [*shape, "--seconds", "0.01", "--threads", "2", "--out", str(tmp_path)]
    assert attention.main([*given, "--lengths", "20"]) == 0
    assert attention.main([*given, "--lengths", "20,33", "--resume"]) == 0
    said = capsys.readouterr()
    assert "2 cells are in" in said.err
    for length, runs in ((20, 2), (33, 1)):
        assert said.out.count(f"| (1, 2, {length}, 16) |") == 2 * runs  # causal, and not
