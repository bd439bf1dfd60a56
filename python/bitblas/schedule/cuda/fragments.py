"""Rules for tensor cores: which operators they take, and their tilings."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ...config import MatmulConfig
from ...layout import FRAGMENT_K, FRAGMENT_N, PackedLayout
from ...machines import Card
from ...target import Target
from ..rule import Problem, ScheduleRule
from .fragments_cost import card_of, estimate
from .tiles import FRAGMENT_M, FragmentTiling, divisor_steps

if TYPE_CHECKING:
    from tvm import tirx

#: Rows that one product takes: up to so many a weight is multiplied once, where it was loaded.
FEW_ROWS = FRAGMENT_M
#: Bytes of weights that a thread asks for at once.
_AT_ONCE_BYTES = 64
#: k of a step at most, which bounds the registers of activations: two steps are on their way at once.
_MOST_K = 128
#: Rows times tiles of columns of a warp beyond which sums leave no registers for the words of more than 64 k.
_MANY_SUMS = 64
#: Warps of a block that share out K.
_WARPS_K = (8, 4, 16)
#: Parts of K that blocks share out.
_PARTS = (1, 2, 3, 4, 6, 8)
#: Rows of a launch of a kernel whose sums meet in memory.
_SPLIT_SLAB = 256
_STAGES = 4
#: How many tilings are offered.
_MOST_TILINGS = 12

#: Shapes of tiles of many rows: (rows, warps, tiles of 16 columns of a warp).
_SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    16: ((16, 4, 2), (16, 8, 1), (16, 4, 1)),
    32: ((32, 4, 2), (32, 8, 2), (32, 4, 1)),
    64: ((64, 4, 2), (32, 4, 4), (64, 4, 1), (64, 8, 2)),
    128: ((64, 8, 2), (64, 4, 2), (32, 8, 4), (64, 8, 1)),
}
#: … and more where activations are quantized: fewer rows, whose magnitudes each block looks for, beside more columns.
_QUANTIZED_SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    16: ((16, 8, 2),),
    32: ((16, 8, 4), (32, 8, 4)),
    64: ((16, 8, 4), (32, 8, 4)),
    128: ((16, 8, 4), (32, 4, 4)),
}


def declines_fragments(config: MatmulConfig, target: Target) -> str | None:
    """Say why tensor cores of a card do not take a config; None where they do."""
    fmt, group = config.format, config.group
    if fmt.is_native:
        return f"takes weights of at most 8 bits, not {fmt.name}"
    if config.activation_groups > 1:
        return "quantizes activations by row, not by group"
    if not config.dynamic_quantization:
        if config.A_dtype == "float32":
            return "takes activations of at most 16 bits, not float32"
        if config.A_dtype == "bfloat16" and target.capability < 80:
            return f"multiplies bfloat16 from capability 8.0 on, not on {target}"
    if config.N % FRAGMENT_N or config.K % FRAGMENT_K:
        return f"takes N in multiples of {FRAGMENT_N} and K of {FRAGMENT_K}, not N = {config.N}, K = {config.K}"
    if config.is_grouped and config.num_groups > 1 and group % 32:
        return f"takes groups in multiples of 32, not of {group}"
    if config.integer_products:
        if config.sum_dtype not in ("int32", "float32"):
            return f"sums integers in int32 and float32, not {config.sum_dtype}"
        if group * 128 * 255 >= 1 << 31:
            return f"sums integers of a group in int32, which groups of {group} may overflow"
        if config.zeros_packed and fmt.bits == 8:
            return f"multiplies bytes, which {fmt.name} less a zero point does not fit"
    return None


def multiplies_float8(config: MatmulConfig, target: Target) -> bool:
    """Whether float8 is multiplied as it is, whose sums cards keep in fewer bits than float32 has: where 16 are enough."""
    both = config.format.kind == "float8" and config.A_dtype.startswith("float8")
    return both and target.capability >= 89 and config.accum_dtype in ("float16", "bfloat16")


def fragment_layout(config: MatmulConfig, target: Target) -> PackedLayout:
    """The layout that the rules for tensor cores read."""
    name = "mma8" if config.integer_products or multiplies_float8(config, target) else "mma16"
    return PackedLayout(config.N, config.K, config.format.bits, name)


class FragmentRule(ScheduleRule[FragmentTiling]):
    """Weights are decoded in registers and multiplied by tensor cores; activations pass through shared memory."""

    name = "cuda_mma"
    target_kind: ClassVar[str] = "cuda"
    layouts = ("mma16", "mma8")

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        return super().decline(problem) or declines_fragments(problem.config, problem.target)

    def tilings(self, problem: Problem) -> list[FragmentTiling]:
        """See `ScheduleRule`."""
        config = problem.config
        size = min(max(16, 1 << (problem.m - 1).bit_length()), max(_SHAPES))
        sizes = [size >> smaller for smaller in range(4) if size >> smaller in _SHAPES]
        found = next(filter(None, (_staged(problem, each) for each in sizes)), [])
        rows = min(size, 32 if config.dynamic_quantization else 64)
        return _with_parts(
            problem, found or [FragmentTiling(rows, FRAGMENT_N, FRAGMENT_K, stages=_least_stages(config))]
        )

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: FragmentTiling) -> tirx.PrimFunc:
        """See `ScheduleRule`."""
        from .fragments_program import FragmentProgram

        return FragmentProgram(problem.config, problem.layout, tiling).func(str(func.attrs["global_symbol"]))


class FragmentGemvRule(FragmentRule):
    """A few rows: each warp reads the activations of its part of K itself, and warps add up their sums."""

    name = "cuda_mma_gemv"

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        if problem.m > FEW_ROWS:
            return f"is for up to {FEW_ROWS} rows, not {problem.m}"
        return super().decline(problem)

    def tilings(self, problem: Problem) -> list[FragmentTiling]:
        """See `ScheduleRule`."""
        config, found = problem.config, []
        wanted_k = FRAGMENT_K * max(1, _AT_ONCE_BYTES // (4 * config.format.bits))
        for n_tiles, warps in itertools.product((1, 2), _WARPS_K):
            if n_tiles > 1 and warps == max(_WARPS_K):
                continue  # twice the registers, of half as many for each thread
            most = min(wanted_k, _MOST_K)
            for step in (divisor_steps(config, most), divisor_steps(config, max(FRAGMENT_K, most // 2))):
                if warps * step <= config.K or warps == min(_WARPS_K):
                    found.append(FragmentTiling(FRAGMENT_M, FRAGMENT_N * n_tiles, step, warps_k=warps))
        return _with_parts(problem, found)


def _staged(problem: Problem, size: int) -> list[FragmentTiling]:
    """Tilings for about so many rows, those that N is wide enough for and that fit the shared memory of a block."""
    config, card, found = problem.config, card_of(problem), []
    for rows, warps, n_tiles in _SHAPES[size] + (_QUANTIZED_SHAPES[size] if config.dynamic_quantization else ()):
        for wanted_k in (128, 64) if rows * n_tiles <= _MANY_SUMS else (64,):
            tiling = FragmentTiling(
                rows, FRAGMENT_N * n_tiles * warps, divisor_steps(config, wanted_k), warps, stages=_STAGES
            )
            tiling = _fitted(tiling, config, card)
            if tiling.block_n < 2 * config.N and tiling.shared_bytes(config) <= card.shared_bytes:
                found.append(tiling)
    return found


def _least_stages(config: MatmulConfig) -> int:
    """Stages without which nothing would be on its way."""
    return 3 if config.dynamic_quantization else 2


def _fitted(tiling: FragmentTiling, config: MatmulConfig, card: Card) -> FragmentTiling:
    """With as many stages as the shared memory of a block holds."""
    while tiling.stages > _least_stages(config) and tiling.shared_bytes(config) > card.shared_bytes:
        tiling = replace(tiling, stages=tiling.stages - 1)
    return tiling


def _with_parts(problem: Problem, tilings: list[FragmentTiling]) -> list[FragmentTiling]:
    """Each with K in parts as well; those first that are expected to take least time."""
    config, found = problem.config, []
    for tiling, parts in itertools.product(tilings, _PARTS):
        workers = parts * tiling.warps_k
        # a staged kernel takes as many steps to begin as it has stages
        if parts > 1 and config.K // tiling.block_k < workers * max(1, tiling.stages - 1):
            continue
        found.append(replace(tiling, split_k=parts, slab_m=max(_SPLIT_SLAB, problem.m) if parts > 1 else 0))
    found.sort(key=lambda tiling: estimate(problem, tiling))
    return list(dict.fromkeys(found))[:_MOST_TILINGS]
