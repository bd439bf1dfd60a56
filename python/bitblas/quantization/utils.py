"""Quantized weights as numpy arrays: packing and interleaving them, and making up some to test with."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import numpy.typing as npt
import torch

from .. import packing
from ..errors import ArgumentError

_BITS = (1, 2, 4, 8)
_TARGET_DTYPES = ("float16", "int8")


def general_compress(
    lowprecision_weight: np.ndarray, source_bits: int = 4, storage_dtype: npt.DTypeLike = np.int8
) -> np.ndarray:
    """Pack the last axis: element k lies at bits k·source_bits, modulo 8, of byte k·source_bits // 8.

    Elements are not masked: what does not fit in `source_bits` bits, as that of a negative value, is OR-ed into the elements
    above it in its byte.

    Parameters
    ----------
    lowprecision_weight : numpy.ndarray
        (..., K) of any dtype of real numbers, float16 included; whole numbers from -128 to 255.
    source_bits : int
        Bits of an element: 1, 2, 4 or 8.
    storage_dtype : dtype
        What the bytes are returned as.

    Returns
    -------
    numpy.ndarray
        (..., K·source_bits / (8·itemsize)) `storage_dtype`, with memory of its own.

    Raises
    ------
    ArgumentError
        No array of numbers, a value that is no byte, a last axis that does not fill elements of `storage_dtype`, or bits or a
        dtype that are not allowed.
    """
    weight = _tensor("lowprecision_weight", lowprecision_weight)
    bits = _bits("source_bits", source_bits)
    dtype = _dtype("storage_dtype", storage_dtype)
    stored = packing.join_values(weight, bits, "lowprecision_weight").numpy()
    if stored.shape[-1] % dtype.itemsize:
        raise ArgumentError(
            f"storage_dtype is {dtype}; the {stored.shape[-1]} bytes of a row are not a multiple of its {dtype.itemsize}"
        )
    return stored.view(dtype)


def interleave_weight(qweight: np.ndarray, nbits: int = 4, target_dtype: str = "float16") -> np.ndarray:
    """Reorder the codes in each 32 bits, so that a decoder finds a code for every lane of a register with one mask.

    Before -> after, for 4 bits and float16, lowest bits first: 0 1 2 3 4 5 6 7 -> 0 2 4 6 1 3 5 7.

    Parameters
    ----------
    qweight : numpy.ndarray
        (..., W) integers, as `general_compress` returns them, whose last axis has a multiple of 4 bytes.
    nbits : int
        Bits of a code: 1, 2, 4 or 8.
    target_dtype : str
        What codes are decoded to: ``"float16"`` or ``"int8"``.

    Returns
    -------
    numpy.ndarray
        int8, with the last axis in bytes and memory of its own.

    Raises
    ------
    ArgumentError
        No array of integers, a last axis that is no multiple of 4 bytes, or bits or a dtype that are not allowed.
    """
    if target_dtype not in _TARGET_DTYPES:
        raise ArgumentError(f"target_dtype is {target_dtype!r}; allowed: {', '.join(_TARGET_DTYPES)}")
    bits, weight = _bits("nbits", nbits), _tensor("qweight", qweight)
    if weight.is_floating_point() or weight.dtype is torch.bool:
        raise ArgumentError(f"qweight has dtype {weight.dtype}; it must be packed integers")
    if not weight.dim() or weight.shape[-1] * weight.element_size() % 4:
        raise ArgumentError(f"qweight has shape {tuple(weight.shape)}; its last axis must have a multiple of 4 bytes")
    sources = packing.interleave_sources(bits, target_dtype)
    return packing.reorder_codes(weight.view(torch.uint8), bits, sources).view(torch.int8).numpy()


def gen_quant4(k: int, n: int, groupsize: int = -1) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """Draw a random weight and quantize it symmetrically: s = max |w| / 8 of a group, q = round(w / s).

    Parameters
    ----------
    k, n : int
        Input and output features.
    groupsize : int
        Number of consecutive k that share a scale, a divisor of k; -1 means all.

    Returns
    -------
    w : torch.Tensor
        (k, n) float16, what was quantized.
    linear : torch.nn.Linear
        Without bias; its weight, (n, k) float16, is the dequantized one, q · s.
    s : torch.Tensor
        (k / groupsize, n) float16 scales.
    q : torch.Tensor
        (k, n) int32 codes, -8 to 8, where the largest weight of a group has a code of 8 or -8.

    All on the CPU.

    Raises
    ------
    ArgumentError
        A size is no integer of at least 1, or `groupsize` does not divide k.
    """
    for name, value in (("k", k), ("n", n)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ArgumentError(f"{name} is {value!r}; it must be an integer of at least 1")
    group = k if isinstance(groupsize, Integral) and groupsize == -1 else groupsize
    if isinstance(group, bool) or not isinstance(group, Integral) or group < 1 or k % group:
        raise ArgumentError(f"groupsize is {groupsize!r}; it must be -1 or a divisor of k = {k}")
    w = torch.randn((k, n), dtype=torch.float16, device="cpu")
    grouped = w.view(k // group, group, n)
    s = grouped.abs().amax(1, keepdim=True) * 0.125
    q = (grouped / s).round().int().clamp(-8, 8)
    linear = torch.nn.Linear(k, n, bias=False, device="cpu")
    linear.weight.data = (q.half() * s).view(k, n).t().contiguous()
    return w, linear, s.view(-1, n), q.view(k, n)


def _bits(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value not in _BITS:
        raise ArgumentError(f"{name} is {value!r}; allowed: {', '.join(map(str, _BITS))}")
    return int(value)


def _dtype(name: str, value: npt.DTypeLike) -> np.dtype:
    try:
        dtype = np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "iuf":
        raise ArgumentError(f"{name} is {value!r}; it must be a numpy dtype of numbers, such as numpy.int8")
    return dtype


def _tensor(name: str, value: object) -> torch.Tensor:
    """The elements of an array as a contiguous tensor, which shares its memory where it can."""
    if not isinstance(value, np.ndarray):
        raise ArgumentError(
            f"{name} is a {type(value).__name__}; it must be a numpy.ndarray (of a tensor: .cpu().numpy())"
        )
    if value.dtype.kind not in "iufb" or value.dtype.itemsize > 8:
        raise ArgumentError(f"{name} has dtype {value.dtype}; it must hold real numbers of at most 64 bits")
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C_CONTIGUOUS", "WRITEABLE"]))
