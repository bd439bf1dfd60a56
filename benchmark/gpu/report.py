"""What a run on a card found, as JSON and Markdown."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

from bitblas.bench import Comparison
from bitblas.bench.card import CardMachine
from bitblas.build import find_compiler
from bitblas.errors import BuildError
from bitblas.target import Target

from .. import report
from ..goals import Goal, shape_of
from ..report import goal_table, line
from . import goals
from .cases import FP16

_EXTRA_VERSIONS = ("gemlite", "triton")
_PARTS = "Medians in µs of launches in CUDA graphs, taken in turns; in brackets how many times as long as bitblas a peer takes."


def driver_version() -> str:
    """What the driver calls itself; empty where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else ""


def versions(target: Target | None = None) -> dict[str, str]:
    """Of all that takes part."""
    found = report.versions()
    for name in _EXTRA_VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    if target is not None:
        from bitblas.cuda.nvcc import nvcc_version

        try:
            found["nvcc"] = nvcc_version(find_compiler(target) or "")
        except (BuildError, OSError, IndexError):
            found["nvcc"] = "missing"
    for name in ("onnxruntime", "openvino", "llama-cpp-python"):
        found.pop(name, None)
    return found


@dataclass
class CardReport(report.Report):
    """All of one run, or of several parts of one, on a card."""

    json_file: ClassVar[str] = "gpu.json"
    markdown_file: ClassVar[str] = "gpu.md"
    same_machine: ClassVar[tuple[str, ...]] = ("name", "capability", "driver", "cuda")

    machine: CardMachine  # type: ignore[assignment]

    @property
    def goals(self) -> list[Goal]:
        """The verdicts on the cells that are there, and the costs."""
        return [*goals.judge(self.results), *self.costs]

    def _fields(self, row: Comparison) -> dict[str, object]:
        return row.fields()

    def markdown(self) -> str:
        """Tables for a document."""
        parts = [self._head()]
        if self.goals:
            parts += ["**Goals**", goal_table(self.goals)]
        compact = speedups(self.results)
        if compact:
            parts += [f"**How many times as long {FP16} takes as bitblas**", compact]
        exact, quantized = self._tables()
        if exact:
            parts += ["**Float activations**", exact]
        if quantized:
            parts += ["**Activations in int8**", quantized]
        notes = self._notes()
        return "\n\n".join(parts + ([notes] if notes else [])) + "\n"

    def _head(self) -> str:
        machine = self.machine
        lines = [
            f"{self.date}, {machine.name} (compute capability {machine.capability}, {machine.sms} multiprocessors),"
        ]
        lines.append(f"driver {machine.driver or 'unknown'}, CUDA {machine.cuda};")
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".")
        best = [f"{machine.bandwidth / 1e9:.0f} GB/s copied"] if machine.bandwidth else []
        best += [f"{2 * rate / 1e12:.0f} TFLOP/s of {name}" for name, rate in machine.peaks.items()]
        if best:
            lines.append(
                f"Measured in the same run: {', '.join(best)}. *Limit*: the part of them that bitblas reaches."
            )
        lines += [f"Note: {note}." for note in machine.notes]
        lines.append(_PARTS)
        return "\n".join(lines)


def speedups(results: Iterable[tuple[str, Comparison]], peer: str = FP16) -> str:
    """A line for each kind and shape, a column for each number of rows."""
    table: dict[tuple[str, tuple[int, int]], dict[int, float]] = {}
    for name, row in results:
        speed = row.speedup(peer)
        if speed is not None:
            table.setdefault((name, shape_of(row)), {})[row.m] = speed
    rows = sorted({m for found in table.values() for m in found})
    if not rows:
        return ""
    lines = [line(["", "N × K", *(f"M={m}" for m in rows)]), "|" + "---|" * (2 + len(rows))]
    for (name, shape), found in table.items():
        cells = [f"{found[m]:.2f}" if m in found else "–" for m in rows]
        lines.append(line([name, "{} × {}".format(*shape), *cells]))
    return "\n".join(lines)
