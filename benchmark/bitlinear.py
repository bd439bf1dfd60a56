"""`python -m benchmark.bitlinear`: deployed BitLinear layers beside torch's and transformers', as JSON, tables and plots."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

from bitblas import BitBLASError, Matmul
from bitblas.bench import Comparison, Peer, Skipped, own_variant, side_by_side, use_threads
from bitblas.bench.matmul import MEMORY_CAP, MEMORY_PART, moved_bytes
from bitblas.measuring import read_bytes

from . import cases, goals, matmul, plots, report
from .bitlinear_layers import (
    EAGER,
    OURS,
    PACKED,
    PEERS,
    TORCH,
    config_of,
    dense_bytes,
    deployed,
    draw_ternary,
    layer_bytes,
    ours,
)
from .goals import Finding, Goal, Rule, over, shape_of
from .gpu.report import speedups
from .model import bytes_of
from .report import goal_table, line, microseconds, peer_names, table

SQUARE, MLP = (1024, 1024), (11008, 4096)
SHAPES = (cases.HEADLINE, SQUARE, MLP)
OPERATOR, INT8, FEW, FEW_INT8 = cases.LAYER_VARIANTS
FLOAT32 = TORCH.format("float32")
#: Rows from which on quantizing the activations is to be a small part of a call.
MANY = tuple(m for m in cases.ROWS if m >= 16)
#: The part of a call that quantizing may take; bytes of a layer of 1024 by 1024; the part of float32's bytes that has to go.
MOST_QUANTIZING, SQUARE_BYTES, SAVED = 0.1, 270_000, 0.92

Results = Sequence[tuple[str, Comparison]]


# -- cells -----------------------------------------------------------------------------------------------------------------


def case(dtype: str, shape: tuple[int, int], rows: Sequence[int] = cases.ROWS) -> cases.Case:
    """A layer in a dtype, beside float32, itself in other libraries, and parts of its own call."""
    return cases.Case(
        f"BitLinear {dtype}",
        config_of(dtype, shape),
        tuple(rows),
        peers=rf"^{TORCH.format('')}|^transformers .* {dtype}\b",
        variants=tuple(cases.LAYER_VARIANTS),
    )


def full() -> list[cases.Case]:
    """Every number of rows in float32, and in all dtypes at the headline shape; of the rest a few."""
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        for shape in SHAPES:
            every = dtype == "float32" or shape == cases.HEADLINE
            found.append(case(dtype, shape, cases.ROWS if every else cases.FEW_ROWS))
    return found


def quick() -> list[cases.Case]:
    """Two shapes and dtypes, three numbers of rows."""
    return [case(dtype, shape, cases.FEW_ROWS) for dtype in ("float32", "bfloat16") for shape in SHAPES[:2]]


class LayerSession(matmul.Session):
    """Cells of layers, one after the other, each kept as soon as it is there."""

    def peers_of(self, case: cases.Case) -> dict[str, Peer]:
        """Whom a case is timed beside, by name."""
        named = {name: own_variant(name, **cases.VARIANTS[name]) for name in case.variants}
        named |= {name: peer for name, peer in PEERS.items() if re.search(case.peers, name)}
        return {name: peer for name, peer in named.items() if self.match in name or name == FLOAT32}

    def compare(self, op: Matmul, m: int, named: Sequence[Peer]) -> Comparison:
        """Measure a cell: the layer of an operator, and peers."""
        if "torch._dynamo" in sys.modules:  # what was compiled for another cell would be compiled again, for any shape
            torch.compiler.reset()
        workload = draw_ternary(op.config, m)
        budget = min(MEMORY_CAP, int(psutil.virtual_memory().available * MEMORY_PART) // (1 + len(named)))
        first, *made = [peer(workload, budget) for peer in (ours, *named)]
        bounds = self.probes.of(op, m, read_bytes(), torch.get_num_threads()) if self.probes else []
        candidates = [peer for peer in made if not isinstance(peer, Skipped)]
        timings = side_by_side([first, *(bound.candidate() for bound in bounds), *candidates], self.seconds)
        by_bound = zip(bounds, timings[1 : 1 + len(bounds)], strict=True)
        return Comparison(
            workload={**op.config.fields(), "m": m},
            m=m,
            macs=m * op.config.N * op.config.K,
            moved=moved_bytes(op, workload),
            threads=torch.get_num_threads(),
            timings=(timings[0], *timings[1 + len(bounds) :]),
            skipped=tuple(peer for peer in made if isinstance(peer, Skipped)),
            weight_bytes=op.layout.num_bytes,
            static_bytes=bytes_of(deployed(workload)),
            ceilings={bound.name: bound.work / timing.seconds for bound, timing in by_bound if timing.seconds},
            unit="int8",
        )


# -- goals -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantization:
    """Seconds that quantizing the activations takes in a cell, found in two ways.

    Attributes
    ----------
    call : float
        The mean of two measurements of the same: of the layer's call, and of its operator's with floats.
    noise : float
        How far apart they are.
    by_difference : float or None
        The call, less that of an operator with activations that are int8 already.
    alone : float or None
        The operator's call with floats, less that with int8, of a problem with 64 columns, where next to nothing else is
        done: what prepares the rows is the same code.
    """

    call: float
    noise: float
    by_difference: float | None
    alone: float | None

    @classmethod
    def of(cls, row: Comparison) -> Quantization | None:
        """None where the layer, or its operator, has no time."""
        timings = [row.timing(name) for name in (OPERATOR, INT8, FEW, FEW_INT8)]
        floats, int8, few, few_int8 = (timing.seconds if timing else None for timing in timings)
        if row.ours.seconds is None or floats is None:
            return None
        call = (row.ours.seconds + floats) / 2
        return cls(
            call,
            abs(row.ours.seconds - floats),
            None if int8 is None else call - int8,
            None if few is None or few_int8 is None else few - few_int8,
        )


def by_difference(row: Comparison) -> Finding:
    """What is left of a call without quantizing, by the difference of whole calls; none where noise hides it."""
    found = Quantization.of(row)
    if found is None or found.by_difference is None:
        return Finding(None, "no time of the operators")
    part, noise = found.by_difference / found.call, found.noise / found.call
    text = f"{part:.1%} ± {noise:.1%}"
    return Finding(None if abs(part - MOST_QUANTIZING) < noise else 1 - part, text)


def alone(row: Comparison) -> Finding:
    """What is left of a call without quantizing, by what that takes where there are few columns."""
    found = Quantization.of(row)
    if found is None or found.alone is None:
        return Finding(None, "no time of the operators")
    return Finding(1 - found.alone / found.call, f"{found.alone / found.call:.1%}")


def of_its_dtype(title: str) -> Callable[[Comparison], Finding]:
    """How many times as long a layer of transformers takes that computes in the same dtype."""
    return lambda row: over(title.format(row.workload["A_dtype"]))(row)


_ANY, _BITNET = "BitLinear .*", "BitLinear (float32|bfloat16)"
BY_DIFFERENCE = "activation quantization, M ≥ 16, by difference"
ALONE = "activation quantization, M ≥ 16, alone"
RULES: tuple[Rule, ...] = (
    Rule("4096², M=1", _ANY, (1,), 10.0, f"≥ 10× {FLOAT32}", over(FLOAT32)),
    Rule("4096², M=128", _ANY, (128,), 5.0, f"≥ 5× {FLOAT32}", over(FLOAT32)),
    Rule("1024², M=1", _ANY, (1,), 3.0, f"≥ 3× {FLOAT32}", over(FLOAT32), (SQUARE,)),
    Rule("transformers' BitNet layer, M=1", _BITNET, (1,), 20.0, "≥ 20×", of_its_dtype(PACKED), SHAPES),
    Rule("the same without torch.compile, M=1", _BITNET, (1,), 20.0, "≥ 20×", of_its_dtype(EAGER), SHAPES),
    Rule(BY_DIFFERENCE, _ANY, MANY, 1 - MOST_QUANTIZING, "≤ 10 % of the call", by_difference, SHAPES),
    Rule(ALONE, _ANY, MANY, 1 - MOST_QUANTIZING, "≤ 10 % of the call", alone, SHAPES),
)


def judge(results: Iterable[tuple[str, Comparison]]) -> Iterator[Goal]:
    """Every rule on every cell that it speaks of, and the bytes of each layer."""
    kept = list(results)
    yield from goals.judge(kept, RULES)
    static = {(name, shape_of(row)): row.static_bytes for name, row in kept}
    for (name, shape), size in static.items():
        place, saved = "{}, {} × {}".format(name, *shape), 1 - size / dense_bytes(shape)
        measured = f"{saved:.1%} less"
        yield Goal(place, f"≥ {SAVED:.0%} less than float32", measured, saved >= SAVED, "static memory", saved / SAVED)
    for (name, shape), size in static.items():
        if shape == SQUARE:
            asked, group = f"≤ {SQUARE_BYTES:,} bytes", "static memory of 1024²"
            yield Goal(name, asked, f"{size:,} bytes", size <= SQUARE_BYTES, group, SQUARE_BYTES / size)


# -- results ---------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of all that takes part."""
    found = {
        name: text
        for name, text in report.versions().items()
        if name not in ("onnxruntime", "openvino", "llama-cpp-python")
    }
    try:
        return {**found, "transformers": metadata.version("transformers")}
    except metadata.PackageNotFoundError:
        return {**found, "transformers": "missing"}


