"""Schedule rules as TVM module passes over an IRModule. Importing this imports TVM."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx

from .errors import BitBLASError, BuildError
from .expr import MatmulExpr, attention_func, matmul_func
from .logs import get_logger
from .schedule import AttentionProblem, MatmulTiling, Problem, Rule, Tiling, rank, read_tiling, select_rule
from .schedule.rule import read_problem
from .target import Target, resolve_target

AnyProblem = Problem | AttentionProblem

#: The function attribute that says what a function computes.
PROBLEM_ATTR = "bitblas.problem"


def describe(func: tirx.PrimFunc, problem: AnyProblem, rule: str, tiling: Tiling) -> tirx.PrimFunc:
    """Attach to `func` what it computes, and the rule and tiling that its block sizes were chosen for."""
    text = json.dumps({**problem.fields(), "rule": rule, "tiling": tiling.fields()})
    return func.with_attr({PROBLEM_ATTR: text})


def described_func(problem: AnyProblem, rule: str, tiling: Tiling, name: str) -> tirx.PrimFunc:
    """The unscheduled function of a problem, with the block sizes of a tiling, described."""
    return describe(_expression(problem, tiling, name), problem, rule, tiling)


def _expression(problem: AnyProblem, tiling: Tiling, name: str) -> tirx.PrimFunc:
    if isinstance(problem, AttentionProblem):
        return attention_func(problem.config, name)
    assert isinstance(tiling, MatmulTiling)
    config, layout = problem.config, problem.layout
    return matmul_func(MatmulExpr(config, layout, **tiling.blocks(config, layout)), name)


def read_description(func: object, target: Target) -> tuple[AnyProblem, str, Tiling] | None:
    """What `describe` attached: the problem, a rule's name and a tiling; None for other functions."""
    if not isinstance(func, tirx.PrimFunc) or PROBLEM_ATTR not in func.attrs:
        return None
    facts = json.loads(str(func.attrs[PROBLEM_ATTR]))
    return read_problem(facts, target), facts["rule"], read_tiling(facts["tiling"])


def _rule_for(rules: tuple[Rule[Any, Any], ...], name: str, problem: AnyProblem) -> Rule[Any, Any]:
    """The named rule, where it does not decline, else the first that does not."""
    named = [rule for rule in rules if rule.name == name and rule.decline(problem) is None]
    return named[0] if named else select_rule(rules, problem)


@tvm.transform.module_pass(opt_level=0, name="ApplyDefaultSchedule")
class ApplyDefaultSchedule:
    """Schedule each described function of a module by the first rule that takes it.

    A function whose description names a rule among `rules` gets that rule, others the first rule that does not decline; the
    tiling is the described one, which the function was built for. Functions without a description pass through.

    Parameters
    ----------
    rules : tuple of Rule
        In order of preference.
    target : Target, optional
        What to schedule for; None resolves as operators do.

    Raises
    ------
    RuntimeError
        Every rule declined a function; the text is that of the `UnsupportedError`, which TVM does not carry through a pass.
    """

    def __init__(self, rules: tuple[Rule[Any, Any], ...], target: Target | None = None) -> None:
        self.rules = tuple(rules)
        self.target = resolve_target(target)

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with its functions scheduled."""
        scheduled = {}
        for name, func in mod.functions_items():
            described = read_description(func, self.target)
            if described is None:
                scheduled[name] = func
                continue
            problem, rule, tiling = described
            scheduled[name] = _rule_for(self.rules, rule, problem).apply(func, problem, tiling)
        return tvm.IRModule(scheduled, attrs=mod.attrs)


@tvm.transform.module_pass(opt_level=0, name="ApplyFastTuning")
class ApplyFastTuning:
    """Schedule each described function of a module by the fastest of the likely tilings of its rule.

    A function is written anew for each tiling, since its block sizes are those of a tiling. Its own tiling comes first, and
    is replaced by one that took less time. Functions without a description pass through.

    Parameters
    ----------
    rules : tuple of Rule
        In order of preference.
    measure : callable
        Takes a module with one scheduled function, and the problem that it solves; returns seconds, or raises a
        `BitBLASError`, which loses the tiling and not the pass. `bitblas.tuner.measure_module` is one.
    topk : int
        Tilings of a function to try at most.
    target : Target, optional
        What to schedule for; None resolves as operators do.

    Raises
    ------
    RuntimeError
        Every rule declined a function, or every tiling of one was lost; the text says why.
    """

    def __init__(
        self,
        rules: tuple[Rule[Any, Any], ...],
        measure: Callable[[tvm.IRModule, Any], float],
        topk: int = 20,
        target: Target | None = None,
    ) -> None:
        self.rules, self.measure, self.topk = tuple(rules), measure, max(1, topk)
        self.target = resolve_target(target)

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with its functions scheduled."""
        scheduled = {}
        for name, func in mod.functions_items():
            described = read_description(func, self.target)
            scheduled[name] = func if described is None else self._fastest(name.name_hint, *described)
        return tvm.IRModule(scheduled, attrs=mod.attrs)

    def _fastest(self, name: str, problem: AnyProblem, rule_name: str, own: Tiling) -> tirx.PrimFunc:
        rule = _rule_for(self.rules, rule_name, problem)
        offered = rank(problem, rule.tilings(problem))
        if own in offered:
            offered = list(dict.fromkeys([own, *offered]))
        times: list[tuple[float, tirx.PrimFunc]] = []
        lost: list[str] = []
        for tiling in offered[: self.topk]:
            func = rule.apply(described_func(problem, rule.name, tiling, name), problem, tiling)
            func = describe(func, problem, rule.name, tiling)  # where a rule writes it anew
            try:
                times.append((self.measure(tvm.IRModule({name: func}), problem), func))
            except BitBLASError as error:
                get_logger().warning("tuning lost %s for m=%d: %s", tiling, problem.m, error)
                lost.append(str(error))
        if not times:
            raise BuildError(
                f"none of {len(lost)} tilings of {name} could be measured", output="\n".join(dict.fromkeys(lost))
            )
        return min(times, key=lambda row: row[0])[1]


__all__ = ["PROBLEM_ATTR", "ApplyDefaultSchedule", "ApplyFastTuning", "describe", "described_func", "read_description"]
