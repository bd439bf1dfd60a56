"""`python -m benchmark`: bitblas beside its peers, as JSON, tables and plots; a run may be done in parts."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bitblas import BitBLASError, Matmul
from bitblas.bench import Comparison, Peer, Probes, compare, measure_machine, own_variant, use_threads
from bitblas.errors import BuildError

from . import cases, costs, goals, peers
from .progress import Progress, estimate
from .report import Report

#: Seconds for each candidate in each cell, and minutes after which the short run begins no cell, on any machine.
SECONDS, QUICK_SECONDS, QUICK_MINUTES = 0.3, 0.2, 4.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where a result was wrong or a goal was missed, 2 where something could not be asked."""
    options = _parser().parse_args(argv)
    try:
        with use_threads(options.threads):
            report = _run(options)
    except (BitBLASError, OSError) as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    return conclude(report, options.out)


def conclude(report: Report, out: Path | None) -> int:
    """Print and write what was found; return 1 where a result was wrong or a goal was missed."""
    print(report.markdown())
    if out is not None:
        for path in report.write(out):
            print(f"wrote {path}", file=sys.stderr)
    wrong = [name for name, row in report.results if row.ours.seconds is None]
    return 1 if wrong or any(goal.passed is False for goal in report.goals) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="one shape, a few formats and rows: less than five minutes")
    what.add_argument("--goals", action="store_true", help="only cells of which a goal speaks, and the costs")
    parser.add_argument(
        "--match", default="", help="only cases whose name contains this, such as uint4; 'costs' for those alone"
    )
    parser.add_argument("--out", type=Path, help="directory for matmul.json, matmul.md and the plots")
    add_options(parser, goals.TORCH)
    return parser


def add_options(parser: argparse.ArgumentParser, always: str) -> None:
    """Add what every run of matmuls on a CPU can be asked; `always` is the peer that is never left out."""
    add_run_options(parser, always)
    parser.add_argument("--rows", type=cases.parse_rows, default=(), metavar="M,M", help="only these numbers of rows")
    parser.add_argument("--shapes", type=cases.parse_shapes, default=(), metavar="NxK,NxK", help="only these shapes")


def add_run_options(parser: argparse.ArgumentParser, always: str) -> None:
    """Add what every run on a CPU can be asked."""
    parser.add_argument("--threads", type=int, help="threads of all candidates (torch's number)")
    parser.add_argument("--seconds", type=float, help=f"for each candidate in each cell ({SECONDS}; {QUICK_SECONDS})")
    parser.add_argument("--peers", default="", help=f"only peers whose name contains this, beside {always}")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out: what is there is not measured again"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"begin no cell after so long; --resume does the rest (--quick: {QUICK_MINUTES})"
    )


def begin(options: argparse.Namespace, kind: type[Session], report_kind: type[Report] = Report) -> Session:
    """A session of a kind as the options ask for, with what is there already."""
    began = time.monotonic()
    if options.resume and options.out is None:
        raise BitBLASError("--resume needs --out, the directory of the run to go on with")
    try:
        probes = Probes()
    except BuildError as error:
        probes = None
        say(f"SKIPPED the ceilings: {error}")
    report = report_kind(measure_machine(torch.get_num_threads(), probes))
    if options.resume:
        say(report.resume(options.out))
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else float("inf"))
    return kind(report, probes, seconds, options.out, began + 60 * minutes, options.peers)


def _run(options: argparse.Namespace) -> Report:
    session = begin(options, Session)
    report = session.report
    found = cases.quick() if options.quick else cases.full()
    found = goals.concerned(found) if options.goals else found
    session.measure(cases.Filter(options.match, options.rows, options.shapes).apply(found))
    if not options.quick and options.match in "costs" and not report.costs and not session.is_late:
        for goal in costs.cost_goals():
            say(f"{goal.name}: {goal.measured}")
            report.costs.append(goal)
    return report


