"""The operators that one process has, by config, and where they are saved by default."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path

from .. import env
from ..config import Config
from ..errors import ArgumentError, UnsupportedError
from ..locks import ForkLock
from ..logs import get_logger, warn_once
from ..ops import provider
from ..ops.operator import Operator
from ..ops.provider import Provided
from ..target import Target, resolve_target
from .database import KINDS, Database

_chosen_path: str | None = None


class OperatorCache:
    """Operators by config. It may be used by many threads; a config that is added twice holds the later operator.

    A database is a directory, which may be the artifact store (`get_database_path` is), and which many processes may share.
    It holds the libraries of the operators that were saved, and the tilings that they were built with, by target.
    """

    def __init__(self) -> None:
        self._operators: dict[Config, Operator] = {}
        self._lock = ForkLock()

    def __repr__(self) -> str:
        return f"OperatorCache(size={self.size()})"

    def add(self, config: Config, op: Operator) -> None:
        """Hold an operator under its config, in the place of another that has an equal one.

        Raises
        ------
        ArgumentError
            `config` is not that of `op`.
        """
        own = getattr(op, "config", config)
        if own != config:
            raise ArgumentError(f"config is {config!r}; it must be that of the operator, {own!r}")
        with self._lock.held():
            self._operators[config] = op

    def get(self, config: Config) -> Operator | None:
        """Return the operator of an equal config, or None."""
        return self._operators.get(config) if isinstance(config, Hashable) else None

    def exists(self, config: Config) -> bool:
        """Whether there is an operator of an equal config."""
        return self.get(config) is not None

    def size(self) -> int:
        """Number of operators."""
        return len(self._operators)

    def clear(self) -> None:
        """Forget all operators. What is saved stays, and so do operators that are used elsewhere."""
        with self._lock.held():
            self._operators.clear()

    def save_into_database(self, database_path: str | os.PathLike[str] | None = None, target: object = None) -> None:
        """Save all operators, each for the target that it was built for.

        What other processes have saved stays; an operator with the tilings that everybody gets does not replace a tuned one
        of the same config. A directory that cannot be written is a warning, and so is an operator that has no library,
        because it was compiled without a linker.

        Parameters
        ----------
        database_path : str or path, optional
            The directory, which is created; `get_database_path` by default.
        target : None, str, dict, Target, or tvm.target.Target
            Accepted for compatibility: an operator knows its target.

        Raises
        ------
        ArgumentError
            The path is no path.
        ConfigError
            The target is not understood.
        ArtifactError
            Others may write the directory.
        BuildError
            An operator that was never called had to be built for this, and could not be.
        """
        _resolve(target)
        database = Database(_path(database_path))
        with self._lock.held():
            operators = list(self._operators.values())
        for op in operators:
            if type(op) not in KINDS:
                kind, kinds = type(op).__name__, ", ".join(kind.__name__ for kind in KINDS)
                warn_once(f"database.kind {kind}", "operators of type %s are not saved: only %s", kind, kinds)
            else:
                database.save(op)

    def load_from_database(self, database_path: str | os.PathLike[str] | None, target: object = None) -> None:
        """Add what was saved for a target; nothing is built.

        Every library is verified and loaded now, which takes about a millisecond each and needs no TVM. What is damaged, or
        was saved by another version of bitblas or TVM, is left out with a warning.

        Parameters
        ----------
        database_path : str or path
            The directory; nothing is loaded where it is missing. None stands for `get_database_path`.
        target : None, str, dict, Target, or tvm.target.Target
            What to load operators for; see `bitblas.target.resolve_target`. There are none for a target that this version
            cannot build for.

        Raises
        ------
        ArgumentError
            The path is no path.
        ConfigError
            The directory is there, and the target is not understood.
        ArtifactError
            Others may write the directory.
        """
        database = Database(_path(database_path))
        if not database.exists():
            get_logger().debug("there is no database of operators in %s", database.path)
            return
        resolved = _resolve(target)
        for op in database.load(resolved) if resolved is not None else ():
            self.add(op.config, op)


def _path(value: str | os.PathLike[str] | None) -> Path:
    if value is None:
        value = get_database_path()
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise ArgumentError(f"database_path is {value!r}; it must be the path of a directory")
    return Path(os.path.expanduser(value)).absolute()  # noqa: PTH111 - Path.expanduser raises where no home is known


def _resolve(target: object) -> Target | None:
    try:
        return resolve_target(target)
    except UnsupportedError as error:
        get_logger().debug("there are no saved operators: %s", error)
        return None


#: What projects share that know nothing of each other.
global_operator_cache = OperatorCache()


def _find_saved(config: Config, target: Target) -> Provided | None:
    found = Database(_path(None)).find(config, target)
    return None if found is None else found.provided


provider.find_saved = _find_saved


def load_global_ops_cache(database_path: str | os.PathLike[str] | None = None, target: object = None) -> OperatorCache:
    """Load a database, by default that of `get_database_path`, into `global_operator_cache`, and return that."""
    global_operator_cache.load_from_database(database_path, target)
    return global_operator_cache


def get_database_path() -> str:
    """The directory of the database: what `set_database_path` was given, else BITBLAS_CACHE_DIR (~/.cache/bitblas)."""
    return str(env.CACHE_DIR.get()) if _chosen_path is None else _chosen_path


def set_database_path(path: str | os.PathLike[str] | None) -> str:
    """Choose the directory of the database for this process; None goes back to BITBLAS_CACHE_DIR.

    Returns
    -------
    str
        What `get_database_path` returns from now on.

    Raises
    ------
    ArgumentError
        `path` is no path.
    """
    global _chosen_path
    if path is not None:
        _path(path)
    _chosen_path = None if path is None else os.fspath(path)
    return get_database_path()
