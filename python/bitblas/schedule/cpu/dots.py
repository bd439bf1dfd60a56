"""Rules for int8 activations times integers, by instructions that add four products of bytes at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...config import MatmulConfig
from ...formats import DataFormat
from ...layout import LANES, dots_unit
from ...target import Target
from ..rule import Problem
from .tilings import DECODE_AGAIN_ROWS, decode_in_registers, decode_to_panel, four_blocks_first, split_over_k
from .units import LaneTiling, Unit, UnitRule

if TYPE_CHECKING:
    from tvm import tirx

#: k that are decoded into a panel of bytes at a time: 512 · 64 columns are 32 KB.
_PANEL_K = 512

#: Rows of bytes of activations that a decoded code must meet in registers, lest a panel is better.
_ENOUGH_SUMS = 4

#: Most activations that share the step of their slices.
_SLICED_K = 512


@dataclass(frozen=True)
class DotUnit(Unit):
    """An instruction that adds products of bytes.

    Attributes
    ----------
    instruction : str
        Its row in `bitblas.schedule.products.DOT_INSTRUCTIONS`.
    dot : str
        What it multiplies: see `LaneTiling`.
    most_bits : int
        Widest codes that it multiplies exactly.
    slices: bool
        Whether float activations that are cut into bytes gain by it.
    """

    instruction: str
    dot: str
    most_bits: int = 8
    slices: bool = False

    def decline(self, fmt: DataFormat, target: Target) -> str | None:
        """See `Unit`."""
        reason = super().decline(fmt, target)
        if reason is None and fmt.bits > self.most_bits:
            reason = f"{self.instruction} saturates with codes of more than {self.most_bits} bits, as in {fmt.name}"
        return reason

    def depth(self, fmt: DataFormat) -> int:
        """Words that are added before they are widened to 32 bits: as many as 16 bits hold, a power of two."""
        if self.instruction != "vpmaddubsw":
            return 1
        largest = 2 if fmt.name == "int1" else (1 << fmt.bits) - 1
        most = (1 << 15) // (2 * 128 * largest)
        return 1 << min(most, 16).bit_length() - 1


#: The order is the policy: the first that a target has is taken.
DOT_UNITS: tuple[DotUnit, ...] = (
    DotUnit("avx512_vnni", "avx512vnni", 16, "vpdpbusd", "u8s8", slices=True),
    DotUnit("avx_vnni", "avxvnni", 8, "vpdpbusd", "u8s8", slices=True),
    DotUnit("avx512_maddubs", "avx512bw", 16, "vpmaddubsw", "u8s8", most_bits=7),
    DotUnit("avx2_maddubs", "avx2", 8, "vpmaddubsw", "u8s8", most_bits=7),
    DotUnit("neon_dot", "dotprod", 4, "sdot", "s8s8"),
)


#: Bytes into which an activation is cut, by its dtype: as many as keep what a float32 sum of products would.
SLICES = {"float16": 3, "float32": 3, "bfloat16": 3}


def num_slices(config: MatmulConfig) -> int:
    """Bytes into which activations are cut; 0 where they are integers, or the products would be none."""
    return SLICES.get(config.A_dtype, 0) if config.format.is_integer and not config.integer_products else 0


def takes_dots(config: MatmulConfig, target: Target) -> bool:
    """Whether the weights of `config` should lie as dot products on `target` read them."""
    sliced = num_slices(config) > 0
    if not (config.integer_products or sliced) or config.N % LANES:
        return False
    group = config.group if config.is_grouped else config.K
    return group % dots_unit(config.format.bits) == 0 and any(
        unit.decline(config.format, target) is None and (unit.slices or not sliced) for unit in DOT_UNITS
    )


class DotRule(UnitRule):
    """Codes are split into bytes, in registers or into a panel, and multiplied four at a time."""

    layouts = ("dots",)

    unit: DotUnit

    def tilings(self, problem: Problem) -> list[LaneTiling]:
        """See `ScheduleRule`."""
        num_sums, slices = self.unit.num_sums(problem.target), num_slices(problem.config)
        again = decode_in_registers(problem, num_sums, slices or 1)
        once = four_blocks_first(decode_to_panel(problem, num_sums, slices or 1, _PANEL_K))
        easy = problem.m <= DECODE_AGAIN_ROWS or again[0].block_m * (slices or 1) >= _ENOUGH_SUMS
        found = again + once if easy else once + again
        most = _SLICED_K if slices else 0
        found = [replace(t, dot=self.unit.dot, slices=slices, chunk_k=t.chunk_k or most) for t in found]
        return split_over_k(problem, found)

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: LaneTiling) -> tirx.PrimFunc:
        """See `ScheduleRule`."""
        from .lanes import Intrinsics, schedule_lanes
        from .products import dot_quads

        unit = self.unit

        def dot(depth: int) -> str:
            return dot_quads(unit.instruction, unit.vector_lanes, unit.dot, depth)

        return schedule_lanes(func, problem, tiling, Intrinsics(dot=dot, depth=unit.depth(problem.config.format))).mod[
            "main"
        ]