@dataclass
class LayerReport(report.Report):
    """All of one run, or of several parts of one."""

    json_file: ClassVar[str] = "bitlinear.json"
    markdown_file: ClassVar[str] = "bitlinear.md"

    versions: dict[str, str] = field(default_factory=versions)

    @property
    def goals(self) -> list[Goal]:
        """The verdicts on the cells that are there."""
        return list(judge(self.results))

    @property
    def memory(self) -> dict[tuple[int, int], dict[str, int]]:
        """By shape, the bytes of each kind of layer."""
        return {shape: layer_bytes(shape) for shape in dict.fromkeys(shape_of(row) for _, row in self.results)}

    def _everything(self) -> dict[str, object]:
        sizes = {"{} x {}".format(*shape): found for shape, found in self.memory.items()}
        return {**super()._everything(), "static_bytes": sizes}

    def _draw(self, directory: Path) -> list[Path]:
        figures: Mapping[str, plots.Make] = {
            "bitlinear_latency": lambda found: plots.latency(found, columns=3),
            "bitlinear_throughput": throughput,
            "bitlinear_memory": lambda found: memory_figure(self.memory),
        }
        return plots.draw(self.results, directory, figures)

    def markdown(self) -> str:
        """Tables for a document."""
        parts, results = [self._head()], in_order(self.results)
        if results:
            parts += ["**Goals**", goal_table(self.goals)]
            for peer in (FLOAT32, PACKED.format("float32"), PACKED.format("bfloat16")):
                if compact := speedups(results, peer):
                    parts += [f"**How many times as long {peer} takes**", compact]
            for kind in dict.fromkeys(name for name, _ in results):
                parts += [f"**{kind}**", table([each for each in results if each[0] == kind], peer_names(results))]
            parts += ["**What quantizing the activations takes**", quantization_table(results)]
            parts += ["**Static memory**, bytes of parameters and buffers", memory_table(self.memory)]
        notes = self._notes()
        return "\n\n".join(parts + ([notes] if notes else [])) + "\n"


