"""Words of which programs for all machines are written in TVM's IR. Importing this imports TVM."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B


def named(name: str, value: Any) -> Any:
    """The value, under a name in the program's text."""
    IRBuilder.name(name, value)
    return value


def let(name: str, value: Expr) -> Expr:
    """A variable that holds a value."""
    return named(name, B.bind(value))


def i32(value: Expr | int) -> Expr:
    """As a 32-bit integer."""
    return tirx.const(value, "int32") if isinstance(value, int) else value.astype("int32")


def i64(value: Expr | int) -> Expr:
    """As a 64-bit integer."""
    return tirx.const(value, "int64") if isinstance(value, int) else value.astype("int64")
