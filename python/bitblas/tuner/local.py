"""Building and measuring on this machine: in children, so that a crash or a hang loses a candidate and not the process."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..artifacts.process import this_process
from ..build import (
    LIBRARY,
    SOURCES,
    build_library,
    compile_module,
    compile_module_for_card,
    compile_plan,
    find_compiler,
)
from ..cards import Batch, CardClock, Stopwatch, batch_of, cache_bytes_of, device_of, take_batches, time_on
from ..config import Config
from ..cuda.compile import Compiled, write_cuda
from ..errors import BitBLASError, BuildError
from ..logs import warn_once
from ..measuring import spoil, take_turn
from ..operands import Operands, draw_call
from ..plan import AnyPlan, KernelPlan, plan_problem
from ..runtime import Kernels, load_kernels, wrap_executable, wrap_function
from ..schedule import AttentionProblem, Problem
from ..target import Target
from .children import Children
from .search import LostError, Workbench

if TYPE_CHECKING:
    import tvm

#: Seconds that a build may take, and the first turn with a number of rows, which draws the operands: more is a hang.
BUILD_SECONDS, FIRST_SECONDS = 120.0, 120.0
#: The other turns may take this many seconds, and this many times as long as that first one.
TURN_SECONDS, SLOWER = 5.0, 3.0
#: Seconds of a turn: there are many candidates, and most are far off.
RACE_SECONDS = 0.03
#: How far results may differ, as parts of themselves and of their root mean square: tilings add in different orders.
RELATIVE, ABSOLUTE = 1e-2, 2e-2
#: With this status a child ends whose card no longer computes: nothing but a new process mends that.
CARD_LOST = 70


# -- jobs, which run in a child --------------------------------------------------------------------------------------------


def build_job(plan: AnyPlan, directory: Path, compiler: str) -> tuple[str, str]:
    """Build a library; what went wrong, or nothing, and the library's name."""
    try:
        made = build_library(plan, directory, compiler)
    except BitBLASError as error:
        return str(error), ""
    return "", str(made["library"])


def turn_job(
    library: Path, plan: AnyPlan, m: int, threads: int, like: tuple[Path, AnyPlan] | None
) -> list[float] | str:
    """Seconds of some calls; or what is wrong with the results, where they are looked at for the first time."""
    torch.set_num_threads(threads)
    try:
        other = None if like is None else _loaded(*like)
        return _runner.turn(_loaded(library, plan), plan, m, other)
    except RuntimeError as error:
        if plan.target.kind != "cuda":
            raise
        return end_unless_usable(error, torch.cuda.synchronize)


def end_unless_usable(error: RuntimeError, synchronize: Callable[[], None]) -> str:
    """What a kernel did wrong; where the card no longer computes, as after an access to wrong memory, this ends the process."""
    said = str(error).strip().splitlines()
    text = f"cannot be run: {said[0] if said else type(error).__name__}"
    try:
        synchronize()
    except RuntimeError as worse:
        last = str(worse).strip().splitlines()
        sys.stderr.write(f"error: {last[0] if last else text}\n")  # its last words
        sys.stderr.flush()
        os._exit(CARD_LOST)
    return text


@cache
def _loaded(library: Path, plan: AnyPlan) -> Kernels:
    return load_kernels(library, plan)


