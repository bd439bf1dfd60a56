"""Locks that a forked child finds free, since their holders are not in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Stands for this process: a forked child has another.
_process = object()


def _start_afresh() -> None:
    global _process
    _process = object()


os.register_at_fork(after_in_child=_start_afresh)


class ForkLock:
    """A lock among the threads of one process. It is not reentrant."""

    def __init__(self) -> None:
        self._locks: dict[object, threading.Lock] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock in a ``with`` block; a child that is forked inside of the block leaves it as its parent does."""
        with self._locks.setdefault(_process, threading.Lock()):  # one atomic step
            yield