class Session:
    """Cells one after the other, each kept as soon as it is there.

    Parameters
    ----------
    report : Report
        Takes the results.
    probes : Probes or None
        The ceilings.
    seconds : float
        For each candidate of a cell.
    out : Path or None
        Where the JSON is kept.
    deadline : float
        After which no cell begins, by time.monotonic.
    match : str
        A part of the names of the peers.
    """

    def __init__(
        self, report: Report, probes: Probes | None, seconds: float, out: Path | None, deadline: float, match: str
    ) -> None:
        self.report, self.probes, self.seconds, self.out = report, probes, seconds, out
        self.deadline, self.match = deadline, match
        self._announced: set[str] = set()

    @property
    def is_late(self) -> bool:
        """Whether no cell is to begin any more."""
        return time.monotonic() >= self.deadline

    def peers_of(self, case: cases.Case) -> dict[str, Peer]:
        """Whom a case is timed beside, by name."""

        def wanted(name: str) -> bool:
            return bool(re.search(case.peers, name)) and (self.match in name or name == goals.TORCH)

        own = {name: own_variant(name, **cases.VARIANTS[name]) for name in case.variants if self.match in name}
        return own | peers.select(wanted)

    def estimate(self, case: cases.Case, m: int) -> float:
        """Seconds that a cell will take, about."""
        return estimate(case.config, m, len(self.peers_of(case)), self.seconds)

    def operator(self, case: cases.Case) -> Matmul:
        """Our operator, for this CPU where the case names no target."""
        return Matmul(case.config, target=case.target or "llvm")

    def compare(self, op: Matmul, m: int, named: Sequence[Peer]) -> Comparison:
        """Measure a cell."""
        return compare(op, m, named, self.seconds, probes=self.probes)

    def describe(self, case: cases.Case, row: Comparison) -> str:
        """A cell in a line."""
        return f"{case.name} {case.config.N} x {case.config.K} M={row.m}: {times(row)}"

    def measure(self, found: Sequence[cases.Case]) -> None:
        """Measure the cells that are not there yet; an interruption keeps those that are."""
        todo = []
        for case in found:
            named = self.peers_of(case)
            rows = [m for m in case.rows if not self.report.has((case.name, *case.shape, m), named)]
            todo += [(case, rows)] if rows else []
        costs_of = {(case, m): self.estimate(case, m) for case, rows in todo for m in rows}
        progress = Progress(sum(costs_of.values()), len(costs_of), say)
        try:
            for case, rows in todo:
                self._measure(case, rows, progress, lambda m, case=case: costs_of[case, m])
        except KeyboardInterrupt:
            self.deadline = 0.0
            say("interrupted")
        finally:
            progress.close()
        if progress.cells_left:
            say(f"{progress.cells_left} cells are left: repeat the command with --resume --out DIR")

    def _measure(self, case: cases.Case, rows: Sequence[int], progress: Progress, cost: Callable[[int], float]) -> None:
        if self.is_late:
            return
        op, named = self.operator(case), self.peers_of(case)
        for m in rows:
            if self.is_late:
                return
            row = self.compare(op, m, list(named.values()))
            self.report.add(case.name, row)
            if self.out is not None:
                self.report.save(self.out)
            progress.advance(cost(m), self.describe(case, row))
            self._announce(row)

    def _announce(self, row: Comparison) -> None:
        """Say once of each peer that is missing, or fails, how to get it."""
        for peer in row.skipped:
            text = f"SKIPPED {peer.name}: {peer.reason}"
            if (peer.missing or "cannot" in peer.reason) and text not in self._announced:
                self._announced.add(text)
                say(text)


def times(row: Comparison) -> str:
    """What a cell's candidates took, and what binds ours, in a line."""
    parts = [f"{t.name} {'wrong' if t.seconds is None else f'{t.seconds * 1e6:.0f} us'}" for t in row.timings]
    bound = row.roofline()
    limit = "" if bound is None else f" [{bound[1]:.0%} of {bound[0]}]"
    return f"{parts[0]}{limit}, {', '.join(parts[1:])}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
