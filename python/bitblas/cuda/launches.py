"""How the kernels of a function are launched, read out of TVM's host functions, for libraries that hold kernels only.

An expression is an int, or a list: ``["dim", tensor, axis]`` is a size of an argument of the function, and ``["stride", tensor,
axis]`` a stride, ``["data", tensor]`` its address, and ``[operator, x, y]`` a sum, a product and so on of two expressions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BuildError

if TYPE_CHECKING:
    import tvm

_AXES = "xyz"
_DYNAMIC_SHARED = "tirx.use_dyn_shared_memory"
_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Min": min,
    "Max": max,
}
#: Of `tvm_struct_get`: a tensor's address, shape and strides, an argument's type and value, an element of an array.
_DATA, _SHAPE, _STRIDES, _TYPE, _VALUE, _ELEMENT = 1, 2, 3, 13, 15, 17

Expression = Any


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes
    ----------
    kernel : str
        Its name.
    arguments : tuple of (str, expression)
        Each with its type: ``"pointer"``, ``"int32"`` or ``"int64"``.
    grid, block : tuple of 3 expressions
        Blocks, and threads of a block, along x, y and z.
    shared : expression
        Bytes of dynamic shared memory.
    """

    kernel: str
    arguments: tuple[tuple[str, Expression], ...]
    grid: tuple[Expression, ...]
    block: tuple[Expression, ...]
    shared: Expression

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Launch:
        """The launch with these `fields`."""
        arguments = tuple((kind, value) for kind, value in fields["arguments"])
        return cls(fields["kernel"], arguments, tuple(fields["grid"]), tuple(fields["block"]), fields["shared"])


def evaluate(expression: Expression, tensors: Sequence[Any]) -> int:
    """The value of an expression for the arguments of a call, torch tensors."""
    if isinstance(expression, int):
        return expression
    kind, *parts = expression
    if kind == "data":
        return tensors[parts[0]].data_ptr()
    if kind == "dim":
        return tensors[parts[0]].shape[parts[1]]
    if kind == "stride":
        return tensors[parts[0]].stride(parts[1])
    first, second = parts
    return _OPERATORS[kind](evaluate(first, tensors), evaluate(second, tensors))


def read_launches(mod: tvm.IRModule) -> dict[str, list[Launch]]:
    """The launches of each function of a host module, as it is before its built-ins are lowered, by the function's name.

    Raises
    ------
    BuildError
        There is something in it that is not understood here.
    """
    return {name.name_hint: _Reader(func).launches for name, func in mod.functions_items()}


class _Reader:
    """Reads the launches of one host function: what its variables stand for, then the calls."""

    def __init__(self, func: tvm.tirx.PrimFunc) -> None:
        self._args = func.params[1]
        self._values: list[tuple[Any, Any]] = []  # a variable or buffer, and what it stands for; told apart by identity
        self.launches: list[Launch] = []
        self._visit(func.body)

    def _visit(self, stmt: Any) -> None:
        from tvm import tirx

        if isinstance(stmt, tirx.SeqStmt):
            for child in stmt.seq:
                self._visit(child)
        elif isinstance(stmt, tirx.Bind):
            self._values.append((stmt.var, stmt.value))
        elif isinstance(stmt, tirx.DeclBuffer):
            if stmt.data is not None:
                self._values.append((stmt.buffer, stmt.data))
        elif isinstance(stmt, tirx.AttrStmt):
            self._visit(stmt.body)
        elif isinstance(stmt, tirx.Evaluate) and _is_call(stmt.value, "call_ffi_kernel"):
            self.launches.append(self._launch(stmt.value))

    def _launch(self, call: Any) -> Launch:
        places = [str(name) for name in call.attrs["launch_params"]]
        name, *arguments = list(call.args)
        sizes = dict(zip(places, arguments[len(arguments) - len(places) :], strict=True))
        known = {f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx") for axis in _AXES} | {_DYNAMIC_SHARED}
        if strange := sorted(set(sizes) - known):
            raise BuildError(f"a kernel is to be launched with {', '.join(strange)}, which needs nvcc")
        grid, block = (
            tuple(self._read(sizes[place]) if (place := f"{kind}.{axis}") in sizes else 1 for axis in _AXES)
            for kind in ("blockIdx", "threadIdx")
        )
        shared = self._read(sizes[_DYNAMIC_SHARED]) if _DYNAMIC_SHARED in sizes else 0
        given = arguments[: len(arguments) - len(places)]
        return Launch(name.value, tuple(self._argument(value) for value in given), grid, block, shared)

    def _argument(self, value: Any) -> tuple[str, Expression]:
        found = self._read(value)
        is_address = isinstance(found, list) and found[0] == "data"
        return "pointer" if is_address else str(value.ty.dtype), found

    def _read(self, expr: Any) -> Expression:
        from tvm import tirx

        if isinstance(expr, (int, tirx.IntImm)):
            return int(expr)
        if isinstance(expr, tirx.Var) and expr.same_as(self._args):
            return ["args"]
        holder = expr.args[0] if _is_call(expr, "buffer_data") else expr
        values = [value for known, value in self._values if known.same_as(holder)]
        if values:
            return self._read(values[-1])
        if isinstance(expr, tirx.Cast):
            return self._read(expr.value)
        kind = type(expr).__name__
        if kind in _OPERATORS:
            return [kind, self._read(expr.a), self._read(expr.b)]
        if _is_call(expr, "reinterpret"):
            return self._read(expr.args[0])
        if _is_call(
            expr, "if_then_else"
        ):  # a tensor, as an object or as DLPack's structure; a stride, which torch always tells
            found = self._read(expr.args[2])
            if isinstance(found, list) and found[0] in ("tensor", "stride"):
                return found
        if _is_call(expr, "tvm_struct_get"):
            return self._field(*expr.args)
        raise BuildError(f"the launch of a kernel needs {expr}, which is not understood without nvcc")

    def _field(self, holder: Any, index: Any, kind: Any) -> Expression:
        found, index, kind = self._read(holder), int(index), int(kind)
        if found == ["args"] and kind == _VALUE:
            return ["tensor", index]
        if found[0] == "tensor" and kind in (_DATA, _SHAPE, _STRIDES):
            return [{_DATA: "data", _SHAPE: "shape", _STRIDES: "strides"}[kind], found[1]]
        if found[0] in ("shape", "strides") and kind == _ELEMENT:
            return ["dim" if found[0] == "shape" else "stride", found[1], index]
        raise BuildError(
            f"the launch of a kernel needs field {kind} of an argument, which is not understood without nvcc"
        )


def _is_call(expr: Any, name: str) -> bool:
    op = getattr(expr, "op", None)
    return op is not None and getattr(op, "name", "").rpartition(".")[2] == name
