"""What a schedule rule is: it declines with a reason, or lists its tilings, the default first, and applies one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..config import FlashAttenConfig, MatmulConfig, config_fields, read_config
from ..errors import UnsupportedError
from ..layout import LANES, PackedLayout
from ..target import Target

if TYPE_CHECKING:
    from tvm import tirx

#: Bytes of a cache line.
LINE_BYTES = 64


@dataclass(frozen=True)
class Tiling:
    """How a kernel walks its loops.

    A kind is a subclass, frozen like this one; `kind` stands in its fields, so that `bitblas.schedule.read_tiling` finds it.
    """

    kind: ClassVar[str] = ""

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        kind = {"kind": self.kind} if self.kind else {}
        return {**kind, **asdict(self)}


@dataclass(frozen=True)
class MatmulTiling(Tiling):
    """What all tilings of matmuls have.

    Attributes
    ----------
    block_m, block_n : int
        Rows and columns that are computed together.
    block_k : int
        Consecutive k that are unrolled, or that a stage holds.
    """

    block_m: int
    block_n: int
    block_k: int

    def blocks(self, config: MatmulConfig, layout: PackedLayout) -> dict[str, Any]:
        """What the expression is cut into: arguments of `bitblas.expr.MatmulExpr` beyond config and layout."""
        raise NotImplementedError

    def row_elements(self, config: MatmulConfig, layout: PackedLayout) -> int:
        """Most elements that lie between two rows of a matrix that the kernel walks."""
        return max(config.N, config.K)

    @property
    def most_rows(self) -> int:
        """Rows that one launch computes at most; 0 means all that can be indexed."""
        return 0

    def workspace(self, config: MatmulConfig, m: int) -> tuple[int, int]:
        """Elements of two more arguments, after the output, that a launch of `m` rows takes: (0, 0) where it takes none.

        They are `partial`, 32 bits each of any content, and `counters`, int32 that are 0 before the launch and after it; flat,
        and at least so long.
        """
        return 0, 0


@dataclass(frozen=True)
class AttentionTiling(Tiling):
    """What all tilings of attentions have.

    Attributes
    ----------
    block_m : int
        Rows that one thread of a CPU, or a block of a card, computes; a row is a query of one of the heads that share keys.
    block_n : int
        Keys that are looked at together, of which K and V are held in a cache, or in shared memory.
    """

    block_m: int
    block_n: int


def largest_divisor(value: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`."""
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return max(d for d in (*small, *(value // d for d in small)) if d <= limit)


@dataclass(frozen=True)
class Problem:
    """What a rule of matmuls decides upon: one bucket of one operator on one target.

    Attributes
    ----------
    config : MatmulConfig
        The question.
    layout : PackedLayout
        The operator's weight layout.
    target : Target
        The machine.
    m : int
        Rows that the kernel is specialised for.
    """

    config: MatmulConfig
    layout: PackedLayout
    target: Target
    m: int

    def fields(self) -> dict[str, object]:
        """As JSON values, without the target."""
        return {**config_fields(self.config), "layout": self.layout.name, "m": self.m}

    @property
    def lane_blocks(self) -> int:
        """Blocks of 16 columns."""
        return -(-self.config.N // LANES)

    @property
    def work(self) -> int:
        """Multiply-accumulates."""
        return self.m * self.config.N * self.config.K


@dataclass(frozen=True)
class AttentionProblem:
    """What a rule of attentions decides upon: one bucket of one operator on one target.

    Attributes
    ----------
    config : FlashAttenConfig
        The question.
    target : Target
        The machine.
    m : int
        Rows that the kernel is specialised for.
    """

    config: FlashAttenConfig
    target: Target
    m: int

    def fields(self) -> dict[str, object]:
        """As JSON values, without the target."""
        return {**config_fields(self.config), "m": self.m}


def read_problem(fields: Mapping[str, Any], target: Target) -> Problem | AttentionProblem:
    """The problem with these fields."""
    config = read_config(fields)
    if isinstance(config, FlashAttenConfig):
        return AttentionProblem(config, target, fields["m"])
    layout = PackedLayout(config.N, config.K, config.format.bits, fields["layout"])
    return Problem(config, layout, target, fields["m"])


AnyProblem = TypeVar("AnyProblem", bound="Problem | AttentionProblem")
AnyTiling = TypeVar("AnyTiling", bound=Tiling)


class Rule(ABC, Generic[AnyProblem, AnyTiling]):
    """One way to schedule a kind of problem. `name` is unique and stands in artifacts."""

    name: str
    target_kind: ClassVar[str] = "llvm"
    #: The class of the problems that it is for.
    solves: ClassVar[type]

    def decline(self, problem: AnyProblem) -> str | None:
        """Say why the rule does not serve `problem`; None where it does."""
        if problem.target.kind != self.target_kind:
            return f"is for {self.target_kind} targets, not {problem.target}"
        return None

    @abstractmethod
    def tilings(self, problem: AnyProblem) -> Sequence[AnyTiling]:
        """The legal tilings, the default first."""

    @abstractmethod
    def apply(self, func: tirx.PrimFunc, problem: AnyProblem, tiling: AnyTiling) -> tirx.PrimFunc:
        """The scheduled `func`, which was built for `tiling`'s block sizes. Imports TVM."""


class ScheduleRule(Rule[Problem, AnyTiling]):
    """One way to schedule a matmul; `layouts` are those of the weights that the rule reads."""

    solves = Problem
    layouts: tuple[str, ...] = ("lanes", "packed")

    def decline(self, problem: Problem) -> str | None:
        """See `Rule`."""
        if reason := super().decline(problem):
            return reason
        if problem.layout.name not in self.layouts:
            return f"reads weights in the layout {' or '.join(self.layouts)}, not {problem.layout.name}"
        return None


class AttentionRule(Rule[AttentionProblem, AnyTiling]):
    """One way to schedule an attention."""

    solves = AttentionProblem


def select_rule(rules: tuple[Rule[Any, Any], ...], problem: AnyProblem) -> Rule[AnyProblem, Any]:
    """Return the first rule for such problems that does not decline.

    Raises
    ------
    UnsupportedError
        All declined; the message lists each rule with its reason.
    """
    names: dict[str, list[str]] = {}  # of the rules that give a reason
    for rule in rules:
        if not isinstance(problem, rule.solves):
            continue
        reason = rule.decline(problem)
        if reason is None:
            return rule
        names.setdefault(reason, []).append(rule.name)
    reasons = [f"  {', '.join(found)}: {reason}" for reason, found in names.items()]
    raise UnsupportedError("\n".join([f"no schedule rule for {problem.config} on {problem.target}:", *reasons]))
