"""`python -m benchmark.matmul`: bitblas beside its peers, as tables, JSON and a plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bitblas import BitBLASError, Matmul
from bitblas.bench import Comparison, compare, measure_machine, use_threads

from . import cases, goals, peers
from .report import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where a result was wrong or a goal was missed, 2 where something could not be asked."""
    options = _parser().parse_args(argv)
    try:
        with use_threads(options.threads):
            report = _run(options)
    except BitBLASError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    print(report.markdown())
    if options.out is not None:
        for path in report.write(options.out):
            print(f"wrote {path}", file=sys.stderr)
    wrong = [name for name, row in report.results if row.ours.seconds is None]
    return 1 if wrong or any(goal.passed is False for goal in report.goals) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark.matmul", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="one shape and a few formats: some minutes")
    what.add_argument("--goals", action="store_true", help="what releases are to reach, with pass or fail")
    parser.add_argument("--threads", type=int, help="threads of all candidates (torch's number)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each candidate in each cell (0.5)")
    parser.add_argument(
        "--match", default="", help="only cases whose name contains this, such as uint4; 'costs' of the goals"
    )
    parser.add_argument("--peers", default="", help="only peers whose name contains this, beside torch float32")
    parser.add_argument("--out", type=Path, help="directory for matmul.json, matmul.md, matmul.png and matmul.svg")
    return parser


def _run(options: argparse.Namespace) -> Report:
    report = Report(measure_machine(torch.get_num_threads()))
    chosen = peers.select(lambda name: options.peers in name or name == goals.TORCH)
    announced: set[str] = set()

    def measure(found: Sequence[cases.Case], then: Callable[[str, Comparison], None] | None = None) -> None:
        for case in found:
            if options.match not in case.name:
                continue
            for row in _measure_case(case, chosen, options.seconds, announced):
                report.results.append((case.name, row))
                if then is not None:
                    then(case.name, row)

    if options.goals:
        for found, wanted in (
            (cases.headline(), goals.HEADLINE),
            (cases.formats(), goals.FORMATS),
            (cases.avx2(), goals.AVX2),
            (cases.integers(), goals.INT8),
        ):
            measure(
                found,
                lambda name, row, wanted=wanted: report.goals.extend(goals.speed_goals(name, row, wanted)),
            )
        if options.match in "costs":
            for goal in goals.cost_goals():
                _say(f"{goal.name}: {goal.measured}")
                report.goals.append(goal)
    else:
        measure(cases.quick() if options.quick else cases.full())
    return report


def _measure_case(
    case: cases.Case, chosen: Sequence[peers.Peer], seconds: float, announced: set[str]
) -> list[Comparison]:
    op, rows = Matmul(case.config, target=case.target), []
    for m in case.rows:
        row = compare(op, m, chosen, seconds)
        rows.append(row)
        parts = [f"{t.name} {'wrong' if t.seconds is None else f'{t.seconds * 1e6:.0f} us'}" for t in row.timings]
        _say(f"{case.name} {case.config.N} x {case.config.K} M={m}: {', '.join(parts)}")
        for peer in row.skipped:
            if "pip install" in peer.reason or "cannot" in peer.reason:
                text = f"SKIPPED {peer.name}: {peer.reason}"
                if text not in announced:
                    announced.add(text)
                    _say(text)
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
