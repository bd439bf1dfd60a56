"""The ordered registry of schedule rules; TVM is imported only when a rule is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import MatmulConfig
from ..layout import PackedLayout
from ..target import Target
from .cpu import CPU_RULES, LaneTiling, cpu_layout, rank_on_cpu
from .cpu.attention import CPU_ATTENTION_RULES
from .cpu.attention_tiling import LaneAttentionTiling, RowAttentionTiling
from .cuda import CUDA_RULES, CUDA_TILINGS, cuda_layout, rank_on_cuda
from .cuda.attention import CUDA_ATTENTION_RULES, CUDA_ATTENTION_TILINGS
from .rule import AttentionProblem, AttentionTiling, MatmulTiling, Problem, Rule, ScheduleRule, Tiling, select_rule

#: The order is the policy: the first rule for a kind of problem that does not decline is taken.
RULES: tuple[Rule[Any, Any], ...] = (*CPU_RULES, *CUDA_RULES, *CPU_ATTENTION_RULES, *CUDA_ATTENTION_RULES)

_CPU_TILINGS = (LaneTiling, LaneAttentionTiling, RowAttentionTiling)
_ALL_TILINGS: tuple[type[Tiling], ...] = (*_CPU_TILINGS, *CUDA_TILINGS, *CUDA_ATTENTION_TILINGS)
_TILINGS: dict[str, type[Tiling]] = {tiling.kind: tiling for tiling in _ALL_TILINGS}


def read_tiling(fields: Mapping[str, object]) -> Tiling:
    """The tiling with these `Tiling.fields`.

    Raises
    ------
    KeyError, TypeError
        No tiling has such fields.
    """
    values = dict(fields)
    return _TILINGS[str(values.pop("kind", ""))](**values)


def native_layout(config: MatmulConfig, target: Target) -> PackedLayout:
    """The layout of the weights that the kernels of `config` on `target` read, all buckets alike."""
    return cuda_layout(config, target) if target.kind == "cuda" else cpu_layout(config, target)


def rank(problem: Problem | AttentionProblem, tilings: Sequence[Any]) -> list[Any]:
    """The default, which is the first, and then the others, those first that are expected to cost least."""
    if isinstance(problem, AttentionProblem):
        return list(tilings)
    return rank_on_cuda(problem, tilings) if problem.target.kind == "cuda" else rank_on_cpu(problem, tilings)


__all__ = [
    "RULES",
    "AttentionProblem",
    "AttentionTiling",
    "LaneTiling",
    "MatmulTiling",
    "Problem",
    "Rule",
    "ScheduleRule",
    "Tiling",
    "native_layout",
    "rank",
    "read_tiling",
    "select_rule",
]
