"""Measuring on another machine, through TVM's own RPC: it runs a server of TVM, and needs no bitblas."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ..config import Config
from ..errors import ArgumentError, BuildError, RemoteError, UnsupportedError
from ..measuring import TURN_SECONDS, spoil
from ..operands import draw_call
from ..plan import AnyPlan
from ..runtime import slab_rows
from ..target import Target
from .local import ChildBench, building, difference
from .search import LostError

T = TypeVar("T")

#: Seconds within which a tracker answers, and within which a machine becomes free.
ANSWER_SECONDS, FREE_SECONDS = 10.0, 60.0
#: Seconds after which the server ends a session, and with it a kernel that hangs; ours begin anew after half of them.
SESSION_SECONDS = 60.0
#: TVM's function that takes weights out of the caches before each call, so that they come from memory as they do in a model.
FLUSH = "cache_flush_cpu_non_first_arg"
#: Timed calls of a turn, at most.
_CALLS = 20
#: What LLVM calls a CPU that it does not know.
_UNKNOWN_CPUS = ("", "generic", "x86-64")


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``"host:port"``, or ``"[::1]:9190"``; else an ArgumentError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ArgumentError(f"the tracker is {address!r}; it must be of the form host:port")
    return host.strip("[]"), int(port)


def _within(seconds: float, function: Callable[[], T], late: str) -> T:
    """Call a function that may wait for ever; a RemoteError with the text `late` where it takes too long."""
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(function())
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # what TVM's client raises
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise RemoteError(_first_line(failed[0])) from failed[0]
    if not found:
        raise RemoteError(late)
    return found[0]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class Remote:
    """Sessions with a machine that serves a key to a tracker, one after the other.

    Parameters
    ----------
    address : str
        The tracker's, ``"host:port"``.
    key : str
        What the machine serves.

    Raises
    ------
    ArgumentError
        The address is of another form.
    RemoteError
        The tracker does not answer, or no machine serves the key.
    """

    def __init__(self, address: str, key: str) -> None:
        self.host, self.port = parse_address(address)
        self.address, self.key = address, key
        try:
            socket.create_connection((self.host, self.port), timeout=ANSWER_SECONDS).close()
        except OSError as error:
            raise RemoteError(f"the tracker {address} cannot be reached: {error}") from error
        try:
            from tvm import rpc
        except ImportError as error:
            raise BuildError(f"measuring elsewhere needs TVM, which cannot be imported ({error})") from error
        silent = f"{address} does not answer as a TVM tracker does"
        self._tracker = _within(ANSWER_SECONDS, lambda: rpc.connect_tracker(self.host, self.port), silent)
        self._session: Any = None
        self._began = 0.0
        self.check_served()

    def check_served(self) -> None:
        """Raise a RemoteError where no machine serves the key."""
        summary = _within(ANSWER_SECONDS, self._tracker.summary, f"the tracker {self.address} does not answer")
        served = sorted({str(server["key"]).removeprefix("server:") for server in summary["server_info"]})
        if self.key not in served:
            others = f"; it has {', '.join(served)}" if served else ""
            raise RemoteError(f"no machine serves the key {self.key!r} to the tracker {self.address}{others}")

    def session(self) -> Any:
        """The present session, or a new one where that is old or was dropped: compare by `is`."""
        if self._session is not None and time.monotonic() - self._began > SESSION_SECONDS / 2:
            self.drop()
        if self._session is None:
            self.check_served()
            self._session = _within(
                FREE_SECONDS,
                lambda: self._tracker.request(self.key, session_timeout=SESSION_SECONDS),
                f"no machine for {self.key!r} became free within {FREE_SECONDS:g} s",
            )
            self._began = time.monotonic()
        return self._session

    def drop(self) -> None:
        """Leave the session, so that the machine is free for others."""
        self._session = None

    def close(self) -> None:
        """Leave the machine and the tracker."""
        self.drop()
        self._tracker.close()


class RemoteBench:
    """Builds here, runs there.

    Parameters
    ----------
    built : ChildBench
        Builds.
    remote : Remote
        Where to run.
    """

    def __init__(self, built: ChildBench, remote: Remote) -> None:
        self._built, self._remote = built, remote
        self._loaded: dict[AnyPlan, Any] = {}
        self._arrays: tuple[tuple[Config, int], list[Any]] | None = None  # of a shape and so many rows
        self._of: Any = None  # the session that they belong to
        self._expected: dict[tuple[Config, int], torch.Tensor] = {}
        self._checked: set[tuple[AnyPlan, int]] = set()
        facts = self._ask()
        self.cpu, self.triple = facts
        #: Where it is measured, as JSON values.
        self.machine: dict[str, object] = {
            "name": f"{remote.key} of {remote.address}",
            "cpu": self.cpu,
            "system": self.triple,
        }

    def _ask(self) -> tuple[str, str]:
        """What LLVM says of the machine: its CPU and its triple."""
        session = self._remote.session()

        def ask() -> tuple[str, str]:
            names = ("target.llvm_get_system_cpu", "target.llvm_get_system_triple")
            cpu, triple = (str(session.get_function(name)()) for name in names)
            return cpu, triple

        return _within(ANSWER_SECONDS, ask, f"the machine for {self._remote.key!r} does not answer")

    def check_runnable(self, target: Target) -> None:
        """Raise an UnsupportedError where the machine is known to lack an instruction set of the target."""
        arch = self.triple.partition("-")[0]
        missing = {target.arch} if arch and arch != target.arch else set()
        if not missing and self.cpu not in _UNKNOWN_CPUS:
            missing = set(target.features - Target("llvm", target.arch, self.cpu).features)
        if missing:
            raise UnsupportedError(
                f"target {target} cannot run on the machine for {self._remote.key!r}, a {self.cpu or arch}, which lacks: "
                f"{', '.join(sorted(missing))}"
            )

    def build(self, plans: Sequence[AnyPlan], go_on: Callable[[], bool]) -> Iterator[tuple[AnyPlan, str]]:
        """See `Workbench`."""
        return self._built.build(plans, go_on)

    def turn(self, plan: AnyPlan, m: int, like: AnyPlan | None) -> list[float]:
        """See `Workbench`."""
        session = self._remote.session()
        try:
            return self._turn(session, plan, m)
        except (OSError, RuntimeError, ValueError) as error:  # a lost connection, a kernel or a library that fails
            self.leave()
            raise LostError(f"failed on {self._remote.key!r}: {_first_line(error)}") from error

    def leave(self) -> None:
        """End the session: whatever lives on the machine keeps it from serving others."""
        self._forget()
        self._remote.drop()

    def _forget(self) -> None:
        self._loaded.clear()
        self._arrays = self._of = None

    def _turn(self, session: Any, plan: AnyPlan, m: int) -> list[float]:
        if session is not self._of:
            self._forget()
            self._of = session
        launches = -(-m // slab_rows(plan, plan.kernels[0]))
        rows = -(-m // launches)
        arrays = self._upload(session, plan, rows)
        if plan not in self._loaded:
            name = f"candidate{len(self._loaded)}.so"
            session.upload(str(self._built.library(plan)), name)
            self._loaded[plan] = session.load_module(name)
        self._check(plan, rows, arrays)
        taken = self._time(session, plan, arrays, 1)
        calls = min(_CALLS, math.floor(TURN_SECONDS / max(taken[0], 1e-6)))
        if calls > 1:
            taken += self._time(session, plan, arrays, calls)
        return [launches * seconds for seconds in taken]

    def _time(self, session: Any, plan: AnyPlan, arrays: list[Any], calls: int) -> list[float]:
        """Seconds of calls, each with the weights out of the caches; before them goes one that does not count."""
        function = self._loaded[plan].time_evaluator(
            plan.kernels[0].name, session.cpu(0), number=1, repeat=calls, f_preproc=FLUSH
        )
        return [float(seconds) for seconds in function(*arrays).results]

    def _upload(self, session: Any, plan: AnyPlan, rows: int) -> list[Any]:
        """The operands, and the result, in the memory of the machine."""
        key = plan.config.for_bucket(None), rows
        if self._arrays is None or self._arrays[0] != key:
            from tvm.runtime import empty

            call, found = draw_call(plan.problem_of(rows)), []
            for tensor in (*call.inputs, call.out):
                array = empty(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), session.cpu(0))
                found.append(array.copyfrom(_as_numpy(tensor)))
            self._arrays = key, found
        return self._arrays[1]

    def _check(self, plan: AnyPlan, rows: int, arrays: list[Any]) -> None:
        """Compare the first result of a candidate with that of the first candidate."""
        if (plan, rows) in self._checked:
            return
        out = torch.zeros_like(_as_torch(arrays[-1]))
        arrays[-1].copyfrom(_as_numpy(spoil(out)))
        self._loaded[plan][plan.kernels[0].name](*arrays)
        got = _as_torch(arrays[-1])
        problem = difference(got, self._expected.setdefault((plan.config.for_bucket(None), rows), got))
        if problem:
            raise LostError(problem)
        self._checked.add((plan, rows))


def _as_numpy(tensor: torch.Tensor) -> Any:
    if tensor.dtype != torch.bfloat16:
        return tensor.contiguous().numpy()
    import ml_dtypes

    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _as_torch(array: Any) -> torch.Tensor:
    values = array.numpy()
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(values)


@contextmanager
def remote_bench(address: str, key: str, target: Target) -> Iterator[RemoteBench]:
    """A workbench on the machine that serves `key` to the tracker at `address`.

    Raises
    ------
    ArgumentError, RemoteError
        As for `Remote`.
    UnsupportedError
        That machine cannot run code for the target.
    BuildError
        There is no TVM, or no C compiler to link libraries.
    """
    remote = Remote(address, key)
    try:
        with building(parallel=True) as built:
            if built is None:
                raise BuildError("measuring elsewhere needs a C compiler (cc, gcc or clang) to link libraries with")
            bench = RemoteBench(built, remote)
            try:
                bench.check_runnable(target)
                yield bench
            finally:
                bench.leave()
    finally:
        remote.close()
