"""AWQ checkpoints in the GEMM format of AutoAWQ: nibbles along N, interleaved."""

from __future__ import annotations

import torch

from .. import packing
from .unsigned import check_choice, check_scales, check_words, weight_of_words
from .weight import QuantizedWeight, check_tensor
from .words import column_blocks, turn_

_PER_WORD = 8
#: Which nibble of a word holds column j of its eight: AutoAWQ puts 0 2 4 6 1 3 5 7 there, the lowest nibble first.
_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]


def from_awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int = 4,
    bias: torch.Tensor | None = None,
    zeros_mode: str | None = None,
) -> QuantizedWeight:
    """Repack a linear layer of an AWQ checkpoint, version "gemm".

    Parameters
    ----------
    qweight : torch.Tensor
        int32 (K, N/8): nibbles of a word, the lowest first, belong to columns 0 2 4 6 1 3 5 7 of N.
    qzeros : torch.Tensor
        int32 (G, N/8): zero points, likewise.
    scales : torch.Tensor
        (G, N), float16, bfloat16 or float32.
    bits : int
        4: the format has no other.
    bias : torch.Tensor, optional
        (N,), any floating-point dtype.
    zeros_mode : str, optional
        As in `from_gptq`.

    Returns
    -------
    QuantizedWeight
        uint4, or int4 without zero points.

    Raises
    ------
    ArgumentError
        A shape, dtype or value that is not as above.
    """
    check_choice("bits", bits, (4,))
    check_words("qweight", qweight, "(K, N/8)")
    k, n = qweight.shape[0], qweight.shape[1] * _PER_WORD
    groups = check_scales("scales", scales, n, k, axis=0)
    check_words("qzeros", qzeros, f"({groups}, {n // _PER_WORD})")
    check_tensor("qzeros", qzeros, (groups, n // _PER_WORD), (torch.int32,))
    zeros = packing.reorder_codes(qzeros.contiguous().view(torch.uint8), 4, _NIBBLES).view(torch.int8)
    return weight_of_words(_rows_along_k(qweight), k, bits, scales.t(), zeros, zeros_mode, bias=bias)


def _rows_along_k(qweight: torch.Tensor) -> torch.Tensor:
    """AWQ's words, int32 (K, N/8), to int32 (N, ceil(K/8)), packed along K; what lies beyond K is 0."""
    k, columns = qweight.shape
    height = -(-k // _PER_WORD)
    out = torch.empty((columns, _PER_WORD * height), dtype=torch.int32, device=qweight.device)
    nibbles = torch.tensor(_NIBBLES, device=qweight.device)
    for block in column_blocks(columns, _PER_WORD * height):
        slabs = torch.zeros((_PER_WORD, height, block.stop - block.start), dtype=torch.int32, device=qweight.device)
        for i in range(min(_PER_WORD, k)):
            part = qweight[i::_PER_WORD, block]
            slabs[i, : part.shape[0]] = part
        turn_(slabs.view(_PER_WORD, -1), 4)
        out[block] = slabs.index_select(0, nibbles).view(_PER_WORD * height, -1).t()
    return out.view(columns * _PER_WORD, height)
