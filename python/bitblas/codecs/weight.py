"""A quantized weight, free of where it came from and of the machine that will multiply it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch

from .. import packing
from ..dequantization import BLOCK_ROWS, dequantize, unpack_zeros
from ..errors import ArgumentError
from ..formats import FORMATS, DataFormat, parse_format

#: What scales, and zero points that are floats, may be.
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: How zero points are held.
ZEROS_MODES = ("original", "rescale", "quantized")

#: Bytes of a format tensor.
FORMAT_BYTES = 128


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of a linear layer in the canonical form, which a state_dict and a checkpoint hold.

    Attributes
    ----------
    W_dtype : str
        Name of the format.
    packed : torch.Tensor
        int8 (N, ceil(K·bits/8)): the codes of each row, a little-endian stream along K, pad bits 0.
    in_features : int
        K.
    scales : torch.Tensor
        (N, K / g), float16, bfloat16 or float32.
    zeros : torch.Tensor, optional
        `zeros_mode` ``"quantized"``: int8 (K / g, ceil(N·bits/8)), packed along N; else (N, K / g) in the dtype of scales.
    zeros_mode : str
        ``"original"`` and ``"quantized"``: (w - z)·s; ``"rescale"``: w·s - z.
    perm : torch.Tensor, optional
        int32 (K,): column j of `packed` is multiplied with feature perm[j] of the activations (act-order), so that
        out = A[..., perm] · Wᵀ. None: they are in order.
    bias : torch.Tensor, optional
        (N,), any floating-point dtype.

    Raises
    ------
    ArgumentError
        A tensor's shape or dtype is not as above, `perm` is no permutation, or the format has no such zero points.
    ConfigError
        No format has that name.
    """

    W_dtype: str
    packed: torch.Tensor
    in_features: int
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    zeros_mode: str = "original"
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        bits, k = self.format.bits, self.in_features
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(f"in_features is {k!r}; it must be an integer of at least 1")
        n = _rows("packed", self.packed)
        check_tensor("packed", self.packed, (n, ceil(k * bits / 8)), (torch.int8,))
        groups = self.scales.shape[-1] if isinstance(self.scales, torch.Tensor) and self.scales.dim() == 2 else 1
        if not groups or k % groups:
            raise ArgumentError(
                f"scales have shape {tuple(self.scales.shape)}; expected ({n}, a divisor of K = {k}), a scale for each group"
            )
        check_tensor("scales", self.scales, (n, groups), SCALE_DTYPES)
        if self.zeros is not None:
            self._check_zeros(self.zeros, n, groups)
        if self.bias is not None:
            check_tensor("bias", self.bias, (n,), (*SCALE_DTYPES, torch.float64))
        if self.perm is not None:
            check_tensor("perm", self.perm, (k,), (torch.int32,))
            counts = torch.bincount(self.perm.long().clamp(0, k), minlength=k)
            if bool((self.perm < 0).any()) or counts.shape[0] != k or not bool((counts == 1).all()):
                raise ArgumentError(f"perm is no permutation of 0 to {k - 1}")

    def _check_zeros(self, zeros: torch.Tensor, n: int, groups: int) -> None:
        if self.zeros_mode not in ZEROS_MODES:
            raise ArgumentError(f"zeros_mode is {self.zeros_mode!r}; allowed: {', '.join(ZEROS_MODES)}")
        if not self.format.is_integer:
            raise ArgumentError(f"zeros are given; {self.format.name} has none")
        if self.zeros_mode != "quantized":
            check_tensor("zeros", zeros, (n, groups), (self.scales.dtype,))
            return
        if self.format.kind != "uint":
            raise ArgumentError(f"zeros_mode is 'quantized', which is for uint formats; W_dtype is {self.format.name}")
        check_tensor("zeros", zeros, (groups, ceil(n * self.format.bits / 8)), (torch.int8,))

    @property
    def format(self) -> DataFormat:
        """The codes' `DataFormat`."""
        return parse_format(self.W_dtype)

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]

    @property
    def group_size(self) -> int:
        """How many consecutive columns share a scale; -1 where all do."""
        groups = self.scales.shape[1]
        return -1 if groups == 1 else self.in_features // groups

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight as it is multiplied with activations in their own order, some rows at a time.

        Yields
        ------
        (slice, torch.Tensor)
            Rows of N, and their values, (rows, K) float32.
        """
        zeros = self.zeros
        if zeros is not None and self.zeros_mode == "quantized":
            zeros = unpack_zeros(zeros, self.out_features, self.format.bits)
        order = None if self.perm is None else torch.argsort(self.perm)
        for first in range(0, self.out_features, BLOCK_ROWS):
            rows = slice(first, min(first + BLOCK_ROWS, self.out_features))
            codes = packing.unpack_rows(self.packed[rows].view(torch.uint8), self.in_features, self.format.bits)
            points = None if zeros is None else zeros[rows]
            values = dequantize(codes, self.format, self.scales[rows], points, self.zeros_mode)
            yield rows, values if order is None else values[:, order]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole of `blocks` as one tensor, (N, K) of `dtype`."""
        out = torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.packed.device)
        for rows, values in self.blocks():
            out[rows] = values
        return out


