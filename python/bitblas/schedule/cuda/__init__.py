"""Rules for CUDA, in order: the first that does not decline is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import MatmulConfig
from ...layout import PackedLayout
from ...target import Target
from ..rule import Problem, ScheduleRule, Tiling
from .dense import DenseRule, DenseTiling
from .fragments import FragmentGemvRule, FragmentRule, declines_fragments, fragment_layout
from .threads import ThreadGemvRule, ThreadRule
from .threads_tiling import ThreadTiling
from .tiles import FragmentTiling

CUDA_RULES: tuple[ScheduleRule[Any], ...] = (
    DenseRule(),
    FragmentGemvRule(),
    FragmentRule(),
    ThreadGemvRule(),
    ThreadRule(),
)
CUDA_TILINGS: tuple[type[Tiling], ...] = (DenseTiling, FragmentTiling, ThreadTiling)


def cuda_layout(config: MatmulConfig, target: Target) -> PackedLayout:
    """The layout of the weights that the kernels of `config` on a card read, all buckets alike."""
    if declines_fragments(config, target) is None:
        return fragment_layout(config, target)
    return PackedLayout(config.N, config.K, config.format.bits, "packed")


def rank_on_cuda(problem: Problem, tilings: Sequence[Tiling]) -> list[Tiling]:
    """The default, which is the first, and then the others as they come."""
    return list(tilings)


__all__ = ["CUDA_RULES", "CUDA_TILINGS", "ThreadTiling", "cuda_layout", "rank_on_cuda"]
