"""Operators by config, in memory, saved in a directory, and taken to other machines in bundles."""

import importlib

from .operator import (
    OperatorCache,
    get_database_path,
    global_operator_cache,
    load_global_ops_cache,
    set_database_path,
)

__all__ = [
    "OperatorCache",
    "export_bundle",
    "get_database_path",
    "global_operator_cache",
    "import_bundle",
    "load_global_ops_cache",
    "set_database_path",
]

#: What a process that only runs operators does without.
_LAZY = {"export_bundle": "bundle", "import_bundle": "importing"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
