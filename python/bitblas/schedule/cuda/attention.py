"""Rules for attention on cards: which operators they take, and their tilings."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...config import FlashAttenConfig
from ...machines import Card
from ..rule import AttentionProblem, AttentionRule, AttentionTiling
from .attention_tiles import CHUNK, FRAGMENT, FragmentAttentionTiling, ThreadAttentionTiling

if TYPE_CHECKING:
    from tvm import tirx

_FLOATS = ("float16", "bfloat16")
#: Registers that results, scores and rows of Q may take of the 255 of a thread; the rest is for operands and addresses.
_MOST_REGISTERS = 200
#: Registers of a multiprocessor, and those that a thread of a kernel takes besides.
_ALL_REGISTERS, _OTHER_REGISTERS = 1 << 16, 55
#: Bytes of a multiprocessor's shared memory that each block takes for itself.
_BLOCK_BYTES = 1024
#: Threads of a multiprocessor that are enough: while some compute weights, others multiply.
_ENOUGH_THREADS = 256
#: Keys of a tile below which barriers and maxima cost more than products.
_FEW_KEYS = 32
#: How many tilings are offered.
_MOST_TILINGS = 12

#: Shapes by the rows that they are for at most: (rows, warps over rows, warps over keys, whether Q stays in registers), the
#: best first: the more rows, the less often keys and values are read.
_SHAPES: dict[int, tuple[tuple[int, int, int, bool], ...]] = {
    16: ((16, 1, 4, True), (16, 1, 2, True), (16, 1, 1, False)),
    64: ((64, 4, 1, True), (64, 4, 1, False), (32, 2, 1, False), (16, 1, 1, False)),
    128: (
        (128, 4, 1, False),
        (128, 8, 1, False),
        (64, 4, 1, True),
        (64, 4, 1, False),
        (32, 2, 1, False),
        (16, 1, 1, False),
    ),
}
#: Rows of a block that computes number by number, for heads of so many elements at most: results fit the registers.
_THREAD_ROWS = ((128, 64), (256, 32), (512, 16), (1024, 8))
_KEYS, _STAGES = (128, 64, 32, 16), (2, 1)


class FragmentAttentionRule(AttentionRule[FragmentAttentionTiling]):
    """Both products by tensor cores, scores and weights in registers; K and V pass through shared memory."""

    name = "cuda_attention_mma"
    target_kind: ClassVar[str] = "cuda"

    def decline(self, problem: AttentionProblem) -> str | None:
        """See `Rule`."""
        if reason := super().decline(problem):
            return reason
        config, target = problem.config, problem.target
        dtypes = {config.Q_dtype, config.K_dtype, config.V_dtype}
        if len(dtypes) > 1 or config.Q_dtype not in _FLOATS:
            return f"takes Q, K and V all in {' or '.join(_FLOATS)}, not {', '.join(sorted(dtypes))}"
        if config.Q_dtype == "bfloat16" and target.capability < 80:
            return f"multiplies bfloat16 from capability 8.0 on, not on {target}"
        if config.dim % CHUNK or config.dim_v % CHUNK:
            return f"takes dim and dim_v in multiples of {CHUNK}, not {config.dim} and {config.dim_v}"
        if not _tilings(problem):
            return f"has no room for heads of {config.dim} and {config.dim_v} in registers and shared memory"
        return None

    def tilings(self, problem: AttentionProblem) -> list[FragmentAttentionTiling]:
        """See `Rule`."""
        return _tilings(problem)

    def apply(self, func: tirx.PrimFunc, problem: AttentionProblem, tiling: FragmentAttentionTiling) -> tirx.PrimFunc:
        """See `Rule`."""
        from .attention_program import AttentionProgram

        return AttentionProgram(problem.config, tiling).func(str(func.attrs["global_symbol"]))


def _tilings(problem: AttentionProblem) -> list[FragmentAttentionTiling]:
    """Tilings that fit, those first of which a multiprocessor holds enough."""
    config, card = problem.config, problem.target.card
    assert card is not None
    size = next(size for size in _SHAPES if problem.m <= size or size == max(_SHAPES))
    found = []
    for rows, warps_m, warps_n, keeps_q in _SHAPES[size]:
        for keys, stages in itertools.product(_KEYS, _STAGES):
            tiling = FragmentAttentionTiling(rows, keys, warps_m, warps_n, stages, keeps_q)
            fits = tiling.registers(config) <= _MOST_REGISTERS and tiling.shared_bytes(config) <= card.shared_bytes
            if keys % (FRAGMENT * warps_n) == 0 and fits:
                found.append(replace(tiling, blocks_at_once=_blocks(tiling, config, card)))

    def cost(tiling: FragmentAttentionTiling) -> tuple[bool, int]:
        return tiling.block_n < _FEW_KEYS, -min(tiling.blocks_at_once * tiling.num_threads, _ENOUGH_THREADS)

    return sorted(found, key=cost)[:_MOST_TILINGS]


def _blocks(tiling: FragmentAttentionTiling, config: FlashAttenConfig, card: Card) -> int:
    """Blocks that a multiprocessor holds at once."""
    by_memory = (card.shared_bytes + _BLOCK_BYTES) // (tiling.shared_bytes(config) + _BLOCK_BYTES)
    by_registers = _ALL_REGISTERS // (tiling.num_threads * (tiling.registers(config) + _OTHER_REGISTERS))
    return max(1, min(by_memory, by_registers))


class ThreadAttentionRule(AttentionRule[ThreadAttentionTiling]):
    """Number by number in float32: every dtype, dim, alignment and card."""

    name = "cuda_attention_threads"
    target_kind: ClassVar[str] = "cuda"

    def tilings(self, problem: AttentionProblem) -> list[ThreadAttentionTiling]:
        """See `Rule`."""
        config = problem.config
        most = next(rows for dim, rows in _THREAD_ROWS if max(config.dim, config.dim_v) <= dim)
        sizes = [rows for _, rows in _THREAD_ROWS if rows <= most]
        enough = [rows for rows in sizes if rows < 2 * problem.m]
        order = enough + [rows for rows in reversed(sizes) if rows not in enough]
        return [ThreadAttentionTiling.of(rows) for rows in order]

    def apply(self, func: tirx.PrimFunc, problem: AttentionProblem, tiling: ThreadAttentionTiling) -> tirx.PrimFunc:
        """See `Rule`."""
        from .attention_threads import ThreadAttentionProgram

        return ThreadAttentionProgram(problem.config, tiling).func(str(func.attrs["global_symbol"]))


CUDA_ATTENTION_RULES: tuple[AttentionRule[Any], ...] = (FragmentAttentionRule(), ThreadAttentionRule())
CUDA_ATTENTION_TILINGS: tuple[type[AttentionTiling], ...] = (FragmentAttentionTiling, ThreadAttentionTiling)
