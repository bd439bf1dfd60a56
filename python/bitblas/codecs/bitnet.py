"""Ternary weights of BitNet-b1.58: as transformers packs them, and rounded by their mean magnitude."""

from __future__ import annotations

import math

import torch

from .. import packing
from ..errors import ArgumentError
from ..formats import parse_format
from .ternary import TernaryScheme, to_ternary
from .weight import SCALE_DTYPES, QuantizedWeight, check_tensor

_PER_BYTE = 4
#: Words, and weights, that are converted at a time, so that they stay in a cache from pass to pass.
_BLOCK_WORDS, _BLOCK_WEIGHTS = 1 << 16, 1 << 18
#: Of the four fields of two bits in each byte, the lower bits.
_LOW_BITS = 0x55555555
#: (distance, mask of the lower of the two fields) of the swaps that transpose the 4 x 4 fields of a word.
_SWAPS = ((6, 0x00CC00CC), (12, 0x0000F0F0))


def from_bitnet(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    divide: bool = False,
    out_features: int | None = None,
) -> QuantizedWeight:
    """Repack a linear layer of transformers' quantization method "bitnet".

    Parameters
    ----------
    weight : torch.Tensor
        uint8 (ceil(N/4), K): row r of the weight, plus 1, is in row r % ceil(N/4), bits 2·(r // ceil(N/4)) and the one above.
        Or the values themselves, -1, 0 and 1, as int8 or floats, (N, K): what transformers holds and saves of a layer of
        the class "autobitlinear".
    weight_scale : torch.Tensor
        One element, float16, bfloat16 or float32.
    bias : torch.Tensor, optional
        (N,), any floating-point dtype; kept as it is.
    divide : bool
        Whether values are divided by the scale, as by the class "bitlinear", rather than multiplied, as by "autobitlinear".
    out_features : int, optional
        N of a packed weight, where it is not a multiple of 4. None: as many as the bias has, else 4 a row.

    Returns
    -------
    QuantizedWeight
        int2, one scale for each row, all the same: in float32 where `divide`, else in the dtype of `weight_scale`.

    Raises
    ------
    ArgumentError
        A shape, dtype or value that is not as above.
    """
    scale = _scale(weight_scale, divide)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.numel():
        raise ArgumentError(f"weight is {_shown(weight)}; expected torch.uint8 (ceil(N/4), K), or values (N, K)")
    k = weight.shape[1]
    packed = _repack(weight, _rows(weight, bias, out_features)) if weight.dtype is torch.uint8 else _pack(weight)
    n = packed.shape[0]
    if bias is not None:
        check_tensor("bias", bias, (n,), (*SCALE_DTYPES, torch.float64))
        bias = bias.detach().clone(memory_format=torch.contiguous_format)
    return QuantizedWeight("int2", packed, k, scale.to(weight.device).expand(n, 1).contiguous(), bias=bias)


def scaled_bias(bias: torch.Tensor | None, weight_scale: torch.Tensor) -> torch.Tensor | None:
    """What a layer of the class "autobitlinear", not "online", adds: (x · values + bias) · scale has the bias scaled, too.

    Returns
    -------
    torch.Tensor or None
        (N,) float32.
    """
    return None if bias is None else bias.detach().float() * weight_scale.detach().float().reshape(1)


def _shown(tensor: object) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__


def _scale(weight_scale: torch.Tensor, divide: bool) -> torch.Tensor:
    """What values are multiplied with, (1, 1)."""
    if (
        not isinstance(weight_scale, torch.Tensor)
        or weight_scale.dtype not in SCALE_DTYPES
        or weight_scale.numel() != 1
    ):
        allowed = ", ".join(map(str, SCALE_DTYPES))
        raise ArgumentError(f"weight_scale is {_shown(weight_scale)}; expected one element, {allowed}")
    scale = weight_scale.detach().reshape(1, 1)
    found = 1 / scale.float() if divide else scale
    if not bool(found.isfinite()):
        what = "a number to divide by" if divide else "a finite number"
        raise ArgumentError(f"weight_scale holds {scale.item():g}; expected {what}")
    return found


