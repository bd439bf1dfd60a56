"""python -m benchmark.overhead: what it counts, and its status."""

import pytest
from benchmark import overhead


@pytest.mark.parametrize(("layer", "status"), [(5.9e-6, 0), (6.1e-6, 1)])
def test_table_and_status(monkeypatch, capsys, layer, status):
    times = {"kernel": 1e-6, "operator": 3e-6, "bitblas.Linear": layer, "torch.nn.Linear": 2e-6}
    monkeypatch.setattr(overhead, "candidates", lambda dtype, bias: {})
    monkeypatch.setattr(overhead, "measure", lambda calls, rounds: times)
    assert overhead.main([]) == status
    shown = capsys.readouterr().out
    assert f"| 1.00 | 3.00 | {layer * 1e6:.2f} | 2.00 | {layer * 1e6 - 1:.2f} |" in shown


def test_calls_are_timed_in_turns():
    order = []
    found = overhead.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, count=2, rounds=2)
    assert order == ["a", "a", "b", "b"] * 2
    assert all(seconds > 0 for seconds in found.values())
