"""What a schedule rule is: it declines with a reason, or lists its tilings, the default first, and applies one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..config import MatmulConfig
from ..errors import UnsupportedError
from ..layout import LANES, PackedLayout
from ..target import Target

if TYPE_CHECKING:
    from tvm import tirx

#: Bytes of a cache line.
LINE_BYTES = 64


@dataclass(frozen=True)
class Tiling:
    """How a kernel walks its loops: what all kinds of kernels have.

    A kind is a subclass, frozen like this one; `kind` stands in its fields, so that `bitblas.schedule.read_tiling` finds it.

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

    kind: ClassVar[str] = ""

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        kind = {"kind": self.kind} if self.kind else {}
        return {**kind, **asdict(self)}

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


def largest_divisor(value: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`."""
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return max(d for d in (*small, *(value // d for d in small)) if d <= limit)


@dataclass(frozen=True)
class Problem:
    """What a rule decides upon: one bucket of one operator on one target.

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

    @property
    def lane_blocks(self) -> int:
        """Blocks of 16 columns."""
        return -(-self.config.N // LANES)

    @property
    def work(self) -> int:
        """Multiply-accumulates."""
        return self.m * self.config.N * self.config.K


AnyTiling = TypeVar("AnyTiling", bound=Tiling)


class ScheduleRule(ABC, Generic[AnyTiling]):
    """One way to schedule a matmul. `name` is unique and stands in artifacts; `layouts` are those that the rule reads."""

    name: str
    target_kind: ClassVar[str] = "llvm"
    layouts: tuple[str, ...] = ("lanes", "packed")

    def decline(self, problem: Problem) -> str | None:
        """Say why the rule does not serve `problem`; None where it does."""
        if problem.target.kind != self.target_kind:
            return f"is for {self.target_kind} targets, not {problem.target}"
        if problem.layout.name not in self.layouts:
            return f"reads weights in the layout {' or '.join(self.layouts)}, not {problem.layout.name}"
        return None

    @abstractmethod
    def tilings(self, problem: Problem) -> Sequence[AnyTiling]:
        """The legal tilings, the default first."""

    @abstractmethod
    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: AnyTiling) -> tirx.PrimFunc:
        """The scheduled `func`, which was built for `tiling`'s block sizes. Imports TVM."""


def select_rule(rules: tuple[ScheduleRule[Any], ...], problem: Problem) -> ScheduleRule[Any]:
    """Return the first rule that does not decline.

    Raises
    ------
    UnsupportedError
        All declined; the message lists each rule with its reason.
    """
    names: dict[str, list[str]] = {}  # of the rules that give a reason
    for rule in rules:
        reason = rule.decline(problem)
        if reason is None:
            return rule
        names.setdefault(reason, []).append(rule.name)
    reasons = [f"  {', '.join(found)}: {reason}" for reason, found in names.items()]
    raise UnsupportedError("\n".join([f"no schedule rule for {problem.config} on {problem.target}:", *reasons]))
