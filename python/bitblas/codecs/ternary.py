"""Ternary weights: what shares a scale, and the rounding to -1, 0 and 1 by the mean magnitude (absmean).

The scheme of BitNet b1.58 (Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv:2402.17764).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..errors import ConfigError

#: The format of ternary weights: codes of two bits, value + 2.
TERNARY = "int2"
#: Consecutive in_features that share a scale in "wpg", where it gives no number.
DEFAULT_GROUP = 128

_QUANT_TYPE = re.compile(r"ai8pc_(?:(wpt)|(wpc)|wpg([1-9][0-9]*)?)")


@dataclass(frozen=True)
class TernaryScheme:
    """Which weights share a scale.

    Attributes
    ----------
    group : int or None
        How many consecutive in_features of a row; -1: all of a row; None: the whole weight.
    """

    group: int | None

    @classmethod
    def parse(cls, quant_type: object) -> TernaryScheme:
        """Read the name of a scheme: ``ai8pc_wpt``, ``ai8pc_wpc``, ``ai8pc_wpg`` or ``ai8pc_wpg{size}``.

        Raises
        ------
        ConfigError
            It is none.
        """
        found = _QUANT_TYPE.fullmatch(quant_type) if isinstance(quant_type, str) else None
        if found is None:
            raise ConfigError(
                f"quant_type is {quant_type!r}; allowed: 'ai8pc_wpt' (a scale for the whole weight), 'ai8pc_wpc' (for each "
                f"output channel), 'ai8pc_wpg' (for each group of {DEFAULT_GROUP} in_features), 'ai8pc_wpg64' and the like"
            )
        tensor, channel, size = found.groups()
        return cls(None if tensor else -1 if channel else int(size or DEFAULT_GROUP))

    @property
    def quant_type(self) -> str:
        """Its name."""
        if self.group is None:
            return "ai8pc_wpt"
        return "ai8pc_wpc" if self.group == -1 else f"ai8pc_wpg{self.group}"

    def scale(self, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """max(mean |W|, eps) of the weights that share it: float32, (1,), (N, 1) or (N, K / group), for (N, K) of any float."""
        sizes = weight.detach().float().abs()
        if self.group is None:
            return sizes.mean().clamp(min=eps).view(1)
        size = weight.shape[1] if self.group == -1 else self.group
        return sizes.unflatten(1, (-1, size)).mean(2).clamp(min=eps)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """What `scale` returned in a shape that an (N, K) weight can be divided by."""
        return scale if self.group in (None, -1) else scale.repeat_interleave(self.group, dim=1)


def to_ternary(scaled: torch.Tensor) -> torch.Tensor:
    """Weights over their scales, rounded to the nearest of -1, 0 and 1 (ties to even), in their dtype."""
    return scaled.round().clamp(-1, 1)
