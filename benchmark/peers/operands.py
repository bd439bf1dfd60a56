"""A workload's weight as other libraries take it: unsigned codes, scales and zero points in groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from bitblas.bench import Workload, num_copies

T = TypeVar("T")

#: How far a peer's result may be from the reference, over the reference's root mean square, by what it computes in. Sums in
#: float32 come to 1e-5; bfloat16 activations and outputs to some 3e-2. Activations in int8, by groups of 32 to 256 and scaled
#: by the largest, are off by 0.4 to 1 % each, and the largest of some million sums by five times that.
LIMITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}
#: Rows up to which the graph of a library that runs graphs holds copies of the weight, and most copies in a graph.
FEW_ROWS, MAX_COPIES = 16, 64


@dataclass(frozen=True)
class Codes:
    """weight = (codes - points) · scale.

    Attributes
    ----------
    codes : torch.Tensor
        (N, K) uint8.
    bits : int
        Width of a code.
    scale, points : torch.Tensor
        (N, K / group) float32; ones and zeros where the workload has none.
    group : int
        k that share them.
    """

    codes: torch.Tensor
    bits: int
    scale: torch.Tensor
    points: torch.Tensor
    group: int

    @property
    def has_whole_points(self) -> bool:
        """Whether every zero point is a code."""
        whole = (self.points == self.points.round()).all()
        return bool(whole and (self.points >= 0).all() and (self.points < 1 << self.bits).all())

    def in_groups(self, group: int) -> Codes:
        """The same with smaller groups, which must divide these."""
        times = self.group // group
        return replace(
            self,
            scale=self.scale.repeat_interleave(times, 1),
            points=self.points.repeat_interleave(times, 1),
            group=group,
        )

    def widened(self, bits: int) -> Codes:
        """The same codes in more bits each."""
        return replace(self, bits=bits)

    def packed(self) -> torch.Tensor:
        """(N, K · bits / 8) uint8: a little-endian stream of the codes, for widths that divide 8."""
        per_byte = 8 // self.bits
        parts = self.codes.view(self.codes.shape[0], -1, per_byte)
        shifts = torch.arange(per_byte, dtype=torch.uint8) * self.bits
        return (parts << shifts).sum(-1, dtype=torch.uint8) if per_byte > 1 else self.codes


_kept: dict[str, tuple[torch.Tensor, tuple[object, ...], Any]] = {}


def keep(name: str, workload: Workload, key: tuple[object, ...], make: Callable[[], T]) -> T:
    """What was made last under a name, if it was of the same weight, which cells that differ in rows have, and key."""
    weight, old, made = _kept.get(name, (None, (), None))
    if weight is not workload.weight or old != key:
        _kept.pop(name, None)
        made = make()
        _kept[name] = (workload.weight, key, made)
    return made


def integer_codes(workload: Workload) -> Codes | None:
    """The codes of a weight of integers; None for other formats, and for -1 and +1, which are no consecutive integers."""
    return keep("codes", workload, (), lambda: _integer_codes(workload))


def _integer_codes(workload: Workload) -> Codes | None:
    config, fmt = workload.config, workload.config.format
    if not fmt.is_integer or (fmt.value_range == (-1, 1) and fmt.bits == 1):
        return None
    offset = -fmt.value_range[0]
    codes = (workload.weight.to(torch.int16) + offset).to(torch.uint8)
    shape, device = (config.N, config.num_groups), workload.weight.device
    scale = (torch.ones(1, device=device) if workload.scale is None else workload.scale.float()).expand(shape)
    points = torch.zeros(shape, device=device) if workload.zero_points is None else workload.zero_points.float()
    if config.zeros_mode == "rescale":
        points = points / scale
    return Codes(codes, fmt.bits, scale, points + offset, config.group)


def graph_copies(weight: Codes, m: int, budget: int) -> int:
    """How many matmuls, each with a copy of the weight, a graph holds.

    A run computes all of them: one where a matmul takes long, and the weight's way from memory matters less. Of a small weight
    `MAX_COPIES` may fit into the cache, to the advantage of whoever runs them.
    """
    if m > FEW_ROWS:
        return 1
    return min(MAX_COPIES, num_copies(weight.codes.numel() * weight.bits // 8, budget))
