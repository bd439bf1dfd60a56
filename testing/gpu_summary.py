"""What `gpu_check.sh` found, as Markdown for docs/performance.md: the machine, the stages, and the benchmark's tables."""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path


def summary(directory: Path, today: str) -> str:
    """The text.

    Parameters
    ----------
    directory : Path
        Of the results: stages.tsv, logs.txt, and gpu.md where cells were measured.
    today : str
        The date.
    """
    parts = [f"### {_card(directory)}, {today}", _stages(directory)]
    tables = directory / "gpu.md"
    if tables.is_file():
        parts.append(tables.read_text(encoding="utf-8").strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def _card(directory: Path) -> str:
    """The card, its driver and torch, as the first stage printed them."""
    text = (directory / "logs.txt").read_text(encoding="utf-8", errors="replace")
    name = re.search(r"_CudaDeviceProperties\(name='([^']+)'", text)
    driver = re.search(r"Driver Version: *([\d.]+)", text)
    torch = re.search(r"^torch (\S+) CUDA (\S+)$", text, re.MULTILINE)
    commit = re.search(r"^commit (\w+) of", text, re.MULTILINE)
    found = [name[1] if name else "no card"]
    found += [f"driver {driver[1]}"] if driver else []
    found += [f"torch {torch[1]}, CUDA {torch[2]}"] if torch else []
    found += [f"commit {commit[1]}"] if commit else []
    return ", ".join(found)


def _stages(directory: Path) -> str:
    rows = [line.split("\t") for line in (directory / "stages.tsv").read_text(encoding="utf-8").splitlines()]
    lines = [f"| {name} | {word} | {seconds} | {last.replace('|', '/')} |" for name, word, seconds, last in rows]
    return "\n".join(["| stage | ended | s | last line |", "|---|---|---|---|", *lines]) if lines else ""


if __name__ == "__main__":
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    sys.stdout.write(summary(Path(sys.argv[1]), date))
