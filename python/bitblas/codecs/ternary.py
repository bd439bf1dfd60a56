"""Ternary weights: what shares a scale, and the rounding to -1, 0 and 1 by the mean magnitude (absmean).

The scheme of BitNet b1.58 (Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv:2402.17764).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Real

import torch

from ..errors import ArgumentError, ConfigError

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
        """max(mean |W|, eps) of the weights that share it: float32, (1,), (N, 1) or (N, K / group), for (N, K) of any float.

        Summed in float64, so that it does not depend on the number of threads.
        """
        size = weight.shape[1] if self.group in (None, -1) else self.group
        sums = torch.linalg.vector_norm(weight.detach().unflatten(1, (-1, size)), 1, dim=2, dtype=torch.float64)
        means = sums / size if self.group is not None else sums.sum().view(1) / weight.numel()
        return means.clamp(min=eps).float()

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """What `scale` returned in a shape that an (N, K) weight can be divided by."""
        return scale if self.group in (None, -1) else scale.repeat_interleave(self.group, dim=1)

    def held(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `scale` returned as a deployed layer of a dtype holds it, in float32."""
        return scale if self.group is None else scale.to(dtype).float()


def to_ternary(scaled: torch.Tensor) -> torch.Tensor:
    """Weights over their scales, rounded to the nearest of -1, 0 and 1 (ties to even), in their dtype."""
    return scaled.round().clamp(-1, 1)


def scheme_of(given: object, n: int, k: int) -> tuple[TernaryScheme, torch.Tensor]:
    """Whose a scale is, and the scale in the shape of the scheme: one number for all where they are all the same.

    Parameters
    ----------
    given : torch.Tensor or float
        Finite: one number, (n,), (n, 1) or (n, k / group).

    Raises
    ------
    ArgumentError
        It is none of these.
    """
    if not isinstance(given, torch.Tensor | Real) or isinstance(given, bool):
        raise ArgumentError(f"scale is a {type(given).__name__}; it must be a number or a torch.Tensor")
    scale = (
        given.detach()
        if isinstance(given, torch.Tensor)
        else torch.tensor(float(given), dtype=torch.float64, device="cpu")
    )
    shape, column = tuple(scale.shape), scale.reshape(-1)
    same = scale.numel() == 1 or (shape in ((n,), (n, 1)) and bool((column == column[0]).all()))
    found = column[:1].float() if same else scale
    if not bool(found.isfinite().all()):
        raise ArgumentError("scale holds a NaN, an infinity, or a number that float32 does not")
    if same:
        return TernaryScheme(None), found
    if shape in ((n,), (n, 1)):
        return TernaryScheme(-1), scale.reshape(n, 1)
    if scale.dim() != 2 or shape[0] != n or not shape[1] or k % shape[1]:
        raise ArgumentError(
            f"scale has shape {shape}; expected one number, ({n},), ({n}, 1), or ({n}, a divisor of {k})"
        )
    return TernaryScheme(k // shape[1]), scale


def check_codes(codes: object) -> None:
    """Raise ArgumentError unless it is a matrix of -1, 0 and 1."""
    if not isinstance(codes, torch.Tensor):
        raise ArgumentError(f"codes is a {type(codes).__name__}; it must be a torch.Tensor or a QuantizedWeight")
    if codes.layout is not torch.strided or codes.is_meta or codes.is_complex():
        raise ArgumentError(
            f"codes are {codes.dtype}, {codes.layout} on {codes.device}; they must be real, dense, with data"
        )
    if codes.dim() != 2 or not codes.numel():
        raise ArgumentError(f"codes have shape {tuple(codes.shape)}; expected (out_features, in_features)")
    allowed = (codes == 0) | (codes == 1)
    if codes.dtype.is_signed:  # beside unsigned integers -1 would be the largest
        allowed |= codes == -1
    if not bool(allowed.all()):
        raise ArgumentError("codes hold other values than -1, 0 and 1")


def holds_ternary(packed: torch.Tensor, k: int) -> bool:
    """Whether bytes (N, ceil(k / 4)) hold k codes of -1, 0 and 1 in each row, and pad bits of 0."""
    codes = packed.view(torch.uint8)
    used = (codes | codes >> 1) & 0x55  # a bit for each code but 0, which is -2
    whole, rest = divmod(k, 4)
    last = codes[:, whole:] < 4**rest, used[:, whole:] == (4**rest - 1) // 3
    return all(bool(each.all()) for each in (used[:, :whole] == 0x55, *last))
