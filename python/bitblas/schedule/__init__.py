"""The ordered registry of schedule rules; TVM is imported only when a rule is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import MatmulConfig
from ..layout import PackedLayout
from ..target import Target
from .cpu import CPU_RULES, LaneTiling, cpu_layout, rank_on_cpu
from .cuda import CUDA_RULES, CUDA_TILINGS, cuda_layout, rank_on_cuda
from .rule import Problem, ScheduleRule, Tiling, select_rule

#: The order is the policy: the first rule that does not decline is taken.
RULES: tuple[ScheduleRule[Any], ...] = (*CPU_RULES, *CUDA_RULES)

_TILINGS: dict[str, type[Tiling]] = {LaneTiling.kind: LaneTiling, **{tiling.kind: tiling for tiling in CUDA_TILINGS}}


def read_tiling(fields: Mapping[str, object]) -> Tiling:
    """The tiling with these `Tiling.fields`.

    Raises
    ------
    KeyError, TypeError
        No tiling has such fields.
    """
    values = dict(fields)
    return _TILINGS[str(values.pop("kind", ""))](**values)  # type: ignore[arg-type]


def native_layout(config: MatmulConfig, target: Target) -> PackedLayout:
    """The layout of the weights that the kernels of `config` on `target` read, all buckets alike."""
    return cuda_layout(config, target) if target.kind == "cuda" else cpu_layout(config, target)


def rank(problem: Problem, tilings: Sequence[Any]) -> list[Any]:
    """The default, which is the first, and then the others, those first that are expected to cost least."""
    return rank_on_cuda(problem, tilings) if problem.target.kind == "cuda" else rank_on_cpu(problem, tilings)


__all__ = [
    "RULES",
    "LaneTiling",
    "Problem",
    "ScheduleRule",
    "Tiling",
    "native_layout",
    "rank",
    "read_tiling",
    "select_rule",
]
