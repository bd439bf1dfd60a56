"""The ordered registry of schedule rules; TVM is imported only when a rule is applied."""

from __future__ import annotations

from .avx512 import Avx512Gemm, Avx512SmallM
from .generic import GenericLlvm
from .rule import Problem, ScheduleRule, Tiling, select_rule

#: The order is the policy: the first rule that does not decline is taken.
RULES: tuple[ScheduleRule, ...] = (Avx512SmallM(), Avx512Gemm(), GenericLlvm())

__all__ = ["RULES", "Problem", "ScheduleRule", "Tiling", "select_rule"]
