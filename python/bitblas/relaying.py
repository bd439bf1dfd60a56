"""Packed weights from one layout to another, exactly: by whole words where words of both hold the same codes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from . import packing
from .layout import LANES, PackedLayout

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

#: Rows whose words are moved at a time: those of some squares stay in a cache.
_BLOCK_ROWS = 512


def repack(packed: torch.Tensor, source: PackedLayout, target: PackedLayout) -> torch.Tensor:
    """Move weights from one layout to another.

    Parameters
    ----------
    packed : torch.Tensor
        Of `source.num_bytes`, any dtype; contiguous.
    source, target : PackedLayout
        Of one shape and width.

    Returns
    -------
    torch.Tensor
        int8 (N, `target.row_bytes`), or `packed` itself where the layouts are equal.
    """
    if source == target:
        return packed
    words = _word_bytes(source, target)
    if words is None:
        return packing.pack(packing.unpack(packed, source), target)
    return _move_words(packed, source, target, _WORDS[words])


def _word_bytes(source: PackedLayout, target: PackedLayout) -> int | None:
    """Bytes of the words that both layouts have whole, if in another order; None where there are none."""
    native = {layout.name: layout for layout in (source, target)}
    native.pop("packed", None)
    if len(native) != 1 or source.name == target.name:
        return None
    (layout,) = native.values()
    if layout.is_fragments or len(layout.planes) != 1:
        return None
    return layout.planes[0].word_bytes


def _move_words(packed: torch.Tensor, source: PackedLayout, target: PackedLayout, dtype: torch.dtype) -> torch.Tensor:
    """Move words between rows, in which they follow each other, and squares, in which those of 16 rows stand side by side.

    Before -> after, to a native layout: word ``n * words + w`` -> word ``((n / 16) * words + w) * 16 + n % 16``.
    """
    flat = packed.contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % dtype.itemsize:
        flat = flat.clone()
    flat = flat.view(torch.uint8).view(dtype)
    to_native = source.name == "packed"
    a, b = (LANES, flat.numel() // source.N) if to_native else (flat.numel() // source.N, LANES)
    out = torch.empty_like(flat)
    native = target if to_native else source
    swaps = _swaps(native.bits) if native.name == "dots" else ()
    blocks, moved = flat.view(-1, a, b), out.view(-1, b, a)
    step = max(1, _BLOCK_ROWS // LANES)
    for first in range(0, blocks.shape[0], step):
        words = blocks[first : first + step].transpose(1, 2)
        if swaps:
            words = words.clone(memory_format=torch.contiguous_format)  # what is given is not written to
            words = _swap_fields(words, native.bits, swaps if to_native else swaps[::-1])
        moved[first : first + step] = words
    return out.view(torch.int8).view(target.N, target.row_bytes)


@cache
def _swaps(width: int) -> tuple[tuple[int, int], ...]:
    """Pairs of index bits, whose swaps one after another take codes from their order in a stream to that of "dots".

    The code c of a word is its c-th field in a stream. In "dots" it lies in byte c % 4, above c / 4 others: the two lowest bits
    of c become the highest of the field's number.
    """
    bits = (32 // width).bit_length() - 1
    wanted = [*range(2, bits), 0, 1]  # which bit of c stands at each place of the number, from the lowest
    order, swaps = sorted(wanted), []
    for place, bit in enumerate(wanted):
        other = order.index(bit)
        if other != place:
            order[place], order[other] = order[other], order[place]
            swaps.append((place, other))
    return tuple(swaps)


def _swap_fields(words: torch.Tensor, width: int, swaps: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Swap the fields of `width` bits of int32 words, in place: of their numbers two bits change places, for each pair."""
    for low, high in swaps:
        shift, mask = width * ((1 << high) - (1 << low)), _mask(width, low, high)
        moved = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
        words.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(shift))
    return words


@cache
def _mask(width: int, low: int, high: int) -> int:
    """The fields whose number has the bit `low` and not the bit `high`, as an int32."""
    fields = (number for number in range(32 // width) if number >> low & 1 and not number >> high & 1)
    mask = sum(((1 << width) - 1) << (width * number) for number in fields)
    return mask - (1 << 32) if mask >> 31 else mask
