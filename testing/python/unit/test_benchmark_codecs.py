"""python -m benchmark.codecs: every case repacks, the table has its speed, and a missed goal is told."""

import pytest
import torch
from benchmark import codecs

SHAPE = (256, 384)


@pytest.mark.parametrize("name", codecs.CASES)
def test_every_case_repacks(name):
    case = codecs.CASES[name]
    weight = case.repack(**case.draw(*SHAPE))
    group = -1 if weight.W_dtype == "int2" else codecs.GROUP  # ternary weights have one scale
    assert (weight.out_features, weight.in_features, weight.group_size) == (*SHAPE, group)
    assert (weight.perm is not None) == ("act-order" in name)
    assert weight.W_dtype.startswith("int") or "sym" not in name


@pytest.mark.parametrize(("value", "status", "verdict"), [(201.0, 0, "Reached"), (199.0, 1, "MISSED")])
def test_the_table(monkeypatch, capsys, value, status, verdict):
    threads = torch.get_num_threads()
    monkeypatch.setattr(codecs, "speed", lambda case, n, k: value + n / 1e6)
    assert codecs.main(["--shapes", "256x384,128x128", "--match", "gptq v1"]) == status
    heading, _, *lines, _, last = capsys.readouterr().out.splitlines()
    assert heading == "| MB of source a second | 256 x 384 | 128 x 128 |"
    assert len(lines) == sum("gptq v1" in name for name in codecs.CASES)
    assert lines[0] == f"| gptq v1 2 bits | {value:.0f} | {value:.0f} |"
    assert last == f"Goal, for what is repacked: 200 MB a second. {verdict}."
    assert torch.get_num_threads() == threads


def test_quantizing_has_no_goal(monkeypatch, capsys):
    monkeypatch.setattr(codecs, "speed", lambda case, n, k: 1.0)
    assert codecs.main(["--shapes", "128x128", "--match", "quantize"]) == 0


def test_a_speed_is_megabytes_of_source():
    assert 0 < codecs.speed(codecs.CASES["awq 4 bits"], *SHAPE) < 1e6
