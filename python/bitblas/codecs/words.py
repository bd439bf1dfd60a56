"""Words of 32 bits full of codes, turned about as whole words: nothing is unpacked."""

from __future__ import annotations

import torch

#: Words that are turned at a time, so that they stay in a cache from pass to pass.
_BLOCK_WORDS = 1 << 16
#: Fewer columns than these, and copying them costs more than the cache saves.
_LEAST_COLUMNS = 16


def turn_(words: torch.Tensor, width: int) -> None:
    """Transpose squares of fields, in place.

    Before -> after: field j of words[i, w] -> field i of words[j, w], the lowest bits being field 0.

    Squares of half the size are swapped across the diagonal, then of a quarter, and so on (Warren, Hacker's Delight, 7-3):
    three operations a word for each halving.

    Parameters
    ----------
    words : torch.Tensor
        int32 (32/width, W), contiguous.
    width : int
        Bits of a field: 1, 2, 4, 8 or 16.
    """
    half = words.shape[0] // 2
    spare = torch.empty(words.numel() // 2, dtype=torch.int32, device=words.device)
    while half:
        pairs = words.view(-1, 2, half * words.shape[1])
        low, high = pairs[:, 0], pairs[:, 1]
        moved, shift = spare.view(low.shape), half * width
        torch.bitwise_right_shift(low, shift, out=moved)
        moved.bitwise_xor_(high).bitwise_and_(_low_fields(half, width))
        high.bitwise_xor_(moved)
        low.bitwise_xor_(moved.bitwise_left_shift_(shift))
        half //= 2


def _low_fields(half: int, width: int) -> int:
    """A mask of the fields j of a word with j & half = 0; it has no sign bit."""
    return sum(((1 << width) - 1) << (j * width) for j in range(32 // width) if not j & half)


def column_blocks(columns: int, words: int) -> list[slice]:
    """Blocks of columns, each with `words` words, that fit a cache."""
    step = max(_LEAST_COLUMNS, _BLOCK_WORDS // max(1, words))
    return [slice(first, min(first + step, columns)) for first in range(0, columns, step)]


def permute_codes(words: torch.Tensor, order: torch.Tensor, bits: int) -> torch.Tensor:
    """Permute codes that are packed along the rows, and transpose.

    Words of columns that lie far apart are turned, so that a row of words holds one code of each of them; rows are gathered,
    and turned back. Codes whose width is no power of two are turned bit by bit.

    Parameters
    ----------
    words : torch.Tensor
        int32 (R, N), R = ceil(K·bits/32), of any strides: a little-endian stream of K codes in each column.
    order : torch.Tensor
        int64 (K,): code j of the result is code order[j].
    bits : int
        1 to 8.

    Returns
    -------
    torch.Tensor
        int32 (N, R), contiguous: a stream in each row; pad bits are 0.
    """
    height, n = words.shape
    width = bits if 32 % bits == 0 else 1
    count = 32 // width
    columns = -(-n // count)
    out = torch.empty((n, height), dtype=torch.int32, device=words.device)
    fields = (order.unsqueeze(1) * (bits // width) + torch.arange(bits // width, device=order.device)).view(-1)
    source = torch.zeros(
        height * count, dtype=torch.int64, device=words.device
    )  # field r·count + i lies in row i·height + r
    source[: fields.shape[0]] = fields % count * height + fields // count
    source = source.view(height, count).t().reshape(-1)
    for block in column_blocks(columns, height * count):
        slabs = torch.zeros((count, height, block.stop - block.start), dtype=torch.int32, device=words.device)
        parts = [slice(min(i * columns + block.start, n), min(i * columns + block.stop, n)) for i in range(count)]
        for i, part in enumerate(parts):
            slabs[i, :, : part.stop - part.start] = words[:, part]
        turn_(slabs.view(count, -1), width)
        moved = slabs.view(count * height, -1).index_select(0, source).view(count, height, -1)
        if fields.shape[0] < height * count:
            tail = torch.arange(fields.shape[0], height * count, device=words.device)
            moved[tail % count, tail // count] = 0
        turn_(moved.view(count, -1), width)
        for i, part in enumerate(parts):
            out[part] = moved[i, :, : part.stop - part.start].t()
    return out


def repeat_field(value: int, width: int) -> int:
    """The int32 all of whose fields of `width` bits, a divisor of 32, hold `value`."""
    word = sum(value << shift for shift in range(0, 32, width))
    return word - (1 << 32) if word >> 31 else word
