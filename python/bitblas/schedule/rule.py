"""What a schedule rule is: it declines with a reason, or lists its tilings, the default first, and applies one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..config import MatmulConfig
from ..errors import UnsupportedError
from ..layout import LANES, PackedLayout
from ..target import Target

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir import Schedule


@dataclass(frozen=True)
class Tiling:
    """How a kernel walks its loops.

    Attributes
    ----------
    block_m, block_n : int
        Rows and columns whose sums stay in registers; block_n is a multiple of 16.
    block_k : int
        Consecutive k that are unrolled.
    panel_m : int
        Rows that a thread finishes for all its columns before it goes on to the next rows; 0 means all.
    parallel : bool
        Whether the kernel uses torch's threads.
    """

    block_m: int
    block_n: int
    block_k: int
    panel_m: int = 0
    parallel: bool = True

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


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


class ScheduleRule(ABC):
    """One way to schedule a matmul. `name` is unique and stands in artifacts."""

    name: str

    @abstractmethod
    def decline(self, problem: Problem) -> str | None:
        """Say why the rule does not serve `problem`; None where it does."""

    @abstractmethod
    def tilings(self, problem: Problem) -> list[Tiling]:
        """The legal tilings, the default first."""

    @abstractmethod
    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: Tiling) -> Schedule:
        """Schedule `func`, which was built for `tiling`'s block sizes. Imports TVM."""


def select_rule(rules: tuple[ScheduleRule, ...], problem: Problem) -> ScheduleRule:
    """Return the first rule that does not decline.

    Raises
    ------
    UnsupportedError
        All declined; the message lists each rule with its reason.
    """
    reasons = []
    for rule in rules:
        reason = rule.decline(problem)
        if reason is None:
            return rule
        reasons.append(f"  {rule.name}: {reason}")
    raise UnsupportedError("\n".join([f"no schedule rule for {problem.config} on {problem.target}:", *reasons]))
