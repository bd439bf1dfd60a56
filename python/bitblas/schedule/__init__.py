"""The ordered registry of schedule rules; TVM is imported only when a rule is applied."""

from __future__ import annotations

from .dots import DOT_UNITS, DotGemm, DotSmallM, takes_dots
from .floats import FLOAT_UNITS, FloatGemm, FloatSmallM
from .rule import Problem, ScheduleRule, Tiling, select_rule

#: The order is the policy: the first rule that does not decline is taken.
RULES: tuple[ScheduleRule, ...] = (
    *(rule(unit) for unit in DOT_UNITS for rule in (DotSmallM, DotGemm)),
    *(rule(unit) for unit in FLOAT_UNITS for rule in (FloatSmallM, FloatGemm)),
)

__all__ = ["RULES", "Problem", "ScheduleRule", "Tiling", "select_rule", "takes_dots"]
