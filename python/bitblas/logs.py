"""The logger of bitblas and its progress bars: quiet by default, on standard error until the application says otherwise."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

from . import env
from .errors import ConfigError

T = TypeVar("T")

#: Every message of bitblas goes here.
logger = logging.getLogger("bitblas")
_LEVELS = {name: getattr(logging, name) for name in env.LOG_LEVELS} | {"WARN": logging.WARNING, "FATAL": logging.FATAL}

#: Seconds that may pass without a word.
_PATIENCE_SECONDS = 1.0

_warned: dict[str, object] = {}


class _StandardError(logging.StreamHandler):
    """Writes to today's `sys.stderr` while the root logger has no handlers, and leaves the record to those it has."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))

    @property
    def stream(self) -> TextIO:
        return sys.stderr  # looked up on use, since applications and tests replace it

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Ignore the stream that StreamHandler stores."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


logger.addHandler(_StandardError())


def get_logger() -> logging.Logger:
    """Return the logger "bitblas"; the first call takes its level from BITBLAS_LOG_LEVEL, unless one is set already."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
        try:
            logger.setLevel(_LEVELS[env.LOG_LEVEL.get()])
        except ConfigError as error:
            logger.warning("%s", error)  # a misspelt level is no reason to fail
    return logger


def set_log_level(level: str | int) -> None:
    """Set how much bitblas logs.

    Parameters
    ----------
    level : str or int
        "debug", "info", "warning", "error" or "critical" in any case, or a number of the `logging` module. A name that
        is not known means "info".
    """
    if isinstance(level, str):
        level = _LEVELS.get(level.strip().upper(), logging.INFO)
    logger.setLevel(level)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar, on a terminal or in a notebook, for what takes longer than a second.

    Parameters
    ----------
    what : str
        What is going on.
    total : int
        How many steps it has.

    Yields
    ------
    callable
        To be called with the name of each step as it begins; the one before it is then done.
    """
    from tqdm.auto import tqdm  # only here: it would take a fifth of `import bitblas`

    # disable=None: in a notebook, and where standard error is a terminal
    with tqdm(total=total, desc=what, delay=_PATIENCE_SECONDS, disable=None, leave=False) as bar:
        begun = False

        def step(name: str) -> None:
            nonlocal begun
            bar.set_postfix_str(name, refresh=False)
            if begun:
                bar.update()
            begun = True

        yield step
        if begun:
            bar.update()


def tracked(steps: Sequence[T], what: str) -> Iterable[T]:
    """The steps of a loop, with a bar as that of `progress`."""
    from tqdm.auto import tqdm

    return tqdm(steps, desc=what, delay=_PATIENCE_SECONDS, disable=None, leave=False)


def warn_once(key: str, message: str, *args: object) -> None:
    """Log a warning the first time that this process gives `key`; `args` are merged into `message` by %."""
    mine = object()
    if _warned.setdefault(key, mine) is mine:  # one atomic step: no lock, which a fork could leave held
        get_logger().warning(message, *args, stacklevel=2)
