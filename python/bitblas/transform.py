"""Schedule rules as TVM module passes over an IRModule. Importing this imports TVM."""

from __future__ import annotations

import json

import tvm
from tvm import tirx

from .config import MatmulConfig
from .layout import PackedLayout
from .schedule import Problem, ScheduleRule, Tiling, select_rule
from .target import Target, resolve_target

#: The function attribute that says what a function computes.
PROBLEM_ATTR = "bitblas.problem"


def describe(func: tirx.PrimFunc, problem: Problem, rule: str, tiling: Tiling) -> tirx.PrimFunc:
    """Attach to `func` what it computes, and the rule and tiling that its block sizes were chosen for."""
    text = json.dumps(
        {
            "config": problem.config.fields(),
            "layout": problem.layout.name,
            "m": problem.m,
            "rule": rule,
            "tiling": tiling.fields(),
        }
    )
    return func.with_attr({PROBLEM_ATTR: text})


@tvm.transform.module_pass(opt_level=0, name="ApplyDefaultSchedule")
class ApplyDefaultSchedule:
    """Schedule each described function of a module by the first rule that takes it.

    A function whose description names a rule among `rules` gets that rule, others the first rule that does not decline; the
    tiling is the described one, which the function was built for. Functions without a description pass through.

    Parameters
    ----------
    rules : tuple of ScheduleRule
        In order of preference.
    target : Target, optional
        What to schedule for; None resolves as operators do.

    Raises
    ------
    RuntimeError
        Every rule declined a function; the text is that of the `UnsupportedError`, which TVM does not carry through a pass.
    """

    def __init__(self, rules: tuple[ScheduleRule, ...], target: Target | None = None) -> None:
        self.rules = tuple(rules)
        self.target = resolve_target(target)

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with its functions scheduled."""
        scheduled = {}
        for name, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc) or PROBLEM_ATTR not in func.attrs:
                scheduled[name] = func
                continue
            scheduled[name] = self._schedule(func)
        return tvm.IRModule(scheduled, attrs=mod.attrs)

    def _schedule(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        facts = json.loads(str(func.attrs[PROBLEM_ATTR]))
        config = MatmulConfig(**facts["config"])
        layout = PackedLayout(config.N, config.K, config.format.bits, facts["layout"])
        problem = Problem(config, layout, self.target, facts["m"])
        tiling = Tiling(**facts["tiling"])
        named = [rule for rule in self.rules if rule.name == facts["rule"] and rule.decline(problem) is None]
        rule = named[0] if named else select_rule(self.rules, problem)
        return rule.apply(func, problem, tiling).mod["main"]


__all__ = ["PROBLEM_ATTR", "ApplyDefaultSchedule", "describe"]
