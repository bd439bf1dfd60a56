"""Codes to and from packed tensors, driven by a `PackedLayout`: the only place that shuffles bits."""

from __future__ import annotations

import torch

from .errors import ArgumentError
from .formats import DataFormat
from .layout import LANES, UNIT, PackedLayout

#: Rows that are transformed at a time, so that temporaries stay small beside the weight.
_BLOCK_ROWS = 1024

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
    for first in range(0, values.shape[0], _BLOCK_ROWS):
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
    for first in range(0, layout.N, _BLOCK_ROWS):
        block = codes[first : first + _BLOCK_ROWS]
        if layout.name == "packed":
            out.view(layout.N, -1)[first : first + _BLOCK_ROWS] = _pack_rows(block, layout.bits)
            continue
        for plane in layout.planes:
            rows = _plane_bytes(layout, plane.width)
            part = out[plane.offset + first * rows : plane.offset + (first + block.shape[0]) * rows]
            _pack_plane(block, plane.width, plane.low_bit, part)
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
    codes = torch.empty((layout.N, layout.K), dtype=_code_dtype(layout.bits), device=packed.device)
    for first in range(0, layout.N, _BLOCK_ROWS):
        block = codes[first : first + _BLOCK_ROWS]
        if layout.name == "packed":
            block.copy_(_unpack_rows(flat.view(layout.N, -1)[first : first + _BLOCK_ROWS], layout.K, layout.bits))
            continue
        for plane in layout.planes:
            rows = _plane_bytes(layout, plane.width)
            part = flat[plane.offset + first * rows : plane.offset + (first + block.shape[0]) * rows]
            found = _unpack_plane(part, plane.width, block.shape[0], layout.K)
            if plane.low_bit:
                block |= found << plane.low_bit
            else:
                block.copy_(found)
    return codes


def repack(packed: torch.Tensor, source: PackedLayout, target: PackedLayout) -> torch.Tensor:
    """Move packed weights from one layout to another, exactly."""
    if source == target:
        return packed
    return pack(unpack(packed, source), target)


def _plane_bytes(layout: PackedLayout, width: int) -> int:
    return layout.K * width // 8


def _join(codes: torch.Tensor, width: int) -> torch.Tensor:
    """(..., k) codes of at most `width` < 8 bits -> (..., k·width/8) bytes, little-endian."""
    per_byte = 8 // width
    joined = codes[..., 0::per_byte].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        joined |= codes[..., i::per_byte] << (width * i)
    return joined


def _pack_plane(codes: torch.Tensor, width: int, low_bit: int, out: torch.Tensor) -> None:
    n, k = codes.shape
    if width < 8:
        field = (codes >> low_bit) & ((1 << width) - 1)
        words = _join(field, width).view(n, k // UNIT, width)
        words = words.view(_WORD_DTYPES[width]).view(n, k // UNIT)
    else:
        words = codes
    lines = words.view(n // LANES, LANES, -1).transpose(1, 2)
    out.view(words.dtype).view(lines.shape).copy_(lines)


def _unpack_plane(part: torch.Tensor, width: int, n: int, k: int) -> torch.Tensor:
    word_bytes = width // 8 if width >= 8 else width
    dtype = _WORD_DTYPES[word_bytes]
    words = torch.empty((n, part.numel() // (n * word_bytes)), dtype=dtype, device=part.device)
    words.view(n // LANES, LANES, -1).copy_(part.view(dtype).view(n // LANES, -1, LANES).transpose(1, 2))
    if width >= 8:
        return words
    joined = words.view(torch.uint8)
    per_byte, mask = 8 // width, (1 << width) - 1
    codes = torch.empty((n, k), dtype=torch.uint8, device=part.device)
    for i in range(per_byte):
        codes[:, i::per_byte] = (joined >> (width * i)) & mask
    return codes


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
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


def _unpack_rows(rows: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    n = rows.shape[0]
    if bits >= 8:
        return rows.contiguous().view(_WORD_DTYPES[bits // 8])
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
