"""Tensor intrinsics of rules for threads, each a meaning and an implementation."""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from ...expr.streams import WORD_BYTES, join_bytes


@cache
def load_words(words: int) -> str:
    """1, 2 or 4 little-endian words of 32 bits, side by side in memory and aligned to their size, by one load."""
    name = f"bitblas.cuda.load_words_{words}"
    meaning, implementation = _one_word() if words == 1 else _several_words(words)
    TensorIntrin.register(name, meaning, implementation, override=True)
    return name


def _one_word() -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    @T.prim_func(s_tir=True)
    def meaning(
        W: T.Buffer((WORD_BYTES,), "int8", offset_factor=1), U: T.Buffer((1,), "int32", offset_factor=1, scope="local")
    ) -> None:
        with T.sblock("root"):
            T.reads(W[0:WORD_BYTES])
            T.writes(U[0:1])
            for _ in T.serial(0, 1):
                with T.sblock("words"):  # TVM leaves out the index of a loop that runs once
                    U[0] = join_bytes([W[j] for j in range(WORD_BYTES)])

    @T.prim_func(s_tir=True)
    def implementation(
        W: T.Buffer((WORD_BYTES,), "int8", offset_factor=1), U: T.Buffer((1,), "int32", offset_factor=1, scope="local")
    ) -> None:
        with T.sblock("root"):
            T.reads(W[0:WORD_BYTES])
            T.writes(U[0:1])
            U[0] = T.reinterpret("int32", W.vload([0], dtype=f"int8x{WORD_BYTES}"))

    return meaning, implementation


def _several_words(words: int) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    size = WORD_BYTES * words

    @T.prim_func(s_tir=True)
    def meaning(
        W: T.Buffer((size,), "int8", offset_factor=1), U: T.Buffer((words,), "int32", offset_factor=1, scope="local")
    ) -> None:
        with T.sblock("root"):
            T.reads(W[0:size])
            T.writes(U[0:words])
            for i in T.serial(0, words):
                with T.sblock("words"):
                    at = T.axis.remap("S", [i])
                    U[at] = join_bytes([W[at * WORD_BYTES + j] for j in range(WORD_BYTES)])

    @T.prim_func(s_tir=True)
    def implementation(
        W: T.Buffer((size,), "int8", offset_factor=1), U: T.Buffer((words,), "int32", offset_factor=1, scope="local")
    ) -> None:
        with T.sblock("root"):
            T.reads(W[0:size])
            T.writes(U[0:words])
            U[T.ramp(T.int32(0), 1, words)] = T.reinterpret(f"int32x{words}", W.vload([0], dtype=f"int8x{size}"))

    return meaning, implementation
