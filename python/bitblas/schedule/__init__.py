"""The ordered registry of schedule rules; TVM is imported only when a rule is applied."""

from __future__ import annotations

from .dots import DOT_UNITS, DotRule, takes_dots
from .floats import FLOAT_UNITS, FloatRule
from .rule import LINE_BYTES, Problem, ScheduleRule, Tiling, select_rule

#: The order is the policy: the first rule that does not decline is taken.
RULES: tuple[ScheduleRule, ...] = (
    *(DotRule(unit, few_rows) for unit in DOT_UNITS for few_rows in (True, False)),
    *(FloatRule(unit, few_rows) for unit in FLOAT_UNITS for few_rows in (True, False)),
)

__all__ = ["LINE_BYTES", "RULES", "Problem", "ScheduleRule", "Tiling", "select_rule", "takes_dots"]
