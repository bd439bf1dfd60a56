"""Words of which programs for cards are written: statements, names, and arrays of registers. Importing this imports TVM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ..words import let as let
from ..words import named as named


@contextmanager
def when(condition: Expr | bool) -> Iterator[None]:
    """Statements under a condition; `True` for none."""
    if condition is True:
        yield
        return
    with B.If(condition), B.Then():
        yield


def run(name: str, *arguments: Expr) -> None:
    """A call of a function of `src/cuda` for its effects."""
    B.evaluate(B.call_extern("void", f"bitblas_{name}", *arguments))


class Registers:
    """An array of a thread, indexed by constants."""

    def __init__(self, name: str, size: int, dtype: str) -> None:
        self.buffer, self.size = named(name, B.sblock_alloc_buffer((size,), dtype, scope="local")), size

    def __getitem__(self, index: int) -> Expr:
        return self.buffer[index]

    def __setitem__(self, index: int, value: Expr) -> None:
        B.buffer_store(self.buffer, value, [index])

    def at(self, index: int) -> Expr:
        """The address of an element."""
        return B.address_of(self.buffer[index])

    def fill(self, value: Expr) -> None:
        """Set all elements."""
        for index in range(self.size):
            self[index] = value

    def take(self, other: Registers) -> None:
        """Copy all elements of another array."""
        for index in range(self.size):
            self[index] = other[index]
