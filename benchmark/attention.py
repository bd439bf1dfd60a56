"""`python -m benchmark.attention`: FlashAtten beside torch's scaled_dot_product_attention, as JSON, tables and a plot."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import torch

from bitblas import BitBLASError, FlashAtten
from bitblas.bench import Comparison, Timing, use_threads
from bitblas.bench.card import measure_card
from bitblas.cards import CardClock, device_of
from bitblas.target import resolve_target

from . import attention_memory, matmul, plots, report
from .attention_cells import OURS, PEERS, SDPA, AttentionCase, Peer, Place, compare, macs_of, make_case, sizes_of
from .cases import parse_rows
from .goals import Goal, over
from .gpu import report as card
from .matmul import say
from .report import Key, goal_table, line, microseconds

LENGTHS, QUICK_LENGTHS, DIMS, HEADS = (128, 256, 512, 1024, 2048, 4096), (128, 1024), (64, 128), 8
#: What is measured, and what the goals speak of, on a CPU and on a card.
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "bfloat16")}
#: Calls with few queries: queries, keys, heads of Q and of K, dim.
FEW = tuple((queries, 4096, heads, 8, 128) for queries in (1, 16) for heads in (8, 32))
#: How many times as long torch has to take, from how many queries on; bytes that a thread may add.
TIMES, FIRST = {"cpu": 1.0, "cuda": 0.9}, {"cpu": 1, "cuda": 1024}
THREAD_BYTES = 1_000_000
#: Of the estimate: a candidate's setting up, its calls at least, and a slow one's multiply-accumulates a second.
_SETUP_SECONDS, _CALLS, _SLOW_RATE = 0.3, 9, {"cpu": 3e10, "cuda": 1e14}

Results = Sequence[tuple[str, Comparison]]


# -- cells -----------------------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> list[AttentionCase]:
    """What the options ask for; the long lengths last, so that a run that is cut has all of the others."""
    lengths = options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS)
    dtypes = options.dtypes or DTYPES[options.device]
    found = [
        make_case(dtype, causal, length, dim, options.heads, options.heads_kv)
        for length in lengths
        for dtype in dtypes
        for causal in (False, True)
        for dim in options.dims
    ]
    if options.few_queries:
        found += [
            make_case(dtype, False, queries, dim, heads, heads_kv, keys)
            for dtype in dtypes
            for queries, keys, heads, heads_kv, dim in FEW
        ]
    return found


def goal_cells(device: str) -> list[AttentionCase]:
    """The cells of which the goal speaks."""
    lengths = [length for length in LENGTHS if length >= FIRST[device]]
    return [
        make_case(dtype, causal, length, dim, HEADS)
        for dtype in DTYPES[device]
        for causal in (False, True)
        for length in lengths
        for dim in DIMS
    ]


class AttentionSession(matmul.Session):
    """Cells of attention, one after the other, each kept as soon as it is there."""

    #: The card, where there is one.
    card: Place | None = None

    def peers_of(self, case: AttentionCase) -> dict[str, Peer]:  # type: ignore[override]
        """Whom a case is timed beside, by name."""
        return {name: peer for name, peer in PEERS.items() if self.match in name or name == SDPA}

    def estimate(self, case: AttentionCase, m: int) -> float:  # type: ignore[override]
        """Seconds that a cell will take, about."""
        rate = _SLOW_RATE["cuda" if self.card else "cpu"]
        return 3 * (_SETUP_SECONDS + max(2 * self.seconds, _CALLS * macs_of(case.config) / rate))

    def operator(self, case: AttentionCase) -> FlashAtten:  # type: ignore[override]
        """Our operator."""
        return FlashAtten(case.config, target="cuda" if self.card else "llvm")

    def compare(self, op: FlashAtten, m: int, named: Sequence[Peer]) -> Comparison:  # type: ignore[override]
        """Measure a cell; that ours cannot be run on a card is a result, too, after which nothing more is measured there."""
        try:
            return compare(op, named, self.seconds, self.card or Place(self.probes))
        except RuntimeError as error:
            if not self.card:
                raise
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
        failed = Timing(OURS, said, True, None, None, 0, float("inf"))
        self.deadline = 0.0
        say(f"FAILED: {said}; repeat the command with --resume --out DIR")
        return Comparison({**op.config.fields(), "m": m}, m, macs_of(op.config), 0, 0, (failed,))

    def describe(self, case: AttentionCase, row: Comparison) -> str:  # type: ignore[override]
        """A cell in a line."""
        return f"{case.name}, {shape_text(row)}: {matmul.times(row)}"


def memory_goals(session: matmul.Session, dtypes: Sequence[str], dims: Sequence[int], length: int) -> Iterator[Goal]:
    """What a call adds to the memory of a process, by dtype and dim, where that is not known yet."""
    threads, known = torch.get_num_threads(), {goal.name for goal in session.report.costs}
    for dtype in dtypes:
        for dim in dims:
            name = f"memory of a call beyond inputs and output, {dtype}, (1, {HEADS}, {length}, {dim})"
            if name in known or session.is_late:
                continue
            config = make_case(dtype, False, length, dim, HEADS).config
            found = {who: attention_memory.measure(who, config, threads) for who in (OURS, SDPA)}
            mb = {
                who: f"{each.per_thread / 1e6:.2f} and {each.later / threads / 1e6:.2f}" for who, each in found.items()
            }
            size = found[OURS].per_thread
            measured = f"{mb[OURS]} MB in the first call and a later one; {SDPA} {mb[SDPA]}"
            margin = THREAD_BYTES / max(1.0, size)
            yield Goal(name, "≤ 1 MB a thread", measured, size <= THREAD_BYTES, margin=margin)


# -- results ---------------------------------------------------------------------------------------------------------------


def judge(results: Results, device: str) -> Iterator[Goal]:
    """The goal of each cell that has one, of those that were not measured as well."""
    asked, group = f"≥ {TIMES[device]:.1f}× {SDPA}", "beside torch"
    known = {key_of(name, row): row for name, row in results}
    for case in goal_cells(device):
        row = known.get((case.name, *case.shape, *case.rows))
        place = f"{case.name}, (1, {HEADS}, {case.rows[0]}, {case.config.dim})"
        if row is None:
            yield Goal(place, asked, "not measured", None, group)
        elif row.ours.seconds is None:
            yield Goal(place, asked, f"wrong result, off by {row.ours.error:.2g}", False, group, 0.0)
        else:
            found = over(SDPA)(row)
            passed, margin = None, None
            if found.value is not None:
                passed, margin = found.value >= TIMES[device], found.value / TIMES[device]
            yield Goal(place, asked, found.text, passed, group, margin)


def key_of(name: str, row: Comparison) -> Key:
    """What tells a cell."""
    return (name, *sizes_of(row), row.m)


def versions() -> dict[str, str]:
    """Of all that takes part."""
    apart = ("onnxruntime", "llama-cpp-python")
    return {name: text for name, text in report.versions().items() if name not in apart}


class _Attention:
    """What the reports of a CPU and of a card share."""

    json_file: ClassVar[str] = "attention.json"
    markdown_file: ClassVar[str] = "attention.md"
    key_of = staticmethod(key_of)
    device: ClassVar[str] = "cpu"
    results: list[tuple[str, Comparison]]
    costs: list[Goal]

    @property
    def goals(self) -> list[Goal]:
        """The verdicts."""
        return [*judge(self.results, self.device), *self.costs]

    def _draw(self, directory: Path) -> list[Path]:
        return plots.draw(self.results, directory, {"attention": figure})

    def markdown(self) -> str:
        """Tables for a document."""
        parts = [self._head(), "**Goals**", goal_table(self.goals)]  # type: ignore[attr-defined]
        results = in_order(self.results)
        if any(is_square(row) for _, row in results):
            parts += [f"**How many times as long {SDPA} takes, by queries**", ratios(results)]
        for kind in dict.fromkeys(name for name, _ in results):
            parts += [f"**{kind}**", table([row for name, row in results if name == kind])]
        notes = self._notes()  # type: ignore[attr-defined]
        return "\n\n".join(parts + ([notes] if notes else [])) + "\n"


@dataclass
class AttentionReport(_Attention, report.Report):
    """All of one run, or of several parts of one, on a CPU."""

    versions: dict[str, str] = field(default_factory=versions)


class AttentionCardReport(_Attention, card.CardReport):
    """The same on a card."""

    json_file: ClassVar[str] = "attention_gpu.json"
    markdown_file: ClassVar[str] = "attention_gpu.md"
    device: ClassVar[str] = "cuda"

    def _draw(self, directory: Path) -> list[Path]:
        return plots.draw(self.results, directory, {"attention_gpu": figure})


def is_square(row: Comparison) -> bool:
    """Whether there are as many queries as keys."""
    return bool(row.m == row.workload["seq_len_kv"])


def in_order(results: Results) -> list[tuple[str, Comparison]]:
    """By kind, squares first, then by sizes and queries."""
    kinds = list(dict.fromkeys(name for name, _ in results))
    return sorted(
        results, key=lambda each: (kinds.index(each[0]), not is_square(each[1]), sizes_of_line(each[1]), each[1].m)
    )


def sizes_of_line(row: Comparison) -> tuple[int, ...]:
    """Heads, heads of K, dim: what a line of the plot, or of the table of ratios, is for."""
    _, heads, heads_kv, _, dim = sizes_of(row)
    return heads, heads_kv, dim


def shape_text(row: Comparison) -> str:
    """The sizes of a cell."""
    batch, heads, heads_kv, keys, dim = sizes_of(row)
    grouped = f"{heads}" if heads == heads_kv else f"{heads}/{heads_kv}"
    lengths = f"{row.m}" if row.m == keys else f"{row.m} of {keys}"
    return f"({batch}, {grouped}, {lengths}, {dim})"


def ratios(results: Results) -> str:
    """A line for each kind and dim, a column for each number of queries."""
    squares = [each for each in results if is_square(each[1])]
    lengths = sorted({row.m for _, row in squares})
    lines = [line(["", "heads", "dim", *map(str, lengths)]), "|---" * (3 + len(lengths)) + "|"]
    found: dict[tuple[str, tuple[int, ...]], dict[int, float | None]] = {}
    for name, row in squares:
        found.setdefault((name, sizes_of_line(row)), {})[row.m] = row.speedup(SDPA)
    for (name, (heads, heads_kv, dim)), speeds in found.items():
        cells = ["–" if speeds.get(m) is None else f"{speeds[m]:.2f}" for m in lengths]
        lines.append(line([name, str(heads) if heads == heads_kv else f"{heads}/{heads_kv}", str(dim), *cells]))
    return "\n".join(lines)


def table(rows: Sequence[Comparison]) -> str:
    """A line for each cell: times, products a second, and errors over the size of a row of the result."""
    names = list(dict.fromkeys(timing.name for row in rows for timing in row.timings[1:]))
    heading = ["(batch, heads, queries, dim)", OURS, "limit", "GFLOP/s", "error"]
    heading += [text for name in names for text in (name, "GFLOP/s", "error")]
    lines = [line(heading), "|---" * len(heading) + "|"]
    for row in rows:
        bound = row.roofline()
        limit = "–" if bound is None else f"{bound[1]:.0%} {bound[0]}"
        ours, *rest = [_cells(row, name) for name in (OURS, *names)]
        lines.append(line([shape_text(row), ours[0], limit, *ours[1:], *(cell for cells in rest for cell in cells)]))
    return "\n".join(lines)


def _cells(row: Comparison, name: str) -> list[str]:
    timing = row.timing(name)
    if timing is None:
        return ["–"] * 3
    beside = "" if name == OURS or (speed := row.speedup(name)) is None else f" ({speed:.2f})"
    rate = _rate(row, name)
    return [microseconds(timing.seconds) + beside, "–" if rate is None else f"{rate:.0f}", f"{timing.error:.1e}"]


def figure(results: Results) -> Any:
    """A column for each kind: products a second over the queries, and below how many times as long torch takes."""
    from matplotlib import pyplot

    found: dict[str, dict[tuple[int, ...], list[Comparison]]] = {}
    for name, row in in_order(results):
        if is_square(row):
            found.setdefault(name, {}).setdefault(sizes_of_line(row), []).append(row)
    if not any(len(rows) >= plots.LEAST_ROWS for lines in found.values() for rows in lines.values()):
        return None
    drawn, axes = pyplot.subplots(2, len(found), figsize=(3.4 * len(found) + 0.6, 6.0), sharex="col", squeeze=False)
    for column, (name, lines) in enumerate(found.items()):
        lengths = sorted({row.m for rows in lines.values() for row in rows})
        axes[0][column].set(xscale="log", ylabel="GFLOP/s", title=name)
        axes[1][column].set(xlabel="queries and keys", ylabel=f"times as long {SDPA} takes")
        axes[1][column].axhline(1, color="black", linewidth=1)
        for style, (sizes, rows) in zip(cycle(("-", "--", ":", "-.")), lines.items(), strict=False):
            label = "dim {2}".format(*sizes) if sizes[0] == sizes[1] else "dim {2}, {0} / {1} heads".format(*sizes)
            for who, color in ((OURS, "black"), (SDPA, "C0")):
                _add_line(axes[0][column], rows, lambda row, who=who: _rate(row, who), f"{who}, {label}", style, color)
            _add_line(axes[1][column], rows, lambda row: row.speedup(SDPA), label, style, "C0")
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xticks(lengths, map(str, lengths), fontsize=7)
            axis.minorticks_off()
            axis.set_ylim(0, None)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6)
    drawn.tight_layout()
    return drawn


def _rate(row: Comparison, who: str) -> float | None:
    """Additions and products a second, in thousands of millions; those of masked pairs do not count."""
    timing = row.timing(who)
    return 2e-9 * row.macs / timing.seconds if timing and timing.seconds else None


def _add_line(
    axis: Any,
    rows: Sequence[Comparison],
    value: Callable[[Comparison], float | None],
    label: str,
    style: str,
    color: str,
) -> None:
    points = [(row.m, found) for row in rows if (found := value(row)) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, label=label)


# -- the command -----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where a result was wrong or a goal was missed, 2 where something could not be asked."""
    options = _parser().parse_args(argv)
    try:
        with use_threads(options.threads):
            if options.device == "cuda":
                session = _begin_on_card(options)
            else:
                session = matmul.begin(options, AttentionSession, AttentionReport)
            found = chosen(options)
            session.measure(found)
            if options.device == "cpu" and options.memory:
                length = max(case.rows[0] for case in found)
                for goal in memory_goals(session, options.dtypes or DTYPES["cpu"], options.dims, length):
                    say(f"{goal.name}: {goal.measured}")
                    session.report.costs.append(goal)
                    if options.out is not None:
                        session.report.save(options.out)
    except (BitBLASError, OSError) as error:
        print(f"benchmark.attention: error: {error}", file=sys.stderr)
        return 2
    return matmul.conclude(session.report, options.out)


