"""What a schedule rule is: it declines with a reason, or lists its tilings, the default first, and applies one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..config import MatmulConfig
from ..errors import UnsupportedError
from ..formats import DataFormat
from ..layout import LANES, UNIT, PackedLayout
from ..target import Target

if TYPE_CHECKING:
    from tvm import tirx
    from tvm.s_tir import Schedule


#: Sums of int8 products stay exact in float32 up to this many terms: 512 · 128 · 255 < 2^24.
EXACT_INT8_TERMS = 512

#: … and those of dot products in int32: 65536 · 128 · 255 < 2^31.
EXACT_DOT_TERMS = 1 << 16

#: Bytes of a cache line.
LINE_BYTES = 64

#: A divisor of a group that is smaller than this makes no good chunk: then the whole group is one.
_SHORTEST_CHUNK = 32


@dataclass(frozen=True)
class Tiling:
    """How a kernel walks its loops.

    Attributes
    ----------
    block_m, block_n : int
        Rows and columns whose sums stay in registers; block_n is a multiple of 16.
    block_k : int
        Consecutive k that are unrolled.
    chunk_k : int
        Most k that are summed before a group's scale, or the sum of all chunks, takes over; 0 means a whole group.
    panel : bool
        Whether weights are decoded once for all rows, a chunk at a time into a panel, instead of in registers for each tile
        of rows.
    slab_m : int
        Rows that one launch computes at most, so that their activations stay in a cache; 0 means all.
    prefetch : int
        How many bytes ahead of their use weights are asked for; 0 leaves it to the hardware.
    parallel : bool
        Whether the kernel uses torch's threads.
    dot : str
        How products are summed: ``""`` in float32, one at a time; ``"u8s8"`` in
        int32, four at a time, codes unsigned and activations signed; ``"s8s8"`` likewise, both signed; ``"bf16"`` in float32,
        two at a time, both bfloat16. All but the first read the layout "dots".
    slices : int
        Into how many int8 an activation of more bits is cut for a `dot`; 0 for int8 activations.
    split_k : int
        Parts of K that are summed by themselves, by different threads: a divisor of the number of chunks.
    """

    block_m: int
    block_n: int
    block_k: int
    chunk_k: int = 0
    panel: bool = False
    slab_m: int = 0
    prefetch: int = 0
    parallel: bool = True
    dot: str = ""
    slices: int = 0
    split_k: int = 1

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)

    def chunk(self, config: MatmulConfig, layout: PackedLayout) -> int:
        """How many consecutive k are summed at once: a divisor of the group, or of a multiple of K where there is one group."""
        group = config.group if config.is_grouped else config.K
        unit = layout.unit if self.dot else 1
        terms = EXACT_DOT_TERMS if self.dot else EXACT_INT8_TERMS if config.integer_products else group
        limit = min(self.chunk_k or group, terms)
        found = unit * largest_divisor(group // unit, max(1, limit // unit))
        if found >= min(_SHORTEST_CHUNK, group):
            return found
        if config.integer_products and group == config.K:  # a single group may end with a part of a chunk
            step = max(UNIT, unit)
            return -(-group // -(-group // limit) // step) * step
        return found if terms < group else group  # exactness comes before speed


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


class ScheduleRule(ABC):
    """One way to schedule a matmul. `name` is unique and stands in artifacts; `layouts` are those that the rule reads."""

    name: str
    layouts: tuple[str, ...] = ("lanes", "packed")

    def decline(self, problem: Problem) -> str | None:
        """Say why the rule does not serve `problem`; None where it does."""
        if problem.target.kind != "llvm":
            return f"is for llvm targets, not {problem.target}"
        if problem.layout.name not in self.layouts:
            return f"reads weights in the layout {' or '.join(self.layouts)}, not {problem.layout.name}"
        return None

    @abstractmethod
    def tilings(self, problem: Problem) -> list[Tiling]:
        """The legal tilings, the default first."""

    @abstractmethod
    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: Tiling) -> Schedule:
        """Schedule `func`, which was built for `tiling`'s block sizes. Imports TVM."""


@dataclass(frozen=True)
class Unit:
    """What computes in a machine.

    Attributes
    ----------
    name : str
        What rules are called after.
    feature : str
        The instruction set that it needs; empty for any.
    vector_lanes : int
        Lanes of 32 bits in its registers; 0 means those of the target.
    """

    name: str
    feature: str
    vector_lanes: int

    def decline(self, fmt: DataFormat, target: Target) -> str | None:
        """Say why it does not serve weights of a format on a target; None where it does."""
        if self.feature and self.feature not in target.features:
            return f"needs {self.feature}, which {target} lacks"
        return None

    def num_sums(self, target: Target) -> int:
        """Blocks of sixteen sums that three quarters of the registers hold."""
        lanes = self.vector_lanes or target.vector_bits // 32
        return target.num_vector_registers * lanes * 3 // (4 * LANES)


class UnitRule(ScheduleRule):
    """The rule for a unit of a machine, whose name it has."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.name = unit.name

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        return super().decline(problem) or self.unit.decline(problem.config.format, problem.target)


def select_rule(rules: tuple[ScheduleRule, ...], problem: Problem) -> ScheduleRule:
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
