"""Rules for CPUs, in order: the first that does not decline is taken."""

from __future__ import annotations

from typing import Any

from ...config import MatmulConfig
from ...layout import PackedLayout
from ...target import Target
from ..rule import ScheduleRule
from .cost import rank as rank_on_cpu
from .dots import DOT_UNITS, DotRule, takes_dots
from .floats import FLOAT_UNITS, FloatRule
from .pairs import PAIR_UNITS, PairRule
from .units import LaneTiling

CPU_RULES: tuple[ScheduleRule[Any], ...] = (
    *(PairRule(unit) for unit in PAIR_UNITS),
    *(DotRule(unit) for unit in DOT_UNITS),
    *(FloatRule(unit) for unit in FLOAT_UNITS),
)


def cpu_layout(config: MatmulConfig, target: Target) -> PackedLayout:
    """The layout of the weights that the kernels of `config` on a CPU read, all buckets alike."""
    if takes_dots(config, target):
        return PackedLayout(config.N, config.K, config.format.bits, "dots")
    return PackedLayout.native(config.N, config.K, config.format)


__all__ = ["CPU_RULES", "LaneTiling", "cpu_layout", "rank_on_cpu"]
