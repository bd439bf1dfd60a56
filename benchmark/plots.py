"""Plots of a run, as PNG and SVG: latency, speed-up, the part of what binds, memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitblas.bench import Comparison

from . import cases
from .goals import shape_of

#: Panels of a figure at most, and numbers of rows that a panel has at least: fewer make no line.
MAX_PANELS, LEAST_ROWS = 24, 3
_OURS = {"color": "black", "linewidth": 2, "marker": "o", "markersize": 3}

Results = Sequence[tuple[str, Comparison]]
#: Makes a figure, or None where there is not enough to draw.
Make = Callable[[Results], Any]


def draw(results: Results, directory: Path, figures: Mapping[str, Make] | None = None) -> list[Path]:
    """Draw what there is enough of; return what was written.

    Parameters
    ----------
    results : sequence of (str, Comparison)
        Cells, with the names of their cases.
    directory : Path
        Where files go.
    figures : mapping, optional
        From names of files to what makes their figures; default: `FIGURES`.

    Without matplotlib nothing is, and a line on stderr says so.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        print("SKIPPED the plots: matplotlib is missing: pip install 'bitblas[bench]'", file=sys.stderr)
        return []
    mpl.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, make in (FIGURES if figures is None else figures).items():
        figure = make(results)
        if figure is not None:
            for path in (directory / f"{name}.png", directory / f"{name}.svg"):
                figure.savefig(path, dpi=100)
                written.append(path)
            pyplot.close(figure)
    return written


def memory_of(results: Iterable[tuple[str, Comparison]]) -> dict[str, tuple[tuple[int, int], int, int]]:
    """By case: the shape, bytes of the packed weight with its scales and zeros, and of the dense weight in A's dtype.

    At the first shape of each case; an int8 layer's dense weight has a byte each.
    """
    found = {}
    for name, row in results:
        (N, K), dtype = shape_of(row), str(row.workload["A_dtype"])
        if row.static_bytes and name not in found and " on " not in name:
            dense = N * K * {"float32": 4, "int8": 1}.get(dtype, 2)
            found[name] = ((N, K), row.static_bytes, dense)
    return found


def _panels(results: Results) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = {}
    for name, row in sorted(results, key=lambda each: shape_of(each[1]) != cases.HEADLINE):
        found.setdefault("{}, {} × {}".format(name, *shape_of(row)), []).append(row)
    long = {title: sorted(rows, key=lambda row: row.m) for title, rows in found.items() if len(rows) >= LEAST_ROWS}
    return dict(list(long.items())[:MAX_PANELS])


def _names(results: Results) -> list[str]:
    found = dict.fromkeys(timing.name for _, row in results for timing in row.timings[1:])
    return [name for name in found if name not in cases.VARIANTS]


@dataclass(frozen=True)
class Scale:
    """A second axis of a panel, at its right: what `factor` gives times the left one's numbers."""

    label: str
    factor: Callable[[Comparison], float]

    def add(self, axis: Any, row: Comparison) -> None:
        """Draw it."""
        factor = self.factor(row)
        axis.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor)).set_ylabel(self.label)


def grid(
    results: Results,
    label: str,
    value: Callable[[Comparison, str], float | None],
    ours: str | None,
    right: Scale | None = None,
    columns: int = 4,
) -> Any:
    """A panel for each case and shape with enough rows: a line for each peer over M, both axes logarithmic."""
    from matplotlib import pyplot

    panels, names = _panels(results), _names(results)
    if not panels:
        return None
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.4 * columns, 3.0 * lines + 0.8), squeeze=False)
    styles = {name: {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]} for i, name in enumerate(names)}
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        for name in [*names, *([ours] if ours else [])]:
            points = [(row.m, value(row, name)) for row in rows]
            points = [(m, y) for m, y in points if y is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, **(_OURS if name == ours else styles[name]))
        if ours is None:
            axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="M", ylabel=label)
        axis.set_xticks([row.m for row in rows], [str(row.m) for row in rows], fontsize=7)
        axis.minorticks_off()
        if right is not None:
            right.add(axis, rows[0])
        axis.set_title(title, fontsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="upper center", ncol=min(6, 1 + columns), frameon=False, fontsize=8)
    height = 3.0 * lines + 0.8
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.25 + 0.22 * math.ceil(len(handles) / min(6, 1 + columns))) / height))
    return figure


def latency(results: Results, columns: int = 4) -> Any:
    """Times over M."""

    def value(row: Comparison, name: str) -> float | None:
        timing = row.timing(name)
        return timing.seconds * 1e6 if timing and timing.seconds else None

    return grid(results, "µs", value, "bitblas", columns=columns)


def _speedup(results: Results) -> Any:
    return grid(results, "times as long as bitblas", lambda row, name: row.speedup(name), None)


def _roofline(results: Results) -> Any:
    """Bars of what each case reaches at one row, and lines over M."""
    from matplotlib import pyplot

    bounds = [(name, row, bound) for name, row in results if (bound := row.roofline()) is not None]
    if not bounds:
        return None
    single = [
        each for each in bounds if each[1].m == 1 and shape_of(each[1]) in (cases.HEADLINE, shape_of(bounds[0][1]))
    ]
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, row, (_, part) in bounds:
        lines.setdefault("{}, {} × {}".format(name, *shape_of(row)), []).append((row.m, part))
    long = {title: sorted(points) for title, points in lines.items() if len(points) >= LEAST_ROWS}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, max(5, 0.26 * len(single) + 1)))
    kinds = list(dict.fromkeys(bound[0].split()[0] for _, _, bound in bounds))
    for place, (_, _, (kind, part)) in enumerate(single):
        left.barh(place, part, color=f"C{kinds.index(kind.split()[0])}")
        left.text(part, place, f" {kind}", va="center", fontsize=6)
    left.set_yticks(range(len(single)), [name for name, _, _ in single], fontsize=7)
    left.invert_yaxis()
    left.set_title("part of what binds, M=1", fontsize=9)
    for index, (title, points) in enumerate(list(long.items())[:MAX_PANELS]):
        right.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            label=title,
            color=f"C{index % 10}",
            linestyle=("-", "--", ":")[index // 10 % 3],
        )
    right.set(xscale="log", xlabel="M", ylim=(0, None))
    right.set_title("part of what binds, by M", fontsize=9)
    if long:
        right.legend(fontsize=6)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.axvline(1, color="black", linewidth=0.8)
    right.axhline(1, color="black", linewidth=0.8)
    figure.tight_layout()
    return figure


def _memory(results: Results) -> Any:
    from matplotlib import pyplot

    found = memory_of(results)
    if not found:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 0.26 * len(found) + 1.2))
    for place, (_, packed, dense) in enumerate(found.values()):
        axis.barh(
            place, dense / 1e6, color="lightgray", label="dense, in the activations' dtype" if place == 0 else None
        )
        label = "packed, with scales and zeros" if place == 0 else None
        axis.barh(place, packed / 1e6, color="C0", height=0.5, label=label)
        axis.text(dense / 1e6, place, f" {packed / dense:.0%} of {dense / 1e6:.0f} MB", va="center", fontsize=7)
    titles = ["{}, {} × {}".format(name, *shape) for name, (shape, _, _) in found.items()]
    axis.set_yticks(range(len(found)), titles, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("MB")
    axis.set_xlim(0, 1.18 * max(dense for _, _, dense in found.values()) / 1e6)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2, frameon=False)
    figure.tight_layout()
    return figure


#: What `draw` draws, by the names of the files.
FIGURES: dict[str, Make] = {"latency": latency, "speedup": _speedup, "roofline": _roofline, "memory": _memory}
