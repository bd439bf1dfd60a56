"""Programs of the tests under NVIDIA's compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def watch(program: str, case: str, tool: str) -> None:
    """Run a program that takes the name of a case and prints "right", under a tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    here = Path(program)
    # what torch asks of the driver, and is refused, is no error of ours
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command = [sanitizer, *options, sys.executable, str(here), case]
    # each tensor in an allocation of its own, so that what is read or written beside one is seen
    paths = os.pathsep.join(map(str, (here.parent, here.parents[2] / "python", os.environ.get("PYTHONPATH", ""))))
    variables = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=500)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not know this device")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "right" in done.stdout.splitlines()
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "RACECHECK SUMMARY: 0 hazards" in done.stdout
