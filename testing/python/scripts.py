"""Runs scripts in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120


def start(script, **environment):
    """Start a script; variables are set, or removed where None."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "BITBLAS_LOG_LEVEL": None, **environment}
    variables = {name: str(value) for name, value in variables.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    )


def finish(process, timeout=TIMEOUT):
    """What a script printed last, as JSON, and the lines of its standard error. A script that hangs fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), [line for line in err.splitlines() if line]


def report(script, **environment):
    """Run a script to its end."""
    return finish(start(script, **environment))