def _rows(name: str, tensor: torch.Tensor) -> int:
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or not tensor.shape[0]:
        shown = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ArgumentError(f"{name} is {shown}; expected torch.int8 (N, ceil(K·bits/8))")
    return tensor.shape[0]


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ArgumentError, naming the tensor, unless it has the shape and one of the dtypes."""
    allowed = ", ".join(map(str, dtypes))
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{name} is a {type(tensor).__name__}; expected a tensor, {allowed}, {shape}")
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise ArgumentError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {allowed}, {shape}")


def format_tensor(W_dtype: str, group_size: int, zeros_mode: str | None = None) -> torch.Tensor:
    """Say, in a tensor that travels with packed weights, what they are.

    Parameters
    ----------
    W_dtype : str
        Name of the format; aliases are resolved.
    group_size : int
        How many consecutive columns share a scale; -1: all.
    zeros_mode : str, optional
        One of `ZEROS_MODES`; None where there are no zero points.

    Returns
    -------
    torch.Tensor
        uint8 (128,): a JSON object in ASCII, keys sorted, filled up with spaces. It holds the arguments and `version`, 1.

    Raises
    ------
    ArgumentError
        A group size or a mode that is not allowed.
    ConfigError
        No format has that name.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ArgumentError(f"group_size is {group_size!r}; allowed: -1 and integers of at least 1")
    if zeros_mode is not None and zeros_mode not in ZEROS_MODES:
        raise ArgumentError(f"zeros_mode is {zeros_mode!r}; allowed: None, {', '.join(ZEROS_MODES)}")
    fields = {"W_dtype": parse_format(W_dtype).name, "group_size": group_size, "zeros_mode": zeros_mode, "version": 1}
    text = json.dumps(fields, sort_keys=True).encode("ascii")
    return torch.tensor(list(text.ljust(FORMAT_BYTES)), dtype=torch.uint8, device="cpu")


def parse_format_tensor(tensor: torch.Tensor) -> dict[str, object]:
    """Read what `format_tensor` wrote.

    Returns
    -------
    dict
        `W_dtype` (str), `group_size` (int) and `zeros_mode` (str or None), to be handed to `format_tensor` again.

    Raises
    ------
    ArgumentError
        Anything that `format_tensor` of this version does not write.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dtype is not torch.uint8 or tensor.shape != (FORMAT_BYTES,):
        shape = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else repr(tensor)
        raise ArgumentError(f"format is {shape}; expected torch.uint8, ({FORMAT_BYTES},)")
    text = bytes(tensor.tolist())
    shown = repr(text.rstrip(b" "))
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ArgumentError(f"format holds {shown}; expected a JSON object, filled up with spaces")
    if fields.pop("version", None) != 1:
        raise ArgumentError(f"format holds {shown}; expected version 1, others are not known here")
    if set(fields) == {"W_dtype", "group_size", "zeros_mode"} and fields["W_dtype"] in list(FORMATS):
        try:
            known = bytes(format_tensor(**fields).tolist()) == text
        except ArgumentError as error:
            raise ArgumentError(f"format holds {shown}: {error}") from error
        if known:
            return fields
    raise ArgumentError(
        f"format holds {shown}; expected W_dtype (the name of a format), group_size, zeros_mode and version, written by "
        f"`format_tensor` (ASCII, sorted keys)"
    )
