"""testing/gpu_check.sh, as far as it goes without a card: every stage, in a dry run; the time it keeps to; what it writes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_summary
import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "testing" / "gpu_check.sh"
STAGES = ["environment", "rules", "streams", "goals", "attention", "sanitizer", "operators", "run", "tuning", "formats"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def check(out, *arguments, **environment):
    variables = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "BITBLAS_TARGET": "", **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=variables, check=False, timeout=300
    )


def stages(out):
    return [line.split("\t") for line in (out / "stages.tsv").read_text().splitlines()]


@pytest.mark.parametrize("name", ["gpu_check.sh", "pack_site.sh"])
def test_the_shell_understands_it(name):
    done = subprocess.run(["bash", "-n", str(SCRIPT.parent / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.access(SCRIPT.parent / name, os.X_OK)


def test_the_stages_and_their_time(tmp_path):
    done = check(tmp_path, "--list")
    assert done.returncode == 0, done.stderr
    names = [line.split(" (")[0] for line in done.stdout.splitlines()]
    assert names == STAGES
    limits = [int(line.split(" (")[1].split(" s)")[0]) for line in done.stdout.splitlines()]
    assert sum(limits[:4]) <= 570  # what matters most has its time whatever the rest takes
    assert check(tmp_path, "--what").returncode == 2


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path):
    done = check(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "logs.txt").read_text()
    assert [(row[0], row[1]) for row in stages(tmp_path)] == [(name, "well") for name in STAGES]
    text = (tmp_path / "gpu_check.md").read_text()
    assert text.startswith("### no card")
    assert all(f"| {name} | well |" in text for name in STAGES)
    logs = (tmp_path / "logs.txt").read_text()
    assert "test_what_a_side_stream_still_computes_is_waited_for" in logs
    assert "float16 x int4 g128 16384 x 16384" in logs
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_check.md", "logs.txt", "stages.tsv"}


def test_stages_for_which_there_is_no_time_are_left_out(tmp_path):
    done = check(tmp_path, "--dry-run", SECONDS_ALL="5")
    assert done.returncode == 0, done.stderr
    assert [(row[0], row[1]) for row in stages(tmp_path)] == [(name, "left out") for name in STAGES]


def test_a_machine_without_a_card_is_told_so(tmp_path):
    done = check(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stderr
    assert [row[:2] for row in stages(tmp_path)] == [["environment", "failed (1)"]]


PRETENDER = """#!/bin/bash
echo "$*" >> {calls}
case "$*" in
  *gpu_summary.py*) exec {python} "$@" ;;
  *benchmark.gpu*)
    out=$(echo "$*" | sed 's/.*--out \\([^ ]*\\).*/\\1/')
    mkdir -p "$out"
    echo "{{}}" > "$out/gpu.json"
    echo "**Goals**" > "$out/gpu.md"
    [ "$(grep -c benchmark.gpu {calls})" -eq 1 ] && exit 3
    exit 0 ;;
  *"-k sanitizer") echo "1 failed, 9 passed in 3.00s"; exit 1 ;;
  *test_cuda_tuning.py) exec sleep 60 ;;
  *pytest*) echo "5 passed in 1.00s" ;;
  *) cat > /dev/null < /dev/null; echo fine ;;
esac
"""


@pytest.mark.slow
def test_on_a_card_what_fails_or_is_cut_leaves_the_rest(tmp_path):
    """With a Python that pretends: the benchmark loses the card once, a stage fails, another takes too long."""
    pretender, calls = tmp_path / "python", tmp_path / "calls"
    pretender.write_text(PRETENDER.format(python=sys.executable, calls=calls))
    pretender.chmod(0o755)
    done = check(tmp_path / "out", PYTHON=str(pretender), SECONDS_ALL="25", JOBS="3")
    assert done.returncode == 1
    found = {row[0]: row[1:] for row in stages(tmp_path / "out")}
    assert list(found) == STAGES
    assert found["rules"][0] == found["goals"][0] == found["run"][0] == "well"
    assert found["rules"][2] == "5 passed in 1.00s"
    assert found["sanitizer"][0] == "failed (1)"
    assert found["tuning"][0] == "cut"
    assert found["formats"][0] == "left out"
    runs = [line for line in calls.read_text().splitlines() if "benchmark.gpu" in line]
    assert len(runs) == 2
    assert all("--resume --jobs 3" in line and line.endswith("--goals") for line in runs)
    assert (tmp_path / "out" / "gpu.json").is_file()
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "| sanitizer | failed (1) |" in text
    assert text.endswith("**Goals**\n")


def test_the_summary(tmp_path):
    (tmp_path / "logs.txt").write_text(
        "| NVIDIA-SMI 580.159  Driver Version: 580.159.03  CUDA Version: 13.0 |\ntorch 2.11.0+cu130 CUDA 13.0\n"
        "0 _CudaDeviceProperties(name='NVIDIA H200', major=9, minor=0)\ncommit 1234567 of 2026-11-21\n"
    )
    (tmp_path / "stages.tsv").write_text("rules\twell\t31\t5 passed | in 30 s\nrun\tcut\t150\t\n")
    text = gpu_summary.summary(tmp_path, "2026-11-22")
    assert text.startswith(
        "### NVIDIA H200, driver 580.159.03, torch 2.11.0+cu130, CUDA 13.0, commit 1234567, 2026-11-22\n"
    )
    assert "| rules | well | 31 | 5 passed / in 30 s |\n| run | cut | 150 |  |\n" in text
    (tmp_path / "gpu.md").write_text("**Goals**\n")
    assert gpu_summary.summary(tmp_path, "2026-11-22").endswith("**Goals**\n")
