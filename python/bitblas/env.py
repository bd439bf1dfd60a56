"""Every environment variable that bitblas reads: name, type, default, one line of explanation."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .errors import BuildError, ConfigError

T = TypeVar("T")

#: What :func:`scope` has put in the place of the environment. Replaced as a whole, never changed in place.
_overrides: Mapping[str, str] = {}


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How the text of a variable becomes a value; `parse` raises ValueError for text that is not `allowed`."""

    name: str
    allowed: str
    parse: Callable[[str], T]


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. An empty value counts as unset."""

    name: str
    kind: Kind[T]
    default: str
    doc: str

    def text(self) -> str | None:
        """Return what the environment says, or None where it says nothing."""
        return _overrides.get(self.name, os.environ.get(self.name, "")).strip() or None

    def get(self) -> T:
        """Return the variable's value now.

        Raises
        ------
        ConfigError
            The text is not one that the variable's kind allows.
        """
        text = self.text()
        try:
            return self.kind.parse(self.default if text is None else text)
        except ValueError:
            raise ConfigError(f"{self.name}={text!r} is not allowed: expected {self.kind.allowed}") from None


@dataclass(frozen=True)
class Program(Variable[str]):
    """One that may name a program, with options."""

    def command(self) -> str | None:
        """Return the command that it names, or None where it names none.

        Raises
        ------
        BuildError
            There is no such program, or the text is no command.
        """
        named = self.get()
        if not named:
            return None
        try:
            words = shlex.split(named)
        except ValueError as error:
            raise BuildError(f"{self.name} is {named!r}, which is no command: {error}") from None
        if shutil.which(words[0]) is None:
            raise BuildError(f"{self.name} is {named!r}, and there is no such program")
        return named


@dataclass(frozen=True)
class Setting:
    """A row of :func:`settings`: a variable as it stands now. `value` is its text, also where that is malformed."""

    name: str
    kind: str
    value: str
    is_default: bool
    doc: str


def _parse_bool(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _parse_level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError(text)
    return text.upper()


def _parse_path(text: str) -> Path:
    if "\0" in text:
        raise ValueError(text)
    return Path(os.path.expanduser(text)).absolute()  # noqa: PTH111 - Path.expanduser raises where no home is known


LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_TEXT = Kind("text", "any text", str)
_BOOL = Kind("bool", "1, 0, true, false, yes, no, on or off", _parse_bool)
_PATH = Kind("path", "the path of a directory", _parse_path)
_LEVEL = Kind("level", ", ".join(LOG_LEVELS), _parse_level)

TARGET = Variable(
    "BITBLAS_TARGET", _TEXT, "", "what to compile for when an operator names no target; empty: the device that is there"
)
CACHE_DIR = Variable("BITBLAS_CACHE_DIR", _PATH, "~/.cache/bitblas", "where compiled operators are kept")
LOG_LEVEL = Variable("BITBLAS_LOG_LEVEL", _LEVEL, "WARNING", "how much bitblas logs")
CC = Program("BITBLAS_CC", _TEXT, "", "the C compiler that links CPU operators; empty: the first of cc, gcc, clang")
NVCC = Program(
    "BITBLAS_NVCC", _TEXT, "", "the CUDA compiler; empty: the first nvcc on the PATH, in a CUDA directory, or of PyPI"
)
KEEP_BUILD = Variable("BITBLAS_KEEP_BUILD", _BOOL, "0", "keep the files of a build that failed")

VARIABLES: tuple[Variable, ...] = (TARGET, CACHE_DIR, LOG_LEVEL, CC, NVCC, KEEP_BUILD)


def settings() -> list[Setting]:
    """Return every variable with its present value, in the order of ``VARIABLES``; never raises."""
    rows = []
    for variable in VARIABLES:
        text = variable.text()
        value = variable.default if text is None else text
        rows.append(Setting(variable.name, variable.kind.name, value, text is None, variable.doc))
    return rows


@contextmanager
def scope(**overrides: object) -> Iterator[None]:
    """Give variables other values inside a ``with`` block, for the whole process.

    Parameters
    ----------
    **overrides
        Values by variable name, such as ``BITBLAS_CACHE_DIR=tmp_path``. None stands for an unset variable.

    Raises
    ------
    ConfigError
        A name is unknown, or a value is not allowed.
    """
    global _overrides
    by_name = {variable.name: variable for variable in VARIABLES}
    unknown = sorted(set(overrides) - set(by_name))
    if unknown:
        raise ConfigError(f"unknown variable {unknown[0]}: expected one of {', '.join(by_name)}")
    before = _overrides
    _overrides = {**before, **{name: "" if value is None else str(value) for name, value in overrides.items()}}
    try:
        for name in overrides:
            by_name[name].get()
        yield
    finally:
        _overrides = before