class Runner:
    """Runs candidates on the operands of one problem after the other, and looks at the first result of each.

    Parameters
    ----------
    stopwatch : Stopwatch, optional
        Times launches on a card; the card's by default.
    """

    def __init__(self, stopwatch: Stopwatch | None = None) -> None:
        self._stopwatch = stopwatch
        self._batches: dict[tuple[AnyPlan, int], Batch] = {}
        self._problem: tuple[Config, int] | None = None
        self._operands: Operands | None = None
        self._expected: torch.Tensor | None = None
        self._checked: set[tuple[AnyPlan, int]] = set()

    def turn(self, kernels: Kernels, plan: AnyPlan, m: int, like: Kernels | None) -> list[float] | str:
        """Seconds of some calls, or how the result differs from that of `like`."""
        operands = self._draw(plan, m)
        if (plan, m) in self._checked:
            return self._take(kernels, plan, m, operands)
        spoil(operands.out)
        taken = self._take(kernels, plan, m, operands)
        got = operands.out.clone()
        if self._expected is None:
            self._expected = got if like is None else operands.launch(like).clone()
        problem = difference(got, self._expected)
        if problem:
            return problem
        self._checked.add((plan, m))
        return taken

    def _take(self, kernels: Kernels, plan: AnyPlan, m: int, operands: Operands) -> list[float]:
        """Seconds of each call of a turn; on a card of one launch in each batch."""
        if plan.target.kind != "cuda":
            return take_turn(lambda: operands.launch(kernels), least=1, seconds=RACE_SECONDS)
        if (plan, m) not in self._batches:
            self._stopwatch = self._stopwatch or CardClock(operands.out.device)
            call = partial(operands.launch, kernels)
            self._batches[plan, m] = batch_of(self._stopwatch, call, len(operands.copies))
        return take_batches(self._batches[plan, m], least=1, seconds=RACE_SECONDS)

    def _draw(self, plan: AnyPlan, m: int) -> Operands:
        problem = plan.config.for_bucket(None), m  # the same for all candidates
        if self._operands is None or self._problem != problem:
            self._operands = self._expected = None  # before there is memory for others
            self._batches.clear()
            device = torch.device("cpu") if self._stopwatch is not None else device_of(plan.target)
            call = draw_call(plan.problem_of(m)).to(device)
            self._operands, self._problem = Operands(call, cache_bytes_of(plan.target)), problem
        return self._operands


_runner = Runner()  # a child's


def difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    """How a result differs from what another tiling gave; empty where it is the same up to rounding."""
    if not got.is_floating_point():
        wrong = int((got != expected).sum())
        return f"gives other results: {wrong} of {got.numel()} integers differ" if wrong else ""
    got, expected = got.double(), expected.double()
    size = float(expected[expected.isfinite()].square().mean().sqrt()) if bool(expected.isfinite().any()) else 0.0
    near = torch.isclose(got, expected, rtol=RELATIVE, atol=ABSOLUTE * size, equal_nan=True)
    if bool(near.all()):
        return ""
    return f"gives other results: {int((~near).sum())} of {got.numel()} numbers differ"


# -- workbenches -----------------------------------------------------------------------------------------------------------


class ChildBench:
    """Libraries in a directory, built by several children at once and run by one of them.

    Parameters
    ----------
    children : Children
        Who works.
    directory : Path
        Where libraries go; to be removed by the caller.
    compiler : str
        What `build.find_compiler` gave for the target.
    """

    def __init__(self, children: Children, directory: Path, compiler: str) -> None:
        self._children, self._directory, self._compiler = children, directory, compiler
        self._built: dict[AnyPlan, Path] = {}
        self._first: dict[int, float] = {}  # seconds of the first turn, by rows

    def build(self, plans: Sequence[AnyPlan], go_on: Callable[[], bool]) -> Iterator[tuple[AnyPlan, str]]:
        """See `Workbench`."""
        rooms = [Path(tempfile.mkdtemp(dir=self._directory)) for _ in plans]
        jobs = [(plan, room, self._compiler) for plan, room in zip(plans, rooms, strict=True)]
        for index, done in self._children.each(build_job, jobs, BUILD_SECONDS, go_on):
            error, library = (f"the build {done}", "") if isinstance(done, LostError) else done
            if not error:
                self._built[plans[index]] = rooms[index] / library
            yield plans[index], error

    def library(self, plan: AnyPlan) -> Path:
        """The library of a candidate that was built."""
        return self._built[plan]

    def turn(self, plan: AnyPlan, m: int, like: AnyPlan | None) -> list[float]:
        """See `Workbench`."""
        limit = TURN_SECONDS + SLOWER * self._first[m] if m in self._first else FIRST_SECONDS
        other, began = None if like is None else (self._built[like], like), time.perf_counter()
        library, threads = self._built[plan], torch.get_num_threads()
        taken = self._children.first.call(turn_job, library, plan, m, threads, other, seconds=limit)
        if isinstance(taken, str):
            raise LostError(taken)
        self._first.setdefault(m, time.perf_counter() - began)
        return taken


