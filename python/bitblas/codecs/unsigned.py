"""What the families of checkpoints share: unsigned codes with packed zero points become a `QuantizedWeight`."""

from __future__ import annotations

import torch

from .. import packing
from ..dequantization import unpack_zeros
from ..errors import ArgumentError
from .weight import SCALE_DTYPES, ZEROS_MODES, QuantizedWeight, check_tensor


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ArgumentError unless a value is one of those that are allowed; True is not 1."""
    if isinstance(value, (bool, float)) or value not in allowed:
        raise ArgumentError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")


def check_words(name: str, tensor: object, what: str) -> None:
    """Raise ArgumentError unless `tensor` is int32 with two dimensions, neither of them 0; `what` says which."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{name} is a {type(tensor).__name__}; expected an int32 tensor {what}")
    if tensor.dtype is not torch.int32 or tensor.dim() != 2 or not tensor.numel():
        raise ArgumentError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected torch.int32 {what}")


def check_scales(name: str, scales: object, n: int, k: int, axis: int) -> int:
    """Check scales, whose dimension `axis` is that of the groups.

    Returns
    -------
    int
        Number of groups.

    Raises
    ------
    ArgumentError
        A dtype that is no floating-point one, a shape that does not go with (n, k), groups of unequal size, inf or NaN.
    """
    shape = f"({n}, G)" if axis else f"(G, {n})"
    if not isinstance(scales, torch.Tensor):
        raise ArgumentError(f"{name} is a {type(scales).__name__}; expected a tensor {shape}")
    if scales.dtype not in SCALE_DTYPES or scales.dim() != 2 or scales.shape[1 - axis] != n or not scales.numel():
        allowed = ", ".join(map(str, SCALE_DTYPES))
        raise ArgumentError(f"{name} is {scales.dtype} {tuple(scales.shape)}; expected {allowed}, {shape}")
    groups = scales.shape[axis]
    if k % groups:
        raise ArgumentError(
            f"{name} has shape {tuple(scales.shape)}, {groups} groups; they must be equally large, but K = {k} is no "
            f"multiple of {groups}"
        )
    if not bool(torch.isfinite(scales).all()):
        raise ArgumentError(f"{name} holds {scales[~torch.isfinite(scales)][0].item()}; expected finite numbers")
    return groups


def sort_groups(name: str, g_idx: torch.Tensor, k: int, groups: int) -> torch.Tensor | None:
    """The order that brings columns of a group together.

    Parameters
    ----------
    name : str
        The argument to blame in errors.
    g_idx : torch.Tensor
        int32 or int64 (K,): the group of each column.

    Returns
    -------
    torch.Tensor or None
        int64 (K,): the columns of group 0, of group 1, and so on, each in their own order. None: they are so already.

    Raises
    ------
    ArgumentError
        A shape, dtype or group that is not as above, or groups of unequal size.
    """
    check_tensor(name, g_idx, (k,), (torch.int32, torch.int64))
    low, high = (int(v) for v in torch.aminmax(g_idx))
    if low < 0 or high >= groups:
        raise ArgumentError(
            f"{name} holds {low if low < 0 else high}; allowed: 0 to {groups - 1}, the groups of the scales"
        )
    counts = torch.bincount(g_idx, minlength=groups)
    if not bool((counts == k // groups).all()):
        worst = int((counts != k // groups).nonzero()[0])
        raise ArgumentError(
            f"{name} gives group {worst} {int(counts[worst])} columns; groups must be equally large, {k // groups} columns"
        )
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return torch.argsort(g_idx, stable=True)


def all_middle(zeros: torch.Tensor, n: int, bits: int) -> bool:
    """Whether packed zero points, int8 (G, ceil(n·bits/8)), are all 2^(bits-1)."""
    return bool((unpack_zeros(zeros, n, bits) == 1 << (bits - 1)).all())


def weight_of_words(
    rows: torch.Tensor,
    in_features: int,
    bits: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    zeros_mode: str | None,
    order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Put unsigned codes, scales and zero points into the canonical form, with memory of its own.

    Parameters
    ----------
    rows : torch.Tensor
        int32 (N, ceil(K·bits/32)), contiguous, and ours to keep: the codes, packed along K, little-endian.
    in_features : int
        K.
    bits : int
        1 to 8.
    scales : torch.Tensor
        (N, G).
    zeros : torch.Tensor, optional
        int8 (G, ceil(N·bits/8)), packed along N. None: all are 2^(bits-1).
    zeros_mode : str, optional
        What becomes of them. None: an int format without zero points where all are 2^(bits-1), else ``"quantized"``.
    order : torch.Tensor, optional
        int64 (K,): the feature of each column, as `sort_groups` returns it.
    bias : torch.Tensor, optional
        (N,).

    Raises
    ------
    ArgumentError
        A `zeros_mode` that is not allowed, a scale so large that ``"rescale"`` overflows, or a bias of the wrong shape.
    """
    if zeros_mode is not None:
        check_choice("zeros_mode", zeros_mode, ZEROS_MODES)
    n = rows.shape[0]
    packed = row_bytes(rows, in_features, bits)
    perm = None if order is None else order.to(torch.int32)
    scales = _own(scales)
    if bias is not None:
        check_tensor("bias", bias, (n,), (*SCALE_DTYPES, torch.float64))
        bias = _own(bias)
    # int1 is -1 and 1, and not -1 and 0
    if zeros_mode is None and bits > 1 and (zeros is None or all_middle(zeros, n, bits)):
        if bits == 8:  # which is two's complement
            packed.bitwise_xor_(-128)
        return QuantizedWeight(f"int{bits}", packed, in_features, scales, perm=perm, bias=bias)
    if zeros is None:
        zeros = constant_zeros(1 << (bits - 1), n, scales.shape[1], bits, scales.device)
    points, mode = _zeros_of_mode(zeros, scales, bits, zeros_mode)
    return QuantizedWeight(f"uint{bits}", packed, in_features, scales, points, mode, perm, bias)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def row_bytes(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Rows of whole words, int32 (R, ceil(count·bits/32)), to rows of whole bytes, int8 (R, ceil(count·bits/8)).

    Bits behind the last code become 0, in `words` as well.
    """
    used = count * bits
    rows = words.view(torch.int8)[:, : -(-used // 8)]
    if used % 8:
        rows[:, -1] &= (1 << used % 8) - 1
    return rows.contiguous()


def constant_zeros(value: int, n: int, groups: int, bits: int, device: torch.device) -> torch.Tensor:
    """Packed zero points, int8 (groups, ceil(n·bits/8)), that are all the same."""
    row = packing.pack_rows(torch.full((1, n), value, dtype=torch.uint8, device=device), bits)
    return row.repeat(groups, 1).view(torch.int8)


def _zeros_of_mode(
    zeros: torch.Tensor, scales: torch.Tensor, bits: int, zeros_mode: str | None
) -> tuple[torch.Tensor, str]:
    mode = zeros_mode or "quantized"
    if mode == "quantized":
        return _own(zeros), mode
    points = unpack_zeros(zeros, scales.shape[0], bits).contiguous()
    if mode == "original":
        return points.to(scales.dtype), mode
    products = (points.float() * scales.float()).to(scales.dtype)
    if not bool(torch.isfinite(products).all()):
        raise ArgumentError(
            f"scales are too large for zeros_mode 'rescale': zero points times scales leave {scales.dtype}"
        )
    return products, mode