def _rows(weight: torch.Tensor, bias: torch.Tensor | None, out_features: int | None) -> int:
    """N of a packed weight."""
    height = weight.shape[0]
    n = out_features
    if n is None:
        n = bias.shape[0] if isinstance(bias, torch.Tensor) and bias.dim() == 1 else height * _PER_BYTE
    if isinstance(n, bool) or not isinstance(n, int) or -(-n // _PER_BYTE) != height:
        allowed = f"{height * _PER_BYTE - _PER_BYTE + 1} to {height * _PER_BYTE}"
        what = "out_features is" if out_features is not None else "bias is of"
        raise ArgumentError(f"{what} {n!r}; allowed: {allowed}, as weight has {height} rows of {_PER_BYTE} to a byte")
    return n


def _repack(weight: torch.Tensor, n: int) -> torch.Tensor:
    """Rows in the fields of bytes, uint8 (H, K), to the packed form, int8 (n, ceil(K/4)).

    The bytes of four columns are a word of 4 x 4 fields. Transposed, its byte i is what row i·H + r has for these columns.
    """
    height, k = weight.shape
    if k % _PER_BYTE or not weight.is_contiguous():
        weight = torch.nn.functional.pad(weight, (0, -k % _PER_BYTE)).contiguous()
    words = weight.view(torch.int32)
    out = torch.empty((_PER_BYTE, *words.shape), dtype=torch.uint8, device=weight.device)
    step = max(1, _BLOCK_WORDS // words.shape[1])
    for first in range(0, height, step):
        block = words[first : first + step]
        spare = torch.bitwise_right_shift(block, 1)
        if bool(spare.bitwise_and_(block).bitwise_and_(_LOW_BITS).any()):
            row, column = _first_three(weight[first : first + step])
            raise ArgumentError(
                f"weight holds the code 3, a value of 2, in its byte ({first + row}, {column}); allowed: 0, 1 and 2"
            )
        turned = block + _LOW_BITS  # int2 is stored plus 2
        for distance, mask in _SWAPS:
            torch.bitwise_right_shift(turned, distance, out=spare)
            spare.bitwise_xor_(turned).bitwise_and_(mask)
            turned.bitwise_xor_(spare).bitwise_xor_(spare.bitwise_left_shift_(distance))
        fields = turned.view(torch.uint8).view(*turned.shape, _PER_BYTE)
        out[:, first : first + step] = fields.permute(2, 0, 1)
    return _without_pad(out.view(_PER_BYTE * height, -1)[:n], k)


def _first_three(block: torch.Tensor) -> tuple[int, int]:
    """Row and column of the first byte with a code of 3."""
    row, column = (block & (block >> 1) & 0x55).nonzero()[0].tolist()
    return row, column


def _without_pad(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The packed form with all bits behind code k cleared, int8, from uint8."""
    if k % _PER_BYTE:
        rows[:, -1] &= (1 << 2 * (k % _PER_BYTE)) - 1
    return rows.view(torch.int8)


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Values of -1, 0 and 1, (N, K), to the packed form."""
    if values.dtype is not torch.int8 and not values.is_floating_point():
        raise ArgumentError(
            f"weight is {_shown(values)}; expected torch.uint8 (ceil(N/4), K), or int8 or floats (N, K)"
        )
    fmt = parse_format("int2")
    codes = packing.encode(values.detach(), fmt, "weight")
    if not bool(codes.all()):  # 0 is what -2 is stored as
        raise ArgumentError("weight holds -2; allowed: -1, 0 and 1")
    return packing.pack_rows(codes, fmt.bits).view(torch.int8)


def ternary(weight: torch.Tensor, eps: float = 1e-5, bias: torch.Tensor | None = None) -> QuantizedWeight:
    """Round a weight to -1, 0 and 1 times its mean magnitude, as BitNet-b1.58 does at every step of its training.

    The scale of the whole tensor is s = max(mean |w|, eps), and a code is w / s, rounded (ties to even) and clamped, in float32
    (Ma et al., The Era of 1-bit LLMs, 2024, equations 1 to 3).

    Parameters
    ----------
    weight : torch.Tensor
        (N, K), any floating-point dtype.
    eps : float
        The least scale, above 0.
    bias : torch.Tensor, optional
        (N,), kept as it is.

    Returns
    -------
    QuantizedWeight
        int2, one scale for each row, all the same, float32; on the device of `weight`.

    Raises
    ------
    ArgumentError
        An argument that is not as above, or a weight that is not finite.
    """
    if (
        not isinstance(weight, torch.Tensor)
        or not weight.is_floating_point()
        or weight.dim() != 2
        or not weight.numel()
    ):
        raise ArgumentError(f"weight is {_shown(weight)}; expected a floating-point tensor (N, K)")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ArgumentError(f"eps is {eps!r}; it must be a number above 0")
    weight, (n, k) = weight.detach(), weight.shape
    scale = TernaryScheme(None).scale(weight, eps)
    if not bool(scale.isfinite()):
        wrong = weight[~weight.float().isfinite()]
        found = f"{wrong[0].item():g}" if wrong.numel() else "numbers whose mean float32 cannot hold"
        raise ArgumentError(f"weight holds {found}; expected finite numbers")
    packed = torch.empty((n, -(-k // _PER_BYTE)), dtype=torch.uint8, device=weight.device)
    step = max(1, _BLOCK_WEIGHTS // k)
    for first in range(0, n, step):
        values = to_ternary(weight[first : first + step].float().div(scale))
        codes = torch.nn.functional.pad(values, (0, -k % _PER_BYTE)).add_(2).to(torch.uint8)
        words = codes.view(torch.int32)
        packed[first : first + step] = (words | words >> 6 | words >> 12 | words >> 18).to(torch.uint8)
    if bias is not None:
        check_tensor("bias", bias, (n,), (*SCALE_DTYPES, torch.float64))
        bias = bias.detach().clone(memory_format=torch.contiguous_format)
    return QuantizedWeight("int2", _without_pad(packed, k), k, scale.expand(n, 1).contiguous(), bias=bias)
