"""examples/quickstart.py: right in a cold store, and loaded in a warm one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_quick_start(tmp_path):
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "BITBLAS_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    for origin in ("compiled", "loaded"):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=variables, cwd=tmp_path, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        assert done.stdout.count(f"kernels    {origin}") == 2
        assert done.stdout.count(": right") == 2
        assert done.stdout.count("times as fast") == 2