class HereBench:
    """Kernels that this process compiles in memory and runs itself: where there is no linker, nothing can be handed over."""

    def __init__(self) -> None:
        self._kernels: dict[AnyPlan, Kernels] = {}
        self._runner = Runner()

    def build(self, plans: Sequence[AnyPlan], go_on: Callable[[], bool]) -> Iterator[tuple[AnyPlan, str]]:
        """See `Workbench`."""
        for plan in plans:
            if not go_on():
                return
            try:
                self._kernels[plan] = wrap_executable(compile_plan(plan)[0], plan)
            except BitBLASError as error:
                yield plan, str(error)
            else:
                yield plan, ""

    def turn(self, plan: AnyPlan, m: int, like: AnyPlan | None) -> list[float]:
        """See `Workbench`."""
        taken = self._runner.turn(self._kernels[plan], plan, m, None if like is None else self._kernels[like])
        if isinstance(taken, str):
            raise LostError(taken)
        return taken


def measure_module(mod: tvm.IRModule, problem: Problem | AttentionProblem) -> float:
    """Median seconds of a call of a module's one scheduled function on random operands, compiled and run in this process.

    Raises
    ------
    BuildError
        TVM could not compile it.
    UnsupportedError
        This machine cannot run code for the target.
    """
    problem.target.check_runnable()
    on_card = problem.target.kind == "cuda"
    try:
        compiled = (compile_module_for_card if on_card else compile_module)(mod, problem.target)
    except (RuntimeError, ValueError, TypeError) as error:  # what TVM's own errors derive from
        raise BuildError(f"TVM could not compile {problem.config} for {problem.target}", output=str(error)) from error
    ((variable, func),) = mod.functions_items()
    if on_card:
        kernels = _kernels_of(compiled, variable.name_hint, func, problem)
    else:
        kernels = wrap_function(compiled, variable.name_hint, problem.m)
    return time_on(problem.target, kernels, draw_call(problem))


def _kernels_of(compiled: Compiled, name: str, func: object, problem: Problem | AttentionProblem) -> Kernels:
    """Load a described function for cards, which was compiled and is built now."""
    from ..transform import read_description

    found, target = read_description(func, problem.target), problem.target
    if found is None:
        raise BuildError(f"{name} has no description, which says what it needs beside its operands")
    plan = plan_problem(problem, KernelPlan(name, *found[1:], (problem.m,)))
    directory = this_process.scratch()
    try:
        compiler = find_compiler(target)
        assert compiler is not None
        write_cuda(compiled, directory / SOURCES["cuda"], directory / LIBRARY, compiler)
        return load_kernels(directory / LIBRARY, plan)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def num_builders() -> int:
    """Physical cores that this process may use; at least 1."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return max(1, min(cores, len(psutil.Process().cpu_affinity())))


@contextmanager
def building(parallel: bool, target: Target | None = None) -> Iterator[ChildBench | None]:
    """Children that build libraries for a target, and a place for those; None where there is no C compiler to link them."""
    compiler = find_compiler(target)
    if compiler is None:
        yield None
        return
    directory = this_process.scratch()
    try:
        with Children(num_builders() if parallel else 1) as children:
            yield ChildBench(children, directory, compiler)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def local_bench(target: Target, parallel: bool = True) -> Iterator[Workbench]:
    """A workbench on this machine.

    Raises
    ------
    UnsupportedError
        This machine cannot run code for the target.
    BuildError
        It is a card, and nothing compiles for cards.
    """
    target.check_runnable()
    device_of(target)
    with building(parallel, target) as bench:
        if bench is None:
            warn_once(
                "tuning in this process",
                "there is no C compiler (cc, gcc or clang), so that candidates are built and run in this process: one that "
                "crashes ends it",
            )
        yield bench or HereBench()


__all__ = ["ChildBench", "HereBench", "building", "local_bench", "measure_module", "num_builders"]
