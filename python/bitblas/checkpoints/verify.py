"""What foreign tensors stand for, computed plainly and without the codecs, and compared with what was written.

A value is (code - zero point) · scale. Compared are the integers in brackets, and the scales in float32, which is stricter than
to compare products, and takes a third of the time. Where zero points are the same, codes are compared, and where these lie in
the same order in the same kind of stream, the bytes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..codecs import QuantizedWeight
from ..errors import CheckpointError

Tensors = Mapping[str, torch.Tensor | None]

#: Codes that are compared at a time, so that they stay in a cache; and where only bytes are compared.
_BLOCK_CODES, _STREAM_CODES = 1 << 20, 1 << 21
#: Which of the eight columns of a word is in its lowest, second lowest, ... nibble.
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Reference:
    """What the tensors of a foreign layer say.

    Attributes
    ----------
    codes : callable
        Takes a slice of rows that begins at a multiple of 8; gives their codes, uint8 (rows, K).
    stream : callable or None
        The same in our packed form, but for bits behind the last code, uint8 (rows, bytes or more).
    columns : callable or None
        The same transposed, uint8 (K, rows), where that is how they lie.
    zeros : torch.Tensor
        int16 (N, G).
    scales : torch.Tensor
        float32 (N, G).
    groups : torch.Tensor or None
        int64 (K,): the group of each column; None: they are in order, and equally large.
    """

    codes: Callable[[slice], torch.Tensor]
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor | None = None
    stream: Callable[[slice], torch.Tensor] | None = None
    columns: Callable[[slice], torch.Tensor] | None = None


def unpack_stream(rows: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """The first `count` fields of each row of a little-endian stream: uint8 (R, bytes) -> uint8 (R, count)."""
    width = 8
    if 8 % bits == 0:
        while width > bits:  # a byte of two fields becomes two bytes
            width //= 2
            mask = (1 << width) - 1
            pairs = rows.to(torch.int16)
            rows = ((pairs | (pairs << (8 - width))) & (mask | mask << 8)).view(torch.uint8)
        return rows[:, :count]
    units = -(-count // 8)
    padded = torch.zeros((rows.shape[0], units * bits), dtype=torch.int64)
    held = min(rows.shape[1], units * bits)
    padded[:, :held] = rows[:, :held]
    shifts = torch.arange(bits) * 8
    words = (padded.view(-1, units, bits) << shifts).sum(dim=2)  # eight fields, 56 bits at most
    fields = (words.unsqueeze(2) >> (torch.arange(8) * bits)) & ((1 << bits) - 1)
    return fields.to(torch.uint8).view(rows.shape[0], -1)[:, :count]


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of 32 bits in int64 to their fields, the lowest first: (..., W) -> (..., W · 32/bits)."""
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, bits)) & ((1 << bits) - 1)).flatten(-2)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Rows as columns, in memory as well; torch is several times faster at that where the matrix lies in one piece."""
    return matrix.contiguous().T.contiguous()


def _split_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields of words, the lowest first, along the first dimension: int32 (W, C) -> uint8 (W · 32/bits, C)."""
    fields = torch.empty((words.shape[0], 32 // bits, words.shape[1]), dtype=torch.uint8)
    each, mask = 8 // bits, (1 << bits) - 1
    for place in range(4):
        byte = (words >> 8 * place).to(torch.uint8)
        for i in range(each):
            fields[:, place * each + i] = (byte >> bits * i) & mask
    return fields.view(-1, words.shape[1])


def gptq_reference(tensors: Tensors, bits: int, version: int) -> Reference:
    """Words along K; zero points minus one in version 1, where whole words were subtracted from for 2, 4 and 8 bits."""
    qweight, qzeros, scales = _present(tensors, "qweight", "qzeros", "scales")
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    if bits == 3:
        zeros = unpack_stream(qzeros.contiguous().view(torch.uint8), n, bits).to(torch.int64)
        zeros = (zeros + 1) % 8 if version == 1 else zeros
    else:
        words = qzeros.to(torch.int64) % (1 << 32)
        if version == 1:
            words = (words + sum(1 << shift for shift in range(0, 32, bits))) % (1 << 32)
        zeros = _fields(words, bits)
    g_idx = tensors.get("g_idx")

    def stream(rows: slice) -> torch.Tensor:
        return _transposed(qweight[:, rows]).view(torch.uint8)

    def columns(rows: slice) -> torch.Tensor:
        return _split_words(qweight[:, rows], bits)

    groups = None if g_idx is None else g_idx.to(torch.int64)
    codes, straight = _codes_of(stream, k, bits), None if 8 % bits else columns
    return Reference(codes, zeros.T.to(torch.int16), scales.T.float(), groups, stream, straight)


def awq_reference(tensors: Tensors) -> Reference:
    """Nibbles along N in the order of `_AWQ_COLUMNS`; zero points likewise."""
    qweight, qzeros, scales = _present(tensors, "qweight", "qzeros", "scales")
    k = qweight.shape[0]
    places = torch.tensor([_AWQ_COLUMNS.index(column) for column in range(8)])
    zeros = _fields(qzeros.to(torch.int64) % (1 << 32), 4).view(qzeros.shape[0], -1, 8)[:, :, places].flatten(1)

    def codes(rows: slice) -> torch.Tensor:
        words = _transposed(qweight[:, rows.start // 8 : -(-rows.stop // 8)])
        found = torch.empty((words.shape[0], 8, k), dtype=torch.uint8)
        for place, column in enumerate(_AWQ_COLUMNS):
            found[:, column] = (words >> 4 * place) & 15
        return found.view(-1, k)[: rows.stop - rows.start]

    def stream(rows: slice) -> torch.Tensor:
        words = _transposed(qweight[:, rows.start // 8 : -(-rows.stop // 8)])
        found = torch.empty((words.shape[0], 8, k // 2), dtype=torch.uint8)
        for place in range(4):  # two columns, whose codes of even and odd k are the four nibbles of 16 bits
            pairs = (words >> 8 * place).to(torch.uint8).view(torch.int16)
            low, high = _AWQ_COLUMNS[2 * place : 2 * place + 2]
            found[:, low] = (pairs & 15) | ((pairs >> 4) & 240)
            found[:, high] = ((pairs >> 4) & 15) | ((pairs >> 8) & 240)
        return found.view(-1, k // 2)[: rows.stop - rows.start]

    return Reference(codes, zeros.T.to(torch.int16), scales.T.float(), None, None if k % 2 else stream)


def compressed_reference(tensors: Tensors, bits: int) -> Reference:
    """Words along K, zero points along N or as int8; both plus 2^(bits-1) in words. One scale may stand for many."""
    packed, scale, shape = _present(tensors, "weight_packed", "weight_scale", "weight_shape")
    n, k = (int(v) for v in shape.tolist())
    scales = scale.float().reshape(1 if scale.numel() == 1 else n, -1).expand(n, -1)
    middle, points = 1 << (bits - 1), tensors.get("weight_zero_point")
    if points is None:
        zeros = torch.full(scales.shape, middle)
    elif points.dtype is torch.int8:
        zeros = points.to(torch.int64).reshape(1 if points.numel() == 1 else n, -1).expand(n, -1) + middle
    else:
        zeros = unpack_stream(points.T.contiguous().view(torch.uint8), n, bits).T
    g_idx = tensors.get("weight_g_idx")
    groups = None if g_idx is None or bool((g_idx < 0).all()) else g_idx.to(torch.int64)

    def stream(rows: slice) -> torch.Tensor:
        return packed[rows].contiguous().view(torch.uint8)

    return Reference(_codes_of(stream, k, bits), zeros.to(torch.int16), scales, groups, stream)


def bitnet_reference(weight: torch.Tensor, weight_scale: torch.Tensor, divide: bool, n: int) -> Reference:
    """Values plus 1, two bits each, n rows, four to a byte; or the values themselves. One scale, or its inverse, for all."""
    scale = np.float32(weight_scale.float().item())
    scale = np.float32(1) / scale if divide else scale
    height, k = weight.shape
    is_packed = weight.dtype is torch.uint8

    def codes(rows: slice) -> torch.Tensor:
        """Values plus 2, as int2 is stored."""
        if not is_packed:
            return (weight[rows].float() + 2).to(torch.uint8)
        found = torch.empty((rows.stop - rows.start, k), dtype=torch.uint8)
        for part in range(4):
            first, last = max(rows.start, part * height), min(rows.stop, (part + 1) * height)
            if first < last:
                bytes_ = weight[first - part * height : last - part * height]
                found[first - rows.start : last - rows.start] = ((bytes_ >> 2 * part) & 3) + 1
        return found

    return Reference(codes, torch.full((n, 1), 2, dtype=torch.int16), torch.full((n, 1), float(scale)))


def bitnet_bias(bias: torch.Tensor | None, weight_scale: torch.Tensor | None, divide: bool) -> torch.Tensor | None:
    """What is added in the end: where values are multiplied with a scale, the bias is, too, in float32."""
    if bias is None or weight_scale is None or divide:
        return bias
    return torch.from_numpy(bias.float().numpy() * np.float32(weight_scale.float().item()))


def _codes_of(stream: Callable[[slice], torch.Tensor], k: int, bits: int) -> Callable[[slice], torch.Tensor]:
    return lambda rows: unpack_stream(stream(rows), k, bits)


def _present(tensors: Tensors, *names: str) -> list[torch.Tensor]:
    return [tensor for name in names if (tensor := tensors[name]) is not None]


def check_weight(name: str, reference: Reference, weight: QuantizedWeight) -> None:
    """Compare a layer that was written with what its source says.

    Raises
    ------
    CheckpointError
        A value or the bias is another.
    """
    n, k, groups = weight.out_features, weight.in_features, weight.scales.shape[1]
    order = _order(name, reference, weight)
    scales = reference.scales if order is None else reference.scales[:, order]
    zeros = reference.zeros if order is None else reference.zeros[:, order]
    _same(name, "scale", scales, weight.scales.float())
    ours, k_bits = _zeros(weight), k * weight.format.bits
    same_zeros = zeros.shape == ours.shape and np.array_equal(zeros.numpy(), ours.numpy())
    if same_zeros and weight.perm is None and reference.stream is not None and k_bits % 8 == 0:
        for rows in _blocks(n, k, _STREAM_CODES):
            _same(
                name,
                "byte",
                reference.stream(rows)[:, : k_bits // 8],
                weight.packed[rows].view(torch.uint8),
                rows.start,
            )
        return
    perm = None if weight.perm is None else weight.perm.numpy()
    if same_zeros and perm is not None and reference.columns is not None and k_bits % 32 == 0:
        for rows in _blocks(n, k, _BLOCK_CODES):
            wanted = torch.from_numpy(np.take(reference.columns(rows).numpy(), perm, axis=0, mode="clip"))
            found = _transposed(weight.packed[rows].view(torch.int32))
            _same(name, "value", wanted.T, _split_words(found, weight.format.bits).T, rows.start)
        return
    for rows in _blocks(n, k, _BLOCK_CODES):
        wanted = reference.codes(rows)
        if perm is not None:
            wanted = torch.from_numpy(np.take(wanted.numpy(), perm, axis=1))
        found = unpack_stream(weight.packed[rows].view(torch.uint8), k, weight.format.bits)
        if not same_zeros:
            wanted = wanted.to(torch.int16).view(-1, groups, k // groups) - zeros[rows].unsqueeze(2)
            found = _signed(found, weight).view(wanted.shape) - ours[rows].unsqueeze(2)
        _same(name, "value", wanted, found, rows.start)


def _blocks(n: int, k: int, codes: int) -> Iterator[slice]:
    """Rows of about as many codes, a multiple of 8 each but the last."""
    step = max(1, codes // k // 8) * 8
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))


def _signed(codes: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Codes of ours as int16, where those of int8 are two's complement."""
    return (codes.view(torch.int8) if weight.W_dtype == "int8" else codes).to(torch.int16)


def _zeros(weight: QuantizedWeight) -> torch.Tensor:
    """What is to be subtracted from codes of ours, int16 (N, G)."""
    groups = weight.scales.shape[1]
    if weight.zeros is None:
        offset = weight.format.code_offset
        return torch.full((weight.out_features, groups), offset, dtype=torch.int16)
    if weight.zeros_mode == "quantized":
        packed = weight.zeros.contiguous().view(torch.uint8)
        return unpack_stream(packed, weight.out_features, weight.format.bits).T.to(torch.int16)
    raise CheckpointError(f"zeros_mode {weight.zeros_mode!r} cannot be verified")


def _order(name: str, reference: Reference, weight: QuantizedWeight) -> torch.Tensor | None:
    """Which of the source's groups each of ours is; None: the same."""
    if reference.groups is None:
        if weight.perm is not None:
            raise CheckpointError(f"{name}: its columns were permuted for no reason")
        return None
    columns = reference.groups if weight.perm is None else reference.groups[weight.perm.long()]
    by_group = columns.view(weight.scales.shape[1], -1)
    if not bool((by_group == by_group[:, :1]).all()):
        raise CheckpointError(f"{name}: columns of different groups were put into one")
    return by_group[:, 0]


def _same(name: str, what: str, wanted: torch.Tensor, found: torch.Tensor, first: int = 0) -> None:
    theirs, ours = wanted.numpy(), found.numpy()
    if np.array_equal(theirs, ours):
        return
    if theirs.shape != ours.shape:
        raise CheckpointError(f"{name}: the {what}s have shape {ours.shape}; expected {theirs.shape}")
    row, *rest = np.argwhere(theirs != ours)[0]
    place = tuple(int(v) for v in (row + first, *rest))
    raise CheckpointError(
        f"{name}: what was written differs from the source: the {what} at {place} is {ours[(row, *rest)]}, and should be "
        f"{theirs[(row, *rest)]}"
    )


#: Half the distance between neighbouring values of an integer format, in scales, and what float32 may add to it.
_HALF, _SLACK = 0.5, 2.0**-16


def check_rounding(name: str, dense: torch.Tensor, weight: QuantizedWeight) -> None:
    """Compare a layer that was rounded with its dense weight: each value is off by half a step of its format at most.

    int1 is the nearer of two values.

    Raises
    ------
    CheckpointError
        A value is further off, or is none.
    """
    table, halves = _table(weight)
    for rows in _blocks(weight.out_features, weight.in_features, _BLOCK_CODES):
        scales = weight.scales[rows].float().unsqueeze(2)
        values, steps = _values(weight, rows, table, halves)
        values = values * scales
        wanted = dense[rows].float().view(values.shape)
        allowed = (values + wanted).abs() if weight.W_dtype == "int1" else steps * scales * (1 + _SLACK)
        error = (values - wanted).abs_()
        bad = ~(error <= allowed)  # a NaN is bad, too
        if bool(bad.any()):
            row, group, column = (int(v) for v in bad.nonzero()[0])
            raise CheckpointError(
                f"{name}: what was written differs from the source: the value at {(row + rows.start, group, column)} is off "
                f"by {float(error[row, group, column]):g}, with a scale of {float(scales[row, group, 0]):g}"
            )


def check_ternary(name: str, dense: torch.Tensor, weight: QuantizedWeight, eps: float) -> None:
    """Compare a layer that was rounded to -1, 0 and 1 times its mean magnitude with its weight.

    Raises
    ------
    CheckpointError
        The scale is not the mean magnitude, or not that of every row; or a code is not the nearest.
    """
    n, k = weight.out_features, weight.in_features
    total = sum(
        float(np.abs(dense[rows].float().numpy()).sum(dtype=np.float64)) for rows in _blocks(n, k, _BLOCK_CODES)
    )
    mean, scales = max(total / (n * k), eps), weight.scales.double().numpy()
    if weight.W_dtype != "int2" or scales.shape != (n, 1) or not (np.abs(scales - mean) <= mean * 2.0**-22).all():
        raise CheckpointError(f"{name}: a scale that was written is not the mean magnitude of its weight, {mean:g}")
    for rows in _blocks(n, k, _BLOCK_CODES):
        found = unpack_stream(weight.packed[rows].view(torch.uint8), k, 2).to(torch.int8).numpy() - 2
        wanted = np.clip(dense[rows].float().numpy() / np.float32(mean), -1, 1)
        bad = ~(np.abs(found - wanted) <= _HALF + _SLACK)
        if bad.any():
            row, column = (int(v) for v in np.argwhere(bad)[0])
            raise CheckpointError(
                f"{name}: what was written differs from the source: the value at {(row + rows.start, column)} is "
                f"{found[row, column]}, and should be the nearest to {wanted[row, column]:g}"
            )


def check_dense(name: str, weight: QuantizedWeight, dense: torch.Tensor) -> None:
    """Compare a layer that was made dense with what its codes stand for, rounded to the dense dtype.

    Raises
    ------
    CheckpointError
        A value is another.
    """
    n, k = weight.out_features, weight.in_features
    if tuple(dense.shape) != (n, k):
        raise CheckpointError(f"{name}: the weight that was written has shape {tuple(dense.shape)}; expected {(n, k)}")
    inverse = None
    if weight.perm is not None:
        inverse = torch.empty(k, dtype=torch.int64)
        inverse[weight.perm.long()] = torch.arange(k)
    table, halves = _table(weight)
    for rows in _blocks(n, k, _BLOCK_CODES):
        scales = weight.scales[rows].float().unsqueeze(2)
        values = _values(weight, rows, table, halves)[0] * scales
        if weight.zeros is not None and weight.zeros_mode == "rescale":
            values = values - weight.zeros[rows].float().unsqueeze(2)
        values = values.view(-1, k)
        values = (values if inverse is None else values[:, inverse]).to(dense.dtype)
        _same(name, "value", values.float(), dense[rows].float(), rows.start)


def _table(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of each code of a format that is no integer, and half its distance to the further neighbour; else empty."""
    fmt = weight.format
    if fmt.is_integer:
        return torch.empty(0), torch.empty(0)
    if fmt.codebook:
        table = torch.tensor(fmt.codebook)
    else:
        table = torch.arange(256, dtype=torch.uint8).view(getattr(torch, fmt.torch_name)).float()
    finite = torch.where(torch.isfinite(table), table, 0.0)
    ordered, places = torch.sort(finite)
    gaps = torch.nn.functional.pad(torch.diff(torch.unique(ordered)), (1, 1))
    furthest = torch.maximum(gaps[1:], gaps[:-1]) / 2
    halves = torch.empty_like(finite)
    halves[places] = furthest[torch.searchsorted(torch.unique(ordered), ordered)]
    return finite, halves


def _values(
    weight: QuantizedWeight, rows: slice, table: torch.Tensor, halves: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is multiplied with scales, float32 (rows, G, K/G), and half a step at it; zero points of "rescale" are left out."""
    fmt, groups = weight.format, weight.scales.shape[1]
    codes = unpack_stream(weight.packed[rows].view(torch.uint8), weight.in_features, fmt.bits)
    shape = (codes.shape[0], groups, -1)
    if table.numel():
        index = codes.int()
        return table[index].view(shape), halves[index].view(shape)
    if weight.W_dtype == "int1":
        return (codes.float() * 2 - 1).view(shape), torch.tensor(_HALF)
    values = _signed(codes, weight).float().view(shape) - fmt.code_offset
    if weight.zeros is None or weight.zeros_mode == "rescale":
        return values, torch.tensor(_HALF)
    zeros = _zeros(weight) if weight.zeros_mode == "quantized" else weight.zeros
    return values - zeros[rows].float().unsqueeze(2), torch.tensor(_HALF)
