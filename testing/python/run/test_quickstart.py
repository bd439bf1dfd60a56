"""The examples: right in a cold store, and loaded in a warm one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(name, folder):
    """What an example prints, with a store in `folder`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "BITBLAS_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
def test_the_quick_start(tmp_path):
    for origin in ("compiled", "loaded"):
        printed = run("quickstart.py", tmp_path)
        assert printed.count(f"kernels    {origin}") == 2
        assert printed.count(": right") == 2
        assert printed.count("times as fast") == 2


@pytest.mark.slow
def test_a_model(tmp_path):
    printed = run("model.py", tmp_path)
    assert "33.6 MB -> 4.5 MB" in printed
    assert "the same outputs" in printed
    assert "20 steps of an adapter" in printed


@pytest.mark.slow
def test_a_ternary_net(tmp_path):
    printed = run("ternary.py", tmp_path)
    assert "1.09 MB -> 0.07 MB" in printed
    assert "the same outputs" in printed


@pytest.mark.slow
def test_attention(tmp_path):
    for origin in ("compiled", "loaded"):
        printed = run("attention.py", tmp_path)
        assert f"kernels {origin}" in printed
        assert ": right" in printed
