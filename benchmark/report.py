"""What a run found, as JSON, Markdown and a plot."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from bitblas.bench import Comparison, Machine

from .goals import Goal

_VERSIONS = ("bitblas", "torch", "apache-tvm", "apache-tvm-ffi", "onnxruntime")


def _versions() -> dict[str, str]:
    import bitblas

    found = {"python": platform.python_version(), "bitblas": bitblas.__version__}
    for name in _VERSIONS[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


@dataclass
class Report:
    """All of one run."""

    machine: Machine
    versions: dict[str, str] = field(default_factory=_versions)
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"))
    results: list[tuple[str, Comparison]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(
            {
                "date": self.date,
                "machine": self.machine.fields(),
                "versions": self.versions,
                "results": [{"case": name, **row.fields(self.machine)} for name, row in self.results],
                "goals": [asdict(goal) for goal in self.goals],
            },
            indent=1,
        )

    def markdown(self) -> str:
        """Tables for a document."""
        parts = [self._head()]
        if self.goals:
            parts.append(_goal_table(self.goals))
        for title, exact in (
            ("Exact activations", True),
            ("Activations quantized to int8 on the way", False),
        ):
            table = self._table(exact)
            if table:
                parts.append(f"**{title}**\n\n{table}")
        reasons = sorted({f"{peer.name}: {peer.reason}" for _, row in self.results for peer in row.skipped})
        if reasons:
            parts.append("Not measured where a peer cannot:\n\n" + "\n".join(f"- {reason}" for reason in reasons))
        return "\n\n".join(parts) + "\n"

    def _head(self) -> str:
        machine, lines = self.machine, []
        lines.append(f"{self.date}, {machine.cpu} ({machine.isa}), {machine.threads} threads;")
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".")
        if machine.bandwidth and machine.fma:
            lines.append(
                f"Measured in the same run: {machine.bandwidth / 1e9:.1f} GB/s read, "
                f"{machine.fma / 1e9:.0f} G float32 FMA/s."
            )
        lines += [f"Note: {note}." for note in machine.notes]
        lines.append("Medians in µs, taken in turns; in brackets how many times as long as bitblas a peer takes.")
        return "\n".join(lines)

    def _table(self, exact: bool) -> str:
        """Peers whose activations are exact, or those that quantize them, beside ours."""
        kinds = {t.name: t.exact for _, row in self.results for t in row.timings[1:]}
        names = [name for name, is_exact in kinds.items() if is_exact == exact]
        rows = [(name, row) for name, row in self.results if any(row.timing(peer) for peer in names)]
        if not rows:
            return ""
        header = ["", "N × K", "M", "bitblas", "of bandwidth", "of FMA peak", *names]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for name, row in rows:
            shape = f"{row.workload['N']} × {row.workload['K']}"
            cells = [name, shape, str(row.m), _microseconds(row.ours.seconds)]
            cells += [_share(row.bandwidth_fraction(self.machine)), _share(row.fma_fraction(self.machine))]
            cells += [_peer_cell(row, peer) for peer in names]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def write(self, directory: Path) -> list[Path]:
        """Write matmul.json, matmul.md, and with matplotlib matmul.png and matmul.svg; return what was written."""
        directory.mkdir(parents=True, exist_ok=True)
        written = [directory / "matmul.json", directory / "matmul.md"]
        written[0].write_text(self.json() + "\n", encoding="utf-8")
        written[1].write_text(self.markdown(), encoding="utf-8")
        return written + plot(self.results, directory)


def _microseconds(seconds: float | None) -> str:
    return "wrong" if seconds is None else f"{seconds * 1e6:.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _peer_cell(row: Comparison, name: str) -> str:
    timing, speedup = row.timing(name), row.speedup(name)
    if timing is None:
        return "–"
    return _microseconds(timing.seconds) + ("" if speedup is None else f" ({speedup:.2f})")


def _goal_table(goals: Iterable[Goal]) -> str:
    lines = ["| goal | asked | measured | |", "|---|---|---|---|"]
    lines += [f"| {goal.name} | {goal.asked} | {goal.measured} | {goal.verdict} |" for goal in goals]
    return "\n".join(lines)


def plot(results: Sequence[tuple[str, Comparison]], directory: Path) -> list[Path]:
    """Draw the speed of every candidate over torch's float32, a panel for each case."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("SKIPPED the plot: matplotlib is missing: pip install 'bitblas[bench]'", file=sys.stderr)
        return []
    panels: dict[str, list[Comparison]] = {}
    for name, row in results:
        panels.setdefault(f"{name}, {row.workload['N']} × {row.workload['K']}", []).append(row)
    if not panels:
        return []
    mpl.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, 3.2 * lines), squeeze=False)
    names = list(dict.fromkeys(timing.name for _, row in results for timing in row.timings))
    colors = {name: f"C{index % 10}" for index, name in enumerate(names)}
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, rows, colors)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, names, loc="upper center", ncol=min(4, len(names)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (3.2 * lines) - 0.02))
    written = [directory / "matmul.png", directory / "matmul.svg"]
    for path in written:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return written


def _panel(axis, title: str, rows: Sequence[Comparison], colors: dict[str, str]) -> None:
    names = [name for name in colors if any(row.timing(name) for row in rows)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        for index, row in enumerate(rows):
            base, timing = row.timing("torch float32"), row.timing(name)
            if base is None or timing is None or not base.seconds or not timing.seconds:
                continue
            axis.bar(index + (place + 0.5) * width - 0.4, base.seconds / timing.seconds, width, color=colors[name])
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_xticks(range(len(rows)), [f"M={row.m}" for row in rows])
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("× torch float32", fontsize=8)
