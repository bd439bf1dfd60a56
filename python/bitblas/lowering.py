"""TVM's lowering pipeline, with loads that assume no more alignment than an element has. Importing this imports TVM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.tirx import compilation_pipeline

#: The name under which the pipeline is registered.
PIPELINE = "bitblas"


@tirx.transform.prim_func_pass(opt_level=0, name="bitblas.RelaxAlignment")
def _relax_alignment(func: tirx.PrimFunc, _mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tirx.PrimFunc:
    """Before -> after: ``attr(A, "storage_alignment", 64)`` -> ``attr(A, "storage_alignment", 1)``.

    Arguments come from users: slices, memory-mapped files, numpy. TVM takes them to be aligned to 64 bytes and does not look.
    """

    return func.with_body(_relax(func.body))


def _relax(stmt: tirx.Stmt) -> tirx.Stmt:
    """Rewrite the chain of argument checks at the head of a function; TVM offers no visitor in Python."""
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_relax(child) for child in stmt.seq])
    if not isinstance(stmt, tirx.AttrStmt):
        return stmt
    value = tirx.const(1, "int32") if stmt.attr_key == "storage_alignment" else stmt.value
    return tirx.AttrStmt(stmt.node, stmt.attr_key, value, _relax(stmt.body))


#: Takes the host functions of modules that are compiled, as they are before their built-ins are lowered.
_taker: ContextVar[list[tvm.IRModule] | None] = ContextVar("host functions", default=None)


@contextmanager
def keep_host_functions() -> Iterator[list[tvm.IRModule]]:
    """Collect the host functions of what is compiled inside of a `with` block: they say how kernels are launched."""
    found: list[tvm.IRModule] = []
    token = _taker.set(found)
    try:
        yield found
    finally:
        _taker.reset(token)


@tvm.transform.module_pass(opt_level=0, name="bitblas.KeepHostFunctions")
def _keep_host(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    taker = _taker.get()
    if taker is not None:
        taker.append(mod)
    return mod


def _pipeline() -> tuple[Any, Any, Any]:
    lower, finalize_host, finalize_device = default_s_tir_pipeline()

    def finalize() -> tvm.transform.Pass:
        return tvm.transform.Sequential([_keep_host, _relax_alignment, finalize_host()])

    return lower, finalize, finalize_device


compilation_pipeline.PIPELINE_MAP[PIPELINE] = _pipeline
