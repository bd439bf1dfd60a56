"""Child processes that import TVM once, do one job after the other, and cost one job when they crash or hang."""

from __future__ import annotations

import os
import queue
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import BuildError
from .search import LostError

if TYPE_CHECKING:
    import subprocess

    from typing_extensions import Self

T = TypeVar("T")

#: Run in a new child: it finds the modules that we find, and leaves Ctrl-C to us, who then end it.
_PREPARE = "import signal, sys; sys.path[:] = {path!r}; signal.signal(signal.SIGINT, signal.SIG_IGN)"
#: Characters of a crashed child's last words.
_LAST_WORDS = 500


class Child:
    """One process, started by its first job and again after a crash. Its output goes to a file."""

    def __init__(self) -> None:
        try:
            from tvm.support.popen_pool import PopenWorker
        except ImportError as error:
            raise BuildError(f"tuning builds operators with TVM, which cannot be imported ({error})") from error
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        prepare = _PREPARE.format(path=[os.path.abspath(entry or os.curdir) for entry in sys.path])  # noqa: PTH100
        self._worker = PopenWorker(initializer=exec, initargs=(prepare,), stdout=self._log, stderr=self._log)
        self._ended = False

    def call(self, function: Callable[..., T], *arguments: Any, seconds: float) -> T:
        """Do a job, a function of a module with arguments that can be pickled.

        Raises
        ------
        LostError
            It crashed, or took more than `seconds`.
        """
        if self._ended:
            raise LostError("the child was ended")
        self._log.seek(0)
        self._log.truncate()
        try:
            self._worker.send(function, arguments, timeout=seconds)
            process = self._process()
            result: T = self._worker.recv()
        except TimeoutError:
            raise LostError(f"took more than {seconds:g} s") from None
        except ChildProcessError:
            raise LostError(self._last_words(process)) from None
        return result

    def _process(self) -> subprocess.Popen[bytes] | None:
        """The process, which PopenWorker forgets when it ends."""
        return self._worker._proc

    def _last_words(self, process: subprocess.Popen[bytes] | None) -> str:
        status = None if process is None else process.poll()
        name = "an unknown status" if status is None else f"status {status}"
        if status is not None and status < 0:
            name = signal.Signals(-status).name
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
        return f"crashed with {name}" + (f": {said[:_LAST_WORDS]}" if said else "")

    def end(self) -> None:
        """End the process now; whoever waits for a job of it gets a LostError."""
        self._ended = True
        process = self._process()
        if process is not None:  # by hand: PopenWorker.kill waits for a thread that reads from it
            process.kill()

    def close(self) -> None:
        """End the process, when nobody waits for it, and forget what it said."""
        self.end()
        self._worker.kill()
        self._log.close()


class Children:
    """Several children, to be used in a `with` block, which ends them."""

    def __init__(self, count: int) -> None:
        self._children = [Child() for _ in range(max(1, count))]
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        for child in self._children:
            child.close()

    def _leave(self) -> None:
        """End the jobs that are still being done, and wait for the threads that wait for them."""
        if self._pool is not None:
            for child in self._children:
                child.end()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    @property
    def first(self) -> Child:
        """The one that measures."""
        return self._children[0]

    def each(
        self,
        function: Callable[..., T],
        jobs: Sequence[tuple[Any, ...]],
        seconds: float,
        go_on: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[int, T | LostError]]:
        """Do jobs, as many at once as there are children; yields each job's number and result as they are done.

        Where `go_on` is False no further job is begun.
        """
        idle = queue.SimpleQueue[Child]()
        for child in self._children:
            idle.put(child)

        def work(job: tuple[Any, ...]) -> list[T]:
            if not go_on():
                return []
            child = idle.get()
            try:
                return [child.call(function, *job, seconds=seconds)]
            finally:
                idle.put(child)

        self._leave()
        pool = self._pool = ThreadPoolExecutor(len(self._children))
        try:
            numbers = {pool.submit(work, job): number for number, job in enumerate(jobs)}
            for future in as_completed(numbers):
                try:
                    for result in future.result():
                        yield numbers[future], result
                except LostError as error:
                    yield numbers[future], error
            pool.shutdown()
            self._pool = None
        finally:
            self._leave()  # where somebody has left early: by Ctrl-C, or by an exception
