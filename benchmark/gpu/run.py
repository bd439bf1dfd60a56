"""`python -m benchmark.gpu`: bitblas on a card beside its peers, as JSON, tables and plots; a run may be done in parts."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError  # the latter is the builtin one from Python 3.11 on
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from bitblas import BitBLASError, Matmul, MatmulConfig
from bitblas.bench import Comparison, Peer, Timing, Workload
from bitblas.bench.card import CardMachine, compare_on_card, measure_card
from bitblas.cards import CardClock, Stopwatch, device_of
from bitblas.target import Target, resolve_target

from .. import cases as cpu_cases
from ..matmul import Session, say
from ..progress import Progress
from . import cases, costs
from .peers import card_peers
from .report import CardReport, driver_version, versions

#: Seconds for each candidate in each cell, and minutes after which the short run begins no cell.
SECONDS, QUICK_SECONDS, QUICK_MINUTES = 0.2, 0.1, 5.0
#: Of the estimate: drawing, packing and checking for each candidate and multiply-accumulate, and a candidate at least.
_SETUP_SECONDS, _SECONDS_PER_MAC = 0.3, 5e-13
#: The exit status where the card computes no more: a new process with --resume goes on.
CARD_LOST = 3


class CardLostError(Exception):
    """The card no longer computes in this process, because of a kernel of ours; with the cell that says so."""

    def __init__(self, said: str, row: Comparison) -> None:
        super().__init__(said)
        self.row = row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns
    -------
    int
        1 where a result was wrong or a goal was missed, 2 where something could not be asked, 3 where the card was lost.
    """
    options = _parser().parse_args(argv)
    lost = False
    try:
        report = _begin(options)
        try:
            _run(options, report)
        except CardLostError as error:
            lost = True
            say(f"the card is lost: {error}; repeat the command with --resume --out DIR")
    except (BitBLASError, OSError) as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 2
    print(report.markdown())
    if options.out is not None:
        for path in report.write(options.out):
            say(f"wrote {path}")
    wrong = [name for name, row in report.results if row.ours.seconds is None]
    return CARD_LOST if lost else 1 if wrong or any(goal.passed is False for goal in report.goals) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="the goals, and a few formats: some minutes")
    what.add_argument("--goals", action="store_true", help="only the cells of which a goal speaks, and the costs")
    parser.add_argument("--list", action="store_true", help="say what would be measured, which needs no card")
    parser.add_argument("--target", default="cuda", help="what to compile for (this card)")
    parser.add_argument("--seconds", type=float, help=f"for each candidate in each cell ({SECONDS}; {QUICK_SECONDS})")
    parser.add_argument("--match", default="", help="only cases whose name contains this; 'costs' for those alone")
    parser.add_argument("--peers", default="", help=f"only peers whose name contains this, beside {cases.FP16}")
    parser.add_argument(
        "--rows", type=cpu_cases.parse_rows, default=(), metavar="M,M", help="only these numbers of rows"
    )
    parser.add_argument(
        "--shapes", type=cpu_cases.parse_shapes, default=(), metavar="NxK,NxK", help="only these shapes"
    )
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="tune each operator first, for about so long")
    parser.add_argument(
        "--jobs", type=int, default=1, help="operators that are built at once, before the first cell (1)"
    )
    parser.add_argument("--out", type=Path, help="directory for gpu.json, gpu.md and the plots")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--minutes", type=float, help=f"begin no cell after so long (--quick: {QUICK_MINUTES})")
    return parser


def chosen(options: argparse.Namespace) -> list[cpu_cases.Case]:
    """The cases with the rows that the options leave."""
    found = cases.goal_cases() if options.goals else cases.quick() if options.quick else cases.full()
    return cpu_cases.Filter(options.match, options.rows, options.shapes).apply(found)


def _begin(options: argparse.Namespace) -> CardReport:
    """A report for this card, with what is there already."""
    if options.resume and options.out is None:
        raise BitBLASError("--resume needs --out, the directory of the run to go on with")
    if options.list:
        return CardReport(CardMachine("no card", "", "", "", 0, 0, 0), versions())
    target = resolve_target(options.target)
    device = device_of(target)
    torch.cuda.set_device(device)
    report = CardReport(measure_card(CardClock(device), device, driver_version()), versions(target))
    if options.resume:
        say(report.resume(options.out))
    return report


def _run(options: argparse.Namespace, report: CardReport) -> None:
    began, found = time.monotonic(), chosen(options)
    if options.list:
        for case in found:
            say(f"{case.name} {case.config.N} x {case.config.K}: M = {', '.join(map(str, case.rows))}")
        return
    target = resolve_target(options.target)
    device = device_of(target)
    seconds = options.seconds or (QUICK_SECONDS if options.quick or options.goals else SECONDS)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else float("inf"))
    place = Place(target, device, CardClock(device), report.machine, options.tune)
    session = CardSession(report, place, seconds, options.out, began + 60 * minutes, options.peers)
    if options.jobs > 1:
        build_ahead([case.config for case in found], target, options.jobs, began + 60 * minutes)
    session.measure(found)
    if options.match in "costs" and not report.costs and not session.is_late:
        for goal in costs.cost_goals():
            say(f"{goal.name}: {goal.measured}")
            report.costs.append(goal)


