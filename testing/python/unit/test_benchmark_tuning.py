"""python -m benchmark.tuning: what it counts, and that it goes on where it was left."""

import json

import pytest
from benchmark import tuning
from benchmark.cases import ROWS, SHAPES


def record(**by_rows):
    return {"buckets": {name.removeprefix("m"): {"gain": gain} for name, gain in by_rows.items()}}


def test_every_cell_is_there_once():
    found = tuning.cells()
    assert len({tuning.key(one) for one in found}) == len(found) == 4 * len(SHAPES)
    assert {one.rows for one in found} == {ROWS}
    assert {one.shape for one in found} == set(SHAPES)
    assert {(one.config.A_dtype, one.config.W_dtype) for one in found} == {
        *(("float16", "uint4"), ("float16", "uint2")),
        *(("int8", "int4"), ("int8", "int2")),
    }


def test_the_table():
    *lines, _, last = tuning.table({"a": record(m1=1.0, m2=1.1), "b": record(m1=1.11)})
    assert lines[2].startswith("| a | 1.00 | 1.10 | – |")
    assert lines[3].startswith("| b | 1.11 | – |")
    assert last == "2 of 3 cells are within 10% of the tuned; the goal is 90% of them."


@pytest.mark.parametrize(("gain", "status"), [(1.0, 0), (1.2, 1)])
def test_it_goes_on_where_it_was_left(tmp_path, monkeypatch, capsys, gain, status):
    done = []
    monkeypatch.setattr(tuning, "measure", lambda one, seconds: done.append(tuning.key(one)) or record(m1=gain))
    arguments = ["--out", str(tmp_path), "--match", "uint4", "--most", "3"]
    assert tuning.main(arguments) == status
    assert len(done) == 3
    assert tuning.main(arguments) == status
    assert len(set(done)) == len(done) == len(SHAPES)
    assert set(json.loads((tmp_path / "tuning.json").read_text())) == set(done)
    assert (tmp_path / "tuning.md").read_text() in capsys.readouterr().out
