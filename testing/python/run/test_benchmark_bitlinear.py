"""python -m benchmark.bitlinear: a cell of a small layer is measured, and a wrong layer has no time."""

import dataclasses

import pytest
import torch
from benchmark import bitlinear, bitlinear_layers, cases, matmul

from bitblas import Matmul
from bitblas.bench import Machine

SHAPE = (64, 128)


def measured(m, dtype="float32"):
    """The comparison of a small layer's cell, without transformers' layers, some of which would be compiled."""
    report = bitlinear.LayerReport(Machine("cpu", "isa", torch.get_num_threads(), 1 << 20), {})
    session = bitlinear.LayerSession(report, None, 0.01, None, 0.0, "")
    case = dataclasses.replace(bitlinear.case(dtype, SHAPE), peers="^torch")
    return session.compare(Matmul(case.config), m, list(session.peers_of(case).values()))


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr("bitblas.bench.timing.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(bitlinear, "MEMORY_CAP", 1 << 16)


@pytest.mark.parametrize(("m", "dtype"), [(1, "float32"), (17, "bfloat16")])
def test_a_cell(m, dtype):
    row = measured(m, dtype)
    names = ["bitblas", *cases.LAYER_VARIANTS, "torch.nn.Linear float32", "torch.nn.Linear bfloat16"]
    assert [timing.name for timing in row.timings] == names
    assert all(timing.seconds and timing.calls for timing in row.timings)
    assert not row.skipped
    assert (row.m, row.macs, row.weight_bytes) == (m, m * 64 * 128, 64 * 128 // 4)
    assert row.static_bytes == bitlinear_layers.layer_bytes(SHAPE)[f"bitblas BitLinear {dtype}"]
    assert bitlinear.Quantization.of(row).by_difference is not None
    assert [goal.group for goal in bitlinear.judge([(f"BitLinear {dtype}", row)])] == ["static memory"]


def test_a_wrong_layer_has_no_time(monkeypatch):
    real = bitlinear_layers.deployed

    def spoilt(work):
        layer = real(work)
        layer.w_packed.view(-1)[0] ^= 1
        return layer

    monkeypatch.setattr(bitlinear_layers, "deployed", spoilt)
    row = measured(3)
    assert row.ours.seconds is None
    assert row.timing("bitblas, operator").seconds


def test_every_copy_is_called_before_time_is_taken():
    work = bitlinear_layers.draw_ternary(bitlinear_layers.config_of("float32", SHAPE), 1)
    called = []
    layer = bitlinear_layers.deployed(work)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(id(module)))
    try:
        candidate = bitlinear_layers.ours(work, 5 * sum(t.numel() * t.element_size() for t in layer.buffers()))
    finally:
        hook.remove()
    assert candidate.copies == 5
    assert len(called) == len(set(called)) == 5


def test_the_command_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matmul, "measure_machine", lambda threads, probes: Machine("cpu", "isa", threads, 1 << 20))
    monkeypatch.setattr(bitlinear, "full", lambda: [bitlinear.case("float16", SHAPE, (1, 2))])
    options = ["--seconds", "0.01", "--threads", "2", "--out", str(tmp_path)]
    assert bitlinear.main([*options, "--rows", "2"]) == 0
    assert bitlinear.main([*options, "--resume"]) == 0
    said = capsys.readouterr()
    assert "1 cells are in" in said.err
    lines = [row for row in said.out.splitlines() if row.startswith("| BitLinear float16 | 64 × 128 |")]
    assert any(row.startswith("| BitLinear float16 | 64 × 128 | 1 |") for row in lines)
