"""The ordered registry of schedule rules; TVM is imported only when a rule is applied."""

from __future__ import annotations

from .dots import DOT_UNITS, DotRule, takes_dots
from .floats import FLOAT_UNITS, FloatRule
from .pairs import PAIR_UNITS, PairRule
from .rule import LINE_BYTES, Problem, ScheduleRule, Tiling, select_rule

#: The order is the policy: the first rule that does not decline is taken.
RULES: tuple[ScheduleRule, ...] = (
    *(PairRule(unit) for unit in PAIR_UNITS),
    *(DotRule(unit) for unit in DOT_UNITS),
    *(FloatRule(unit) for unit in FLOAT_UNITS),
)

__all__ = ["LINE_BYTES", "RULES", "Problem", "ScheduleRule", "Tiling", "select_rule", "takes_dots"]
