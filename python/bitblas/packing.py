"""Codes to and from packed tensors, driven by a `PackedLayout`: the only place that shuffles bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .errors import ArgumentError
from .formats import DataFormat
from .layout import FRAGMENT_K, LANES, QUAD, PackedLayout, Plane
from .logs import tracked

#: Rows that are transformed at a time, so that temporaries stay small beside the weight.
_BLOCK_ROWS = 1024

#: Codes from which on a bar is worth its import.
_MANY_CODES = 1 << 28

_WORD_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def code_dtype(fmt: DataFormat) -> torch.dtype:
    """The dtype in which codes of `fmt` are handed to `pack`: uint8, or for wider formats int16 and int32."""
    return _code_dtype(fmt.bits)


def _code_dtype(bits: int) -> torch.dtype:
    return _WORD_DTYPES[max(1, bits // 8)]


def encode(values: torch.Tensor, fmt: DataFormat, argument: str = "w") -> torch.Tensor:
    """Turn weights, as users hold them, into codes.

    Parameters
    ----------
    values : torch.Tensor
        (N, K). Integer formats: values in any dtype. Codebook formats: codes. float8: torch.float8 tensors or their bytes.
        Native dtypes: a tensor of that dtype, or of another floating-point dtype, which is converted.
    fmt : DataFormat
        The format to encode in.
    argument : str
        The argument to blame in errors.

    Returns
    -------
    torch.Tensor
        (N, K) codes of `code_dtype(fmt)`.

    Raises
    ------
    ArgumentError
        A value that the format cannot hold, or a dtype that makes no sense for it.
    """
    if fmt.is_native:
        if not values.is_floating_point():
            raise ArgumentError(f"{argument} has dtype {values.dtype}; {fmt.name} weights must be floating-point")
        return values.to(getattr(torch, fmt.torch_name)).contiguous().view(code_dtype(fmt))
    if fmt.kind == "float8":
        if values.dtype in (torch.int8, torch.uint8):
            return values.contiguous().view(torch.uint8)
        if values.dtype is not getattr(torch, fmt.torch_name):
            raise ArgumentError(
                f"{argument} has dtype {values.dtype}; allowed: torch.{fmt.torch_name}, or its bytes as int8"
            )
        return values.contiguous().view(torch.uint8)
    return _encode_integers(values, fmt, argument)


def _encode_integers(values: torch.Tensor, fmt: DataFormat, argument: str) -> torch.Tensor:
    if values.dtype is torch.bool or values.is_complex():
        raise ArgumentError(
            f"{argument} has dtype {values.dtype}; {fmt.name} needs integers or whole floating-point numbers"
        )
    low, high = fmt.value_range if fmt.is_integer else (0, (1 << fmt.bits) - 1)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for first in _blocks(values.shape, f"encoding {fmt.name}"):
        block = comparable(values[first : first + _BLOCK_ROWS])
        if block.numel():
            _check_range(block, low, high, fmt, argument)
        whole = block.to(torch.int16)
        if fmt.bits == 1 and fmt.kind == "int":
            if bool((whole == 0).any()):
                raise ArgumentError(f"{argument} holds 0; allowed for int1: -1 and 1")
            whole = (whole + 1) >> 1
        codes[first : first + _BLOCK_ROWS] = (whole + fmt.code_offset).to(torch.uint8)
    return codes


def comparable(block: torch.Tensor) -> torch.Tensor:
    """`block` in a dtype that torch finds minima of: float8 and the wide unsigned ones are converted."""
    if block.is_floating_point():
        return block.float() if block.dtype.itemsize == 1 else block
    return block if block.dtype is torch.uint8 or block.dtype.is_signed else block.to(torch.int64)


def _check_range(block: torch.Tensor, low: int, high: int, fmt: DataFormat, argument: str) -> None:
    smallest, largest = (float(v) for v in torch.aminmax(block))
    if not (low <= smallest and largest <= high):  # a NaN fails both comparisons
        wrong = smallest if not low <= smallest else largest
        raise ArgumentError(f"{argument} holds {wrong:g}; allowed for {fmt.name}: {low} to {high}")
    if block.is_floating_point() and not bool((block == block.round()).all()):
        wrong = block[block != block.round()][0].item()
        raise ArgumentError(f"{argument} holds {wrong:g}; allowed for {fmt.name}: whole numbers from {low} to {high}")


def decode_codes(codes: torch.Tensor, fmt: DataFormat) -> torch.Tensor:
    """Turn (N, K) codes back into values: the inverse of `encode`.

    Returns
    -------
    torch.Tensor
        (N, K): int8 for int formats, uint8 for uint formats and codebook codes, else the format's torch dtype.
    """
    if fmt.torch_name:
        return codes.view(getattr(torch, fmt.torch_name))
    if fmt.kind != "int":
        return codes
    if fmt.bits == 1:
        return codes.to(torch.int8) * 2 - 1
    return (codes.to(torch.int16) - fmt.code_offset).to(torch.int8)


def pack(codes: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Lay (N, K) codes out.

    Returns
    -------
    torch.Tensor
        int8 (N, ceil(K·bits/8)) on the device of `codes`.
    """
    if tuple(codes.shape) != (layout.N, layout.K):
        raise ArgumentError(f"codes have shape {tuple(codes.shape)}; expected ({layout.N}, {layout.K})")
    out = torch.empty(layout.num_bytes, dtype=torch.uint8, device=codes.device)
    for first in _blocks(codes.shape, "packing weights"):
        block = codes[first : first + _BLOCK_ROWS]
        if layout.name == "packed":
            out.view(layout.N, -1)[first : first + _BLOCK_ROWS] = pack_rows(block, layout.bits)
            continue
        for plane in layout.planes:
            part = _plane_part(out, layout, plane, first, block.shape[0])
            field = block if plane.width >= 8 else (block >> plane.low_bit) & ((1 << plane.width) - 1)
            if layout.is_fragments:
                part.view(torch.int32).copy_(_join_fragments(field, layout, plane))
                continue
            words = _join_quads(field, plane) if layout.name == "dots" else _join_units(field, plane)
            lines = words.view(block.shape[0] // LANES, LANES, -1).transpose(1, 2)
            part.view(words.dtype).view(lines.shape).copy_(lines)
    return out.view(torch.int8).view(layout.N, layout.row_bytes)


def unpack(packed: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The inverse of `pack`.

    Returns
    -------
    torch.Tensor
        (N, K) codes: uint8, or int16 and int32 for 16 and 32 bits.
    """
    if packed.numel() * packed.element_size() != layout.num_bytes:
        size = packed.numel() * packed.element_size()
        raise ArgumentError(f"packed weights have {size} bytes; this layout has {layout.num_bytes}")
    flat = packed.contiguous().view(torch.uint8).view(-1)
    make = torch.zeros if layout.is_fragments else torch.empty
    codes = make((layout.N, layout.K), dtype=_code_dtype(layout.bits), device=packed.device)
    for first in _blocks(codes.shape, "unpacking weights"):
        block = codes[first : first + _BLOCK_ROWS]
        if layout.name == "packed":
            block.copy_(unpack_rows(flat.view(layout.N, -1)[first : first + _BLOCK_ROWS], layout.K, layout.bits))
            continue
        for plane in layout.planes:
            part = _plane_part(flat, layout, plane, first, block.shape[0])
            dtype = _WORD_DTYPES[plane.word_bytes]
            if layout.is_fragments:
                block |= _split_fragments(part.view(dtype), layout, plane) << plane.low_bit
                continue
            words = torch.empty((block.shape[0], layout.K // plane.codes_per_word), dtype=dtype, device=packed.device)
            lanes = words.view(block.shape[0] // LANES, LANES, -1)
            lanes.copy_(part.view(dtype).view(lanes.shape[0], -1, LANES).transpose(1, 2))
            found = _split_quads(words, plane) if layout.name == "dots" else _split_units(words, plane)
            if plane.low_bit:
                block |= found << plane.low_bit
            else:
                block.copy_(found)
    return codes


def _blocks(shape: torch.Size, what: str) -> Iterable[int]:
    """First rows of the blocks of a matrix; with a bar where there is so much that it takes a while."""
    rows = range(0, shape[0], _BLOCK_ROWS)
    return tracked(rows, what) if shape.numel() > _MANY_CODES else rows


def unpack_nibbles(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Activations of two's complement int4, two to a byte along the last dimension, the first in the low bits.

    Parameters
    ----------
    packed : torch.Tensor
        int8 (..., ceil(k / 2)).
    k : int
        Values of a row.

    Returns
    -------
    torch.Tensor
        int8 (..., k), values -8 to 7.
    """
    pairs = torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1)
    return pairs.flatten(-2)[..., :k]


def _plane_part(flat: torch.Tensor, layout: PackedLayout, plane: Plane, first: int, rows: int) -> torch.Tensor:
    """The bytes of a plane that hold `rows` rows of the matrix from row `first` on."""
    row_bytes = layout.K * plane.width // 8
    return flat[plane.offset + first * row_bytes : plane.offset + (first + rows) * row_bytes]


def _join(codes: torch.Tensor, width: int) -> torch.Tensor:
    """(..., k) codes of at most `width` < 8 bits -> (..., k·width/8) bytes, little-endian."""
    per_byte = 8 // width
    joined = codes[..., 0::per_byte].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        joined |= codes[..., i::per_byte] << (width * i)
    return joined


#: Width of a code -> the dtype with a byte for each code of a byte, and (shift, mask) that spread them over it.
_SPREADS: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


def _split(joined: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `_join`; codes of 8 bits are returned as they are."""
    if width == 8:
        return joined
    dtype, spreads = _SPREADS[width]
    words = joined.to(dtype, memory_format=torch.contiguous_format)
    for shift, mask in spreads:  # half of the codes move up, in all bytes at once
        words = words.bitwise_or_(words << shift).bitwise_and_(mask)
    return words.view(torch.uint8)


def _join_units(field: torch.Tensor, plane: Plane) -> torch.Tensor:
    """(n, k) fields of a plane -> (n, words) of the lane layout."""
    if plane.width >= 8:
        return field
    return _join(field, plane.width).view(_WORD_DTYPES[plane.word_bytes])


def _split_units(words: torch.Tensor, plane: Plane) -> torch.Tensor:
    return words if plane.width >= 8 else _split(words.view(torch.uint8), plane.width)


def _join_quads(field: torch.Tensor, plane: Plane) -> torch.Tensor:
    """(n, k) fields of a plane -> (n, words) of the layout "dots"."""
    n = field.shape[0]
    by_byte = field.reshape(n, -1, 8 // plane.width, QUAD).transpose(2, 3)  # word, byte, place in the byte
    return _join(by_byte, plane.width).reshape(n, -1).contiguous().view(torch.int32)


def _split_quads(words: torch.Tensor, plane: Plane) -> torch.Tensor:
    n = words.shape[0]
    by_byte = _split(words.view(torch.uint8).view(n, -1, QUAD, 1), plane.width)
    return by_byte.transpose(2, 3).reshape(n, -1)


def _fragment_shape(layout: PackedLayout, plane: Plane) -> tuple[int, int, int, int]:
    """Of a layout for tensor cores: steps of 32 k, elements of a register, registers of a word, pieces of a block."""
    steps, elements = (2, 2) if layout.name == "mma16" else (1, QUAD)
    return steps, elements, 32 // elements // plane.width, max(1, plane.width // 4)


def _join_fragments(field: torch.Tensor, layout: PackedLayout, plane: Plane) -> torch.Tensor:
    """(n, k) fields of a plane -> int32 (words,) of a layout for tensor cores, as they lie in memory."""
    steps, elements, per_word, pieces = _fragment_shape(layout, plane)
    span, width = layout.span(plane), plane.width
    # n: block, half, row; k: blocks, blocks of a span, half, thread, step, part, element
    by_place = field.reshape(-1, 2, 8, layout.K // (FRAGMENT_K * span), span, 2, 4, steps, 2, elements)
    registers = by_place.permute(
        0, 3, 2, 6, 4, 5, 7, 8, 1, 9
    )  # block, blocks, row, thread, span, step .. half, element
    parts = registers.reshape(*registers.shape[:5], -1, per_word, elements)
    words = torch.zeros(parts.shape[:-2], dtype=torch.int32, device=field.device)
    for place in range(per_word):
        for element in range(elements):
            words |= parts[..., place, element].to(torch.int32) << (place * width + element * (32 // elements))
    if pieces > 1:
        words = words.reshape(*words.shape[:4], pieces, -1).permute(0, 1, 4, 2, 3, 5)
    return words.reshape(-1)


def _split_fragments(words: torch.Tensor, layout: PackedLayout, plane: Plane) -> torch.Tensor:
    """The inverse of `_join_fragments`: uint8 (n, k)."""
    steps, elements, per_word, pieces = _fragment_shape(layout, plane)
    span, width = layout.span(plane), plane.width
    blocks = layout.K // (FRAGMENT_K * span)
    if pieces > 1:
        words = words.view(-1, blocks, pieces, 8, 4, 4).permute(0, 1, 3, 4, 2, 5)
    words = words.reshape(-1, blocks, 8, 4, span, width)
    parts = torch.empty((*words.shape, per_word, elements), dtype=torch.uint8, device=words.device)
    for place in range(per_word):
        for element in range(elements):
            shifted = words >> (place * width + element * (32 // elements))
            parts[..., place, element] = (shifted & ((1 << width) - 1)).to(torch.uint8)
    registers = parts.reshape(-1, blocks, 8, 4, span, 2, steps, 2, 2, elements)
    return registers.permute(0, 8, 2, 1, 4, 5, 3, 6, 7, 9).reshape(-1, layout.K)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, k) codes -> the packed form, uint8 (n, ceil(k·bits/8))."""
    n, k = codes.shape
    if bits >= 8:
        return codes.contiguous().view(torch.uint8).view(n, -1)
    padded = torch.zeros((n, (k + 7) // 8 * 8), dtype=torch.uint8, device=codes.device)
    padded[:, :k] = codes
    if bits in (1, 2, 4):
        stream = _join(padded, bits)
    else:  # 8 codes in `bits` bytes: gather each byte from the one, two or three codes that reach into it
        units = padded.view(n, -1, 8).to(torch.int16)
        stream = torch.zeros((n, units.shape[1], bits), dtype=torch.int16, device=codes.device)
        for i in range(8):
            byte, shift = divmod(i * bits, 8)
            stream[..., byte] |= (units[..., i] << shift) & 255
            if shift + bits > 8:
                stream[..., byte + 1] |= units[..., i] >> (8 - shift)
        stream = stream.to(torch.uint8).view(n, -1)
    return stream[:, : (k * bits + 7) // 8]


def unpack_rows(rows: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    """The inverse of `pack_rows`, of uint8 (n, ceil(k·bits/8)): (n, k) uint8, or int16 and int32 for 16 and 32 bits."""
    n = rows.shape[0]
    if bits >= 8:
        return rows.contiguous().view(_WORD_DTYPES[bits // 8])
    if bits in _SPREADS:
        return _split(rows, bits)[:, :k]
    units = (k + 7) // 8
    stream = torch.zeros((n, units * bits), dtype=torch.int16, device=rows.device)
    stream[:, : rows.shape[1]] = rows
    stream = stream.view(n, units, bits)
    codes = torch.empty((n, units, 8), dtype=torch.uint8, device=rows.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        found = stream[..., byte] >> shift
        if shift + bits > 8:
            found = found | (stream[..., byte + 1] << (8 - shift))
        codes[..., i] = (found & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(n, -1)[:, :k]


# -- the original BitBLAS's byte formats: values joined as they come, and codes interleaved for its GPU decoders --------------

#: Units whose codes are reordered at a time.
_BLOCK_UNITS = 1 << 18
#: Width of the lanes that an interleaved word is dealt out to, by the dtype that its codes are decoded to.
LANE_BITS = {"float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
#: (dtype, bits) -> codes that are dealt out together, and the place of each lane; else a whole word, the lanes in turn.
_DEALS = {("float16", 2): (8, (0, 1)), ("float16", 1): (8, (0, 1)), ("int8", 1): (16, (0, 2, 1, 3))}


def join_values(values: torch.Tensor, bits: int, argument: str) -> torch.Tensor:
    """Join consecutive values of the last axis into bytes, the first in the lowest bits.

    Values are not masked: what does not fit in `bits` bits, as that of a negative value, is OR-ed into the values above it
    in its byte, as the original BitBLAS does.

    Parameters
    ----------
    values : torch.Tensor
        (..., K) numbers of any dtype, -128 to 255, where K·bits is a multiple of 8.
    bits : int
        1, 2, 4 or 8.
    argument : str
        The argument to blame in errors.

    Returns
    -------
    torch.Tensor
        uint8 (..., K·bits/8), with memory of its own.

    Raises
    ------
    ArgumentError
        The last axis does not fill bytes, or a value is no byte.
    """
    if not values.dim() or values.shape[-1] * bits % 8:
        raise ArgumentError(
            f"{argument} has shape {tuple(values.shape)}; its last axis must be a multiple of {8 // bits}, so that values of "
            f"{bits} bits fill bytes"
        )
    return _join(_as_bytes(values, argument), bits)


def _as_bytes(values: torch.Tensor, argument: str) -> torch.Tensor:
    if values.dtype in (torch.int8, torch.uint8):
        return values.view(torch.uint8)
    if values.is_complex():
        raise ArgumentError(f"{argument} has dtype {values.dtype}; it must hold whole numbers")
    values = comparable(values)
    if values.numel():
        low, high = (float(v) for v in torch.aminmax(values))
        if not (low >= -128 and high <= 255):  # a NaN fails both comparisons
            raise ArgumentError(f"{argument} holds {high if low >= -128 else low:g}; allowed: -128 to 255")
        if values.is_floating_point() and not bool((values == values.round()).all()):
            wrong = values[values != values.round()][0].item()
            raise ArgumentError(f"{argument} holds {wrong:g}; allowed: whole numbers from -128 to 255")
    return values.to(torch.int16).to(torch.uint8)


def interleave_sources(bits: int, dtype: str) -> list[int]:
    """Which code of a 32-bit word comes to each place of the interleaved word.

    Code o goes to lane o % lanes, where the lanes are as wide as `dtype`, so that one mask finds a code of every lane.
    Before -> after, 4 bits for float16, lowest bits first: 0 1 2 3 4 5 6 7 -> 0 2 4 6 1 3 5 7.

    Parameters
    ----------
    bits : int
        1, 2, 4 or 8, and not more than a lane has.
    dtype : str
        One of `LANE_BITS`.
    """
    unit, order = _DEALS.get((dtype, bits), (32 // bits, tuple(range(32 // LANE_BITS[dtype]))))
    per_lane = unit // len(order)
    sources = [0] * (32 // bits)
    for code in range(len(sources)):
        first, number = code // unit * unit, code % unit
        sources[first + order[number % len(order)] * per_lane + number // len(order)] = code
    return sources


def reorder_codes(packed: torch.Tensor, bits: int, sources: list[int]) -> torch.Tensor:
    """Permute the codes of each unit of `len(sources)` codes: place p gets code `sources[p]`.

    Parameters
    ----------
    packed : torch.Tensor
        uint8, contiguous, whole units; codes of 1, 2, 4 or 8 bits, the first in the lowest bits.

    Returns
    -------
    torch.Tensor
        A new tensor of the same shape and dtype.
    """
    flat, out = packed.view(-1), torch.empty_like(packed)
    index = torch.tensor(sources, device=packed.device)
    step, mask = _BLOCK_UNITS * len(sources) * bits // 8, (1 << bits) - 1
    for first in range(0, flat.numel(), step):
        block = flat[first : first + step]
        codes = torch.stack([(block >> shift) & mask for shift in range(0, 8, bits)], dim=-1)
        moved = codes.view(-1, len(sources)).index_select(1, index)
        out.view(-1)[first : first + step] = _join(moved, bits).view(-1)
    return out