# -- building ahead --------------------------------------------------------------------------------------------------------


def build_ahead(configs: Sequence[MatmulConfig], target: Target, jobs: int, deadline: float) -> list[str]:
    """Build operators in several processes, which leave them in the store; what went wrong with any."""
    problems = []
    with ProcessPoolExecutor(min(jobs, max(1, len(configs))), get_context("spawn")) as pool:
        futures = [pool.submit(_build, config, target) for config in configs]
        try:
            problems = [future.result(timeout=max(1.0, deadline - time.monotonic())) for future in futures]
        except TimeoutError:
            problems.append("building ahead took too long")
            pool.shutdown(wait=False, cancel_futures=True)
    problems = [problem for problem in problems if problem]
    for problem in problems:
        say(problem)
    return problems


def _build(config: MatmulConfig, target: Target) -> str:
    try:
        Matmul(config, target=target)
    except BitBLASError as error:
        return f"{config.A_dtype} x {config.W_dtype} {config.N} x {config.K}: {str(error).splitlines()[0]}"
    return ""


# -- cells -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where cells are measured, and for how many seconds operators are tuned before, where they are."""

    target: Target
    device: torch.device
    stopwatch: Stopwatch
    machine: CardMachine
    tune: float | None = None


class CardSession(Session):
    """Cells one after the other on a card, each kept as soon as it is there.

    Parameters
    ----------
    report : CardReport
        Takes the results.
    place : Place
        Where.
    seconds, out, deadline, match
        See `Session`.
    """

    #: Raises where the card computes no more.
    synchronize: Callable[[], None] = staticmethod(torch.cuda.synchronize)

    def __init__(
        self, report: CardReport, place: Place, seconds: float, out: Path | None, deadline: float, match: str
    ) -> None:
        super().__init__(report, None, seconds, out, deadline, match)
        self.place = place
        self._peers = card_peers(place.machine.l2_bytes, self._dense)

    def peers_of(self, case: cpu_cases.Case) -> dict[str, Peer]:
        """Whom a case is timed beside, by name."""

        def wanted(name: str) -> bool:
            asked = bool(re.search(case.peers, name)) or name in case.variants
            return asked and (self.match in name or name == cases.FP16)

        return {name: peer for name, peer in self._peers.items() if wanted(name)}

    def estimate(self, case: cpu_cases.Case, m: int) -> float:
        """Seconds that a cell will take, about."""
        work = _SETUP_SECONDS + _SECONDS_PER_MAC * (m + 64) * case.config.N * case.config.K
        return (1 + len(self.peers_of(case))) * (self.seconds + work)

    def operator(self, case: cpu_cases.Case) -> Matmul:
        """Our operator, tuned where that is asked for."""
        op = Matmul(case.config, target=self.place.target)
        if self.place.tune and op.tuning_record is None:
            op.hardware_aware_finetune(seconds=self.place.tune)
        return op

    def _dense(self, workload: Workload) -> Matmul:
        return Matmul(workload.config, target=self.place.target, dense_cache=True)  # type: ignore[call-arg]

    def compare(self, op: Matmul, m: int, named: Sequence[Peer]) -> Comparison:
        """Measure a cell; that ours cannot be run is a result, too.

        Raises
        ------
        CardLostError
            The card computes no more in this process.
        """
        place = self.place
        try:
            return compare_on_card(op, m, named, place.stopwatch, place.machine, place.device, self.seconds)
        except RuntimeError as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"FAILED {op.config.A_dtype} x {op.config.W_dtype} {op.config.N} x {op.config.K} M={m}: {said}")
            row = failed_cell(op, m, said)
        try:
            self.synchronize()
        except RuntimeError:
            raise CardLostError(said, row) from None
        return row

    def _measure(
        self, case: cpu_cases.Case, rows: Sequence[int], progress: Progress, cost: Callable[[int], float]
    ) -> None:
        try:
            super()._measure(case, rows, progress, cost)
        except CardLostError as error:
            self.report.add(case.name, error.row)
            if self.out is not None:
                self.report.save(self.out)
            raise
        except BitBLASError as error:  # one operator that cannot be built leaves the others
            say(f"FAILED {case.name} {case.config.N} x {case.config.K}: {str(error).splitlines()[0]}")


def failed_cell(op: Matmul, m: int, said: str) -> Comparison:
    """A cell whose kernel could not be run: it has no time, and counts as wrong."""
    timing = Timing("bitblas", said, True, None, None, 0, float("inf"))
    size = op.config.N * op.config.K
    return Comparison({**op.config.fields(), "m": m}, m, m * size, op.layout.num_bytes, 0, (timing,), ())


if __name__ == "__main__":
    sys.exit(main())