def _begin_on_card(options: argparse.Namespace) -> AttentionSession:
    began = time.monotonic()
    if options.resume and options.out is None:
        raise BitBLASError("--resume needs --out, the directory of the run to go on with")
    target = resolve_target("cuda")
    device = device_of(target)
    torch.cuda.set_device(device)
    clock = CardClock(device)
    found = AttentionCardReport(measure_card(clock, device, card.driver_version()), card.versions(target))
    if options.resume:
        say(found.resume(options.out))
    seconds, deadline = options.seconds or matmul.QUICK_SECONDS, began + 60 * (options.minutes or float("inf"))
    session = AttentionSession(found, None, seconds, options.out, deadline, options.peers)
    session.card = Place(None, clock, found.machine, device)
    return session


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> tuple[str, ...]:
        return tuple(filter(None, text.split(",")))

    parser = argparse.ArgumentParser(prog="python -m benchmark.attention", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help=f"only lengths {', '.join(map(str, QUICK_LENGTHS))}")
    parser.add_argument(
        "--dtypes", type=names, default=(), metavar="D,D", help="float32,bfloat16; on a card float16,bfloat16"
    )
    parser.add_argument(
        "--lengths",
        type=parse_rows,
        default=(),
        metavar="L,L",
        help="queries, and keys ({})".format(",".join(map(str, LENGTHS))),
    )
    parser.add_argument("--dims", type=parse_rows, default=DIMS, metavar="D,D", help="elements of a head (64,128)")
    parser.add_argument("--heads", type=int, default=HEADS, help=f"heads of Q ({HEADS})")
    parser.add_argument("--heads-kv", type=int, help="heads of K and V (as many)")
    parser.add_argument(
        "--few-queries",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="1 and 16 queries of 4096 keys as well",
    )
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="the memory of a call as well, on a CPU"
    )
    parser.add_argument("--out", type=Path, help="directory for attention.json, attention.md and the plots")
    matmul.add_run_options(parser, SDPA)
    return parser


if __name__ == "__main__":
    sys.exit(main())
