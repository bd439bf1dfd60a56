"""The logger of bitblas: quiet by default, on standard error until the application configures logging itself."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from . import env
from .errors import ConfigError

_LOGGER = logging.getLogger("bitblas")
_LEVELS = {name: getattr(logging, name) for name in env.LOG_LEVELS} | {"WARN": logging.WARNING, "FATAL": logging.FATAL}

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


_LOGGER.addHandler(_StandardError())


def get_logger() -> logging.Logger:
    """Return the logger "bitblas"; the first call takes its level from BITBLAS_LOG_LEVEL, unless one is set already."""
    if _LOGGER.level == logging.NOTSET:
        _LOGGER.setLevel(logging.WARNING)
        try:
            _LOGGER.setLevel(_LEVELS[env.LOG_LEVEL.get()])
        except ConfigError as error:
            _LOGGER.warning("%s", error)  # a misspelt level is no reason to fail
    return _LOGGER


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
    _LOGGER.setLevel(level)


def warn_once(key: str, message: str, *args: object) -> None:
    """Log a warning the first time that this process gives `key`; `args` are merged into `message` by %."""
    mine = object()
    if _warned.setdefault(key, mine) is mine:  # one atomic step: no lock, which a fork could leave held
        get_logger().warning(message, *args, stacklevel=2)
