"""Operators by config, in memory and saved in a directory."""

from .operator import (
    OperatorCache,
    get_database_path,
    global_operator_cache,
    load_global_ops_cache,
    set_database_path,
)

__all__ = [
    "OperatorCache",
    "get_database_path",
    "global_operator_cache",
    "load_global_ops_cache",
    "set_database_path",
]