def in_order(results: Results) -> list[tuple[str, Comparison]]:
    """By kind and shape, in the order in which they were begun, and by rows."""
    places = list(dict.fromkeys((name, shape_of(row)) for name, row in results))
    kinds = list(dict.fromkeys(name for name, _ in results))
    return sorted(
        results,
        key=lambda each: (kinds.index(each[0]), places.index((each[0], shape_of(each[1]))), each[1].m),
    )


def quantization_table(results: Results) -> str:
    """A line for each cell that a goal speaks of: microseconds of calls, and of quantizing in two ways."""
    heading = ["", "N × K", "M", "layer", "operator", "on int8", "by difference", "64 columns", "on int8", "alone"]
    lines = [line(heading), "|---" * len(heading) + "|"]
    for name, row in results:
        found = Quantization.of(row)
        if found is None or row.m not in MANY:
            continue
        times = [row.ours, *(row.timing(each) for each in (OPERATOR, INT8, FEW, FEW_INT8))]
        cells = ["–" if timing is None else microseconds(timing.seconds) for timing in times]
        difference, part = (
            "–" if seconds is None else f"{1e6 * seconds:.1f} ({seconds / found.call:.1%}"
            for seconds in (found.by_difference, found.alone)
        )
        difference = difference if difference == "–" else f"{difference} ± {found.noise / found.call:.1%})"
        place = [name, "{} × {}".format(*shape_of(row)), str(row.m)]
        lines.append(line([*place, *cells[:3], difference, *cells[3:], part if part == "–" else f"{part})"]))
    return "\n".join(lines)


