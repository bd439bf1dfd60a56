"""What a run found, as JSON and Markdown; a run that was cut is read again from its JSON."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from bitblas.bench import Comparison, Machine
from bitblas.build import toolchain

from . import cases, goals, peers, plots
from .goals import Goal, shape_of

_VERSIONS = ("bitblas", "torch", "apache-tvm", "apache-tvm-ffi", "onnxruntime", "openvino", "llama-cpp-python")

#: What tells a cell: the case's name, its sizes (N and K), m.
Key = tuple[str | int, ...]


def versions() -> dict[str, str]:
    """Of all that takes part; `kernels` is a digest of what writes ours."""
    import bitblas

    tools = toolchain()
    digest = hashlib.sha256((tools["sources"] + tools["generator"]).encode()).hexdigest()
    found = {"python": platform.python_version(), "bitblas": bitblas.__version__, "kernels": digest[:8]}
    for name in _VERSIONS[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def key_of(name: str, row: Comparison) -> Key:
    """What tells a cell."""
    return (name, *shape_of(row), row.m)


@dataclass
class Report:
    """All of one run, or of several parts of one, on a CPU.

    Attributes
    ----------
    machine : Machine
        Where it ran.
    versions : dict of str to str
        With what.
    date : str
        When, in UTC.
    results : list of (str, Comparison)
        The cells, with the names of their cases.
    costs : list of Goal
        The goals that are not about cells.
    """

    #: Names of the files.
    json_file: ClassVar[str] = "matmul.json"
    markdown_file: ClassVar[str] = "matmul.md"
    #: What of a machine must be the same for two runs to be one.
    same_machine: ClassVar[tuple[str, ...]] = ("cpu", "isa", "threads", "cache_bytes")
    key_of: ClassVar[Callable[[str, Comparison], Key]] = staticmethod(key_of)

    machine: Machine
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"))
    results: list[tuple[str, Comparison]] = field(default_factory=list)
    costs: list[Goal] = field(default_factory=list)

    @property
    def goals(self) -> list[Goal]:
        """The verdicts on the cells that are there, and the costs."""
        return [*goals.judge(self.results), *self.costs]

    def has(self, key: Key, peers: Collection[str]) -> bool:
        """Whether a cell was measured beside all of some peers, or as many of them as can."""
        for name, row in self.results:
            if self.key_of(name, row) == key:
                known = {timing.name for timing in row.timings} | {peer.name for peer in row.skipped}
                return known.issuperset(peers)
        return False

    def add(self, name: str, row: Comparison) -> None:
        """Add a cell, in the place of an older one."""
        key = self.key_of(name, row)
        places = [index for index, (other, old) in enumerate(self.results) if self.key_of(other, old) == key]
        if places:
            self.results[places[0]] = (name, row)
        else:
            self.results.append((name, row))

    def resume(self, directory: Path) -> str:
        """Take over the cells of an earlier run on the same machine with the same versions; say what was done.

        Raises
        ------
        OSError
            The file cannot be read.
        """
        path = directory / self.json_file
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"there is no {path} yet: a new run"
        except ValueError as error:
            return f"{path} is no JSON, and is not used: {error}"
        mine = self.machine.fields()
        try:
            theirs = {name: found["machine"][name] for name in self.same_machine}
            differ = [name for name in self.same_machine if theirs[name] != mine[name]]
            differ += [name for name in self.versions if found["versions"].get(name) != self.versions[name]]
            if differ:
                return f"{path} is of other {', '.join(differ)}, and is not used"
            results = [(each["case"], Comparison.parse(each)) for each in found["results"]]
            costs = [Goal(**each) for each in found["goals"] if not each["group"]]
        except (KeyError, TypeError, AttributeError) as error:
            return f"{path} is not of this version of the benchmark, and is not used: {error!r}"
        for name, row in results:
            self.add(name, row)
        self.costs = costs
        return f"{len(results)} cells are in {path} already"

    def _fields(self, row: Comparison) -> dict[str, object]:
        return row.fields(self.machine)

    def json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self._everything(), indent=1)

    def _everything(self) -> dict[str, object]:
        return {
            "date": self.date,
            "machine": self.machine.fields(),
            "versions": self.versions,
            "results": [{"case": name, **self._fields(row)} for name, row in self.results],
            "goals": [asdict(goal) for goal in self.goals],
        }

    def save(self, directory: Path) -> Path:
        """Write the JSON, whole or not at all."""
        directory.mkdir(parents=True, exist_ok=True)
        path, aside = directory / self.json_file, directory / f".{self.json_file}.{os.getpid()}"
        try:
            aside.write_text(self.json() + "\n", encoding="utf-8")
            aside.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
        return path

    def write(self, directory: Path) -> list[Path]:
        """Write the JSON, the Markdown, and with matplotlib the plots; return what was written."""
        written = [self.save(directory), directory / self.markdown_file]
        written[1].write_text(self.markdown(), encoding="utf-8")
        return written + self._draw(directory)

    def _draw(self, directory: Path) -> list[Path]:
        return plots.draw(self.results, directory)

    # -- Markdown --------------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        """Tables for a document."""
        parts = [self._head()]
        if self.goals:
            parts += ["**Goals**", goal_table(self.goals)]
        exact, quantized = self._tables()
        if exact:
            parts += ["**Exact activations**", exact]
        if quantized:
            parts += [
                "**Activations in int8**: given as such to bitblas and to torch._int_mm, and as floats of the same "
                "values to the others, which quantize them on the way; rows of float activations show what that is "
                "worth beside our exact kernels",
                quantized,
            ]
        beside = _variant_table(self.results)
        if beside:
            parts += ["**bitblas beside itself**", beside]
        memory = _memory_table(self.results)
        if memory:
            parts += ["**Memory of a layer's weight, with scales and zeros**", memory]
        notes = self._notes()
        return "\n\n".join(parts + ([notes] if notes else [])) + "\n"

    def _head(self) -> str:
        machine = self.machine
        lines = [f"{self.date}, {machine.cpu} ({machine.isa}), {machine.threads} threads;"]
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".")
        rates: dict[str, list[float]] = {}
        for _, row in self.results:
            for name, rate in row.ceilings.items():
                rates.setdefault(name, []).append(rate)
        if rates:
            texts = [_rate(name, sorted(found)) for name, found in rates.items()]
            lines.append(f"Ceilings, in turns with the kernels (median of the cells): {', '.join(texts)}.")
        lines += [f"Note: {note}." for note in machine.notes]
        lines.append(
            "Medians in µs, taken in turns; in brackets how many times as long as bitblas a peer takes. *Limit*: the part of "
            "what binds that bitblas reaches."
        )
        return "\n".join(lines)

    def _tables(self) -> tuple[str, str]:
        """Of peers that compute with exact float activations, and of all others."""
        floats = [each for each in self.results if each[1].workload["A_dtype"] != "int8" and each[1].ours.exact]
        names = peer_names(self.results)
        exact = table(floats, [name for name in names if _is_exact(floats, name)])
        quantizing = [name for name in names if not _is_exact(self.results, name)]
        rows = [
            (name, row)
            for name, row in self.results
            if row.workload["A_dtype"] == "int8" or any(row.timing(peer) for peer in quantizing)
        ]
        integers = [each for each in self.results if each[1].workload["A_dtype"] == "int8"]
        columns = [name for name in names if name in quantizing or any(row.timing(name) for _, row in integers)]
        return exact, table(rows, columns)

    def _notes(self) -> str:
        wrong = sorted(
            f"- {name}, M={row.m}: {timing.name} is off by {timing.error:.2g} and has no time"
            for name, row in self.results
            for timing in row.timings
            if timing.seconds is None
        )
        reasons: dict[str, dict[str, None]] = {}
        for _, row in self.results:
            for peer in row.skipped:
                reasons.setdefault(peer.name, {})[peer.reason] = None
        lines = [f"- {name}: {'; '.join(reasons[name])}" for name in sorted(reasons, key=_place)]
        parts = ["Wrong results:\n\n" + "\n".join(wrong)] if wrong else []
        parts += ["Not measured where a peer cannot:\n\n" + "\n".join(lines)] if lines else []
        return "\n\n".join(parts)


def _rate(name: str, rates: Sequence[float]) -> str:
    unit = "GB/s read" if name == "bandwidth" else "GB/s" if name.startswith("decode") else "GMAC/s"
    return f"{name} {statistics.median(rates) / 1e9:.0f} {unit}"


def peer_names(results: Iterable[tuple[str, Comparison]]) -> list[str]:
    """The peers that took part, in the order of `peers.PEERS`, without variants of ours."""
    found = dict.fromkeys(timing.name for _, row in results for timing in row.timings[1:])
    return sorted((name for name in found if name not in cases.VARIANTS), key=_place)


def _place(name: str) -> int:
    names = list(peers.PEERS)
    return names.index(name) if name in names else len(names)


def _is_exact(results: Iterable[tuple[str, Comparison]], name: str) -> bool:
    return all(timing.exact for _, row in results for timing in row.timings if timing.name == name)


def table(rows: Sequence[tuple[str, Comparison]], names: Sequence[str]) -> str:
    rows = [(name, row) for name, row in rows if any(row.timing(peer) for peer in names)]
    names = [name for name in names if any(row.timing(name) for _, row in rows)]
    if not rows:
        return ""
    lines = [line(["", "N × K", "M", "bitblas", "limit", *names]), "|" + "---|" * (5 + len(names))]
    for name, row in rows:
        bound = row.roofline()
        cells = [name, "{} × {}".format(*shape_of(row)), str(row.m), microseconds(row.ours.seconds)]
        cells.append("–" if bound is None else f"{bound[1]:.0%} {bound[0]}")
        lines.append(line(cells + [_peer_cell(row, peer) for peer in names]))
    return "\n".join(lines)


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def microseconds(seconds: float | None) -> str:
    """A time for a table."""
    return "wrong" if seconds is None else f"{seconds * 1e6:.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.1f}"


def _peer_cell(row: Comparison, name: str) -> str:
    timing, speedup = row.timing(name), row.speedup(name)
    if timing is None:
        return "–"
    return microseconds(timing.seconds) + ("" if speedup is None else f" ({speedup:.2f})")


def goal_table(found: Sequence[Goal]) -> str:
    """A line for each goal: how many cells pass, and the one that is farthest from it."""
    lines = [line(["goal", "asked", "pass", "farthest"]), "|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Goal]] = {}
    for goal in found:
        groups.setdefault((goal.group or goal.name, goal.asked), []).append(goal)
    for (name, asked), cells in groups.items():
        passed = sum(goal.passed is True for goal in cells)
        unknown = sum(goal.passed is None for goal in cells)
        count = f"{passed} of {len(cells)}" + (f", {unknown} not measured" if unknown else "")
        if len(cells) == 1:
            count = cells[0].verdict
        elif any(goal.passed is False for goal in cells):
            count = f"**{count}**"
        farthest = min(cells, key=lambda goal: float("inf") if goal.margin is None else goal.margin)
        where = f" ({farthest.name})" if farthest.group else ""
        lines.append(line([name, asked, count, f"{farthest.measured}{where}"]))
    return "\n".join(lines)


def _variant_table(results: Iterable[tuple[str, Comparison]]) -> str:
    lines = []
    for name, row in results:
        for variant in cases.VARIANTS:
            timing = row.timing(variant)
            if timing is not None:
                place = [name, "{} × {}".format(*shape_of(row)), str(row.m), microseconds(row.ours.seconds)]
                lines.append(line([*place, variant.removeprefix("bitblas, "), _peer_cell(row, variant)]))
    if not lines:
        return ""
    return "\n".join([line(["", "N × K", "M", "bitblas", "beside", ""]), "|---|---|---|---|---|---|", *lines])


def _memory_table(results: Iterable[tuple[str, Comparison]]) -> str:
    found = plots.memory_of(results)
    if not found:
        return ""
    lines = [line(["", "N × K", "MB", "dense, MB", "of dense"]), "|---|---|---|---|---|"]
    for name, (shape, packed, dense) in found.items():
        sizes = [f"{packed / 1e6:.2f}", f"{dense / 1e6:.2f}", f"{packed / dense:.0%}"]
        lines.append(line([name, "{} × {}".format(*shape), *sizes]))
    return "\n".join(lines)
