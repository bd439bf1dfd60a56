"""Rules for tensor cores: which operators they take, and their tilings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ...config import MatmulConfig
from ...layout import FRAGMENT_K, FRAGMENT_N, PackedLayout
from ...machines import Card
from ...target import Target
from ..rule import Problem, ScheduleRule
from .tiles import FRAGMENT_M, FragmentTiling, divisor_steps

if TYPE_CHECKING:
    from tvm import tirx

#: Rows that one product takes: up to so many a weight is multiplied once, where it was loaded.
FEW_ROWS = FRAGMENT_M
#: Bytes of weights that a thread asks for ahead: 64 in each of 16 warps are 32 KB on their way for each multiprocessor, what a
#: bandwidth of 35 bytes a nanosecond and a latency of 800 ns ask for.
_AHEAD_BYTES = 64
#: Rows up to which a block is as narrow as it may be. Each block reads all activations: eight rows of them are as many bytes as
#: 32 columns of 4-bit weights.
_NARROW_ROWS = 4
#: k of a step at most, which bounds the registers of activations.
_MOST_K = 256
#: Warps of a block that share out K.
_WARPS_K = (8, 4, 16)
#: … and where there are fewer tiles than multiprocessors.
_WARPS_K_FEW = (16, 8, 4)
#: Sums of a thread that fit into its registers, beside those that wait for their group's end.
_MOST_TILES = 16
#: Steps over k that a warp of a split takes at least: more where activations are staged, which takes a while to begin.
_LEAST_STEPS, _LEAST_STAGED_STEPS = 2, 4
_MOST_PARTS = 8
#: Rows up to which multiprocessors wait for weights, so that two blocks at once keep more of them on their way.
_WAITS_ROWS = 64
#: Rows of a launch of a kernel whose sums meet in memory.
_SPLIT_SLAB = 256
_STAGES = 4

#: Shapes of tiles of many rows: (rows, warps, tiles of 16 columns of a warp).
_SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    16: ((16, 4, 2), (16, 8, 1), (16, 4, 1)),
    32: ((32, 4, 2), (32, 8, 2), (32, 4, 1)),
    64: ((64, 4, 2), (32, 4, 4), (64, 8, 2)),
    128: ((64, 8, 2), (64, 4, 2), (32, 8, 4)),
}


def declines_fragments(config: MatmulConfig, target: Target) -> str | None:
    """Say why tensor cores of a card do not take a config; None where they do."""
    fmt, group = config.format, config.group
    if fmt.is_native:
        return f"takes weights of at most 8 bits, not {fmt.name}"
    if config.A_dtype == "float32":
        return "takes activations of at most 16 bits, not float32"
    if config.A_dtype == "bfloat16" and target.capability < 80:
        return f"multiplies bfloat16 from capability 8.0 on, not on {target}"
    if config.dynamic_quantization is not None:
        return "takes activations as they come, and does not quantize them"
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
        config, card = problem.config, _card(problem)
        size = min(max(16, 1 << (problem.m - 1).bit_length()), max(_SHAPES))
        found = []
        for rows, warps, n_tiles in _SHAPES[size]:
            for wanted_k in (128, 64) if rows <= 32 else (64, 128):
                tiling = FragmentTiling(
                    rows, FRAGMENT_N * n_tiles * warps, divisor_steps(config, wanted_k), warps, stages=_STAGES
                )
                tiling = _fitted(tiling, config, card)
                fits = tiling.block_n < 2 * config.N and tiling.shared_bytes(config) <= card.shared_bytes
                if fits and tiling not in found:
                    found.append(tiling)
        found = found or [FragmentTiling(size if size < 64 else 64, FRAGMENT_N, FRAGMENT_K, stages=2)]
        return _with_parts(problem, found)

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
        config = problem.config
        wanted_k = min(_MOST_K, FRAGMENT_K * max(1, _AHEAD_BYTES // (4 * config.format.bits)))
        found = []
        for n_tiles in (1, 2) if problem.m <= _NARROW_ROWS else (2, 1):
            for step in dict.fromkeys((divisor_steps(config, wanted_k), divisor_steps(config, max(64, wanted_k // 2)))):
                few = config.N // (FRAGMENT_N * n_tiles) <= _card(problem).num_sms
                for warps in _WARPS_K_FEW if few else _WARPS_K:
                    tiling = FragmentTiling(FRAGMENT_M, FRAGMENT_N * n_tiles, step, warps_k=warps)
                    if warps * step <= config.K or warps == min(_WARPS_K):
                        found.append(tiling)
        return _with_parts(problem, found)


def _card(problem: Problem) -> Card:
    card = problem.target.card
    assert card is not None
    return card


def _fitted(tiling: FragmentTiling, config: MatmulConfig, card: Card) -> FragmentTiling:
    """With as many stages as the shared memory of a block holds."""
    while tiling.stages > 2 and tiling.shared_bytes(config) > card.shared_bytes:
        tiling = replace(tiling, stages=tiling.stages - 1)
    return tiling


def _with_parts(problem: Problem, tilings: list[FragmentTiling]) -> list[FragmentTiling]:
    """Where tiles are too few for the card, with K in parts; and then, as another choice, without."""
    config, card = problem.config, _card(problem)
    found = []
    for tiling in tilings:
        tiles = -(-problem.m // tiling.block_m) * -(-config.N // tiling.block_n)
        steps = config.K // tiling.block_k
        least = (_LEAST_STAGED_STEPS if tiling.stages else _LEAST_STEPS) * tiling.warps_k
        wanted = card.num_sms * (2 if problem.m <= _WAITS_ROWS else 1) // tiles
        parts = min(wanted, steps // least, _MOST_PARTS)
        if parts > 1:
            found.append(replace(tiling, split_k=parts, slab_m=max(_SPLIT_SLAB, problem.m)))
        found.append(tiling)
    return found