def memory_table(memory: Mapping[tuple[int, int], Mapping[str, int]]) -> str:
    """A line for each kind of layer: bytes at each shape, and how much less than float32."""
    kinds = dict.fromkeys(kind for sizes in memory.values() for kind in sizes)
    lines = [line(["", *("{} × {}".format(*shape) for shape in memory)]), "|---" * (1 + len(memory)) + "|"]
    for kind in kinds:
        cells = [f"{sizes[kind]:,} (−{1 - sizes[kind] / dense_bytes(shape):.1%})" for shape, sizes in memory.items()]
        lines.append(line([kind, *cells]))
    return "\n".join(lines)


# -- plots -----------------------------------------------------------------------------------------------------------------


def throughput(results: plots.Results) -> Any:
    """Tokens a second over M, with multiply-accumulates a second at the right."""

    def value(row: Comparison, name: str) -> float | None:
        timing = row.timing(name)
        return row.m / timing.seconds if timing and timing.seconds else None

    right = plots.Scale("GMAC/s", lambda row: row.macs / row.m / 1e9)
    return plots.grid(results, "tokens/s", value, OURS, right, columns=3)


def memory_figure(memory: Mapping[tuple[int, int], Mapping[str, int]]) -> Any:
    """A panel for each shape, a bar for each kind of layer: what is held whatever the number of rows."""
    from matplotlib import pyplot

    if not memory:
        return None
    figure, axes = pyplot.subplots(1, len(memory), figsize=(1.5 + 4.4 * len(memory), 2.6), sharey=True, squeeze=False)
    for axis, (shape, sizes) in zip(axes.flat, memory.items(), strict=True):
        colors = ["black" if kind.startswith(OURS) else "lightgray" for kind in sizes]
        axis.barh(list(sizes), [size / 1e6 for size in sizes.values()], color=colors)
        for place, size in enumerate(sizes.values()):
            axis.text(size / 1e6, place, f" {size / 1e6:.3g}", va="center", fontsize=7)
        axis.set(xlabel="MB, at any M", xlim=(0, 1.18 * max(sizes.values()) / 1e6))
        axis.set_title("{} × {}".format(*shape), fontsize=8)
        axis.tick_params(labelsize=7)
    axes.flat[0].invert_yaxis()
    figure.tight_layout()
    return figure


# -- the command -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where a result was wrong or a goal was missed, 2 where something could not be asked."""
    options = _parser().parse_args(argv)
    try:
        with use_threads(options.threads):
            session = matmul.begin(options, LayerSession, LayerReport)
            found = quick() if options.quick else full()
            session.measure(cases.Filter(options.match, options.rows, options.shapes).apply(found))
    except (BitBLASError, OSError) as error:
        print(f"benchmark.bitlinear: error: {error}", file=sys.stderr)
        return 2
    return matmul.conclude(session.report, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bitlinear", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes and dtypes, few rows: less than five minutes")
    parser.add_argument("--match", default="", help="only cases whose name contains this, such as float32")
    parser.add_argument("--out", type=Path, help="directory for bitlinear.json, bitlinear.md and the plots")
    matmul.add_options(parser, FLOAT32)
    return parser


if __name__ == "__main__":
    sys.exit(main())
