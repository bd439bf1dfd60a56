"""GPTQ checkpoints, of AutoGPTQ and GPTQModel: words along K, act-order, zero points stored minus one or not."""

from __future__ import annotations

import torch

from .. import packing
from ..errors import ArgumentError
from .unsigned import all_middle, check_choice, check_scales, check_words, sort_groups, weight_of_words
from .weight import QuantizedWeight, check_tensor
from .words import permute_codes, repeat_field

_BITS, _VERSIONS = (2, 3, 4, 8), (1, 2)


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    bits: int = 4,
    version: int = 1,
    sym: bool | None = None,
    bias: torch.Tensor | None = None,
    zeros_mode: str | None = None,
) -> QuantizedWeight:
    """Repack a linear layer of a GPTQ checkpoint.

    Parameters
    ----------
    qweight : torch.Tensor
        int32 (K·bits/32, N): codes packed along K, little-endian.
    qzeros : torch.Tensor
        int32 (G, N·bits/32): zero points packed along N.
    scales : torch.Tensor
        (G, N), float16, bfloat16 or float32.
    g_idx : torch.Tensor, optional
        int32 or int64 (K,): the group of each column. In order it says nothing; else (act-order) columns are sorted by it.
    bits : int
        2, 3, 4 or 8.
    version : int
        1: zero points are stored minus one (checkpoint_format "gptq"), for 2, 4 and 8 bits as GPTQModel does it, which takes 1
        from all of the fields of a word at once, borrowing where a zero point is 0; 2: as they are ("gptq_v2").
    sym : bool, optional
        True: all zero points have to be 2^(bits-1).
    bias : torch.Tensor, optional
        (N,), any floating-point dtype.
    zeros_mode : str, optional
        ``"quantized"``, ``"original"`` or ``"rescale"``. None: no zero points and an int format where all of them are
        2^(bits-1), else ``"quantized"``.

    Returns
    -------
    QuantizedWeight
        uint{bits}, or int{bits} without zero points.

    Raises
    ------
    ArgumentError
        A shape, dtype or value that is not as above, or groups of unequal size.
    """
    check_choice("bits", bits, _BITS)
    check_choice("version", version, _VERSIONS)
    if sym is not None and not isinstance(sym, bool):
        raise ArgumentError(f"sym is {sym!r}; allowed: None, True, False")
    k, n = _sizes(qweight, bits)
    groups = check_scales("scales", scales, n, k, axis=0)
    check_words("qzeros", qzeros, f"({groups}, {n * bits // 32})")
    check_tensor("qzeros", qzeros, (groups, n * bits // 32), (torch.int32,))
    order = None if g_idx is None else sort_groups("g_idx", g_idx, k, groups)
    zeros = _zero_points(qzeros, n, bits, version)
    if sym and not all_middle(zeros, n, bits):
        raise ArgumentError(f"qzeros holds zero points that are not {1 << (bits - 1)}; with sym=True all must be")
    rows = (
        qweight.t().clone(memory_format=torch.contiguous_format)
        if order is None
        else permute_codes(qweight, order, bits)
    )
    return weight_of_words(rows, k, bits, scales.t(), zeros, zeros_mode, order, bias)


def _sizes(qweight: torch.Tensor, bits: int) -> tuple[int, int]:
    """K and N."""
    check_words("qweight", qweight, f"(K·{bits}/32, N)")
    height, n = qweight.shape
    if height * 32 % bits:
        raise ArgumentError(
            f"qweight has shape {tuple(qweight.shape)}; codes of {bits} bits come in units of {bits} words, of which {height} "
            f"rows are no multiple"
        )
    if n * bits % 32:
        raise ArgumentError(
            f"qweight has shape {tuple(qweight.shape)}; zero points of {bits} bits fill words only where N is a multiple of "
            f"{32 if 32 % bits else 32 // bits}"
        )
    return height * 32 // bits, n


def _zero_points(qzeros: torch.Tensor, n: int, bits: int, version: int) -> torch.Tensor:
    """Packed zero points, int8 (G, n·bits/8).

    Version 1 says z - 1 for a zero point z, and has no room for z = 0. GPTQModel, which writes it for asymmetric weights,
    subtracts 1 from all fields of an int32 at once, and adds it so when it reads (`convert_gptq_v1_to_v2_format`): what a z of
    0 borrows from the fields above it is given back. We add so, too, for 2, 4 and 8 bits: it restores what GPTQModel wrote, and
    is z = stored + 1 wherever there was no z of 0, as in all that is documented. With 3 bits, whose fields cross words,
    GPTQModel goes field by field, modulo 8, and so do we.
    """
    qzeros = qzeros.contiguous()
    if version == 2:
        return qzeros.view(torch.int8)
    if 32 % bits == 0:
        return (qzeros + repeat_field(1, bits)).view(torch.int8)
    codes = packing.unpack_rows(qzeros.view(torch.uint8), n, bits)
    return packing.pack_rows((codes + 1) & ((1 << bits) - 1), bits).contiguous().view(torch.int8)


def from_gptq_module(module: torch.nn.Module, version: int = 1, zeros_mode: str | None = None) -> QuantizedWeight:
    """Repack a QuantLinear of AutoGPTQ or GPTQModel.

    Parameters
    ----------
    module : torch.nn.Module
        With the attributes `bits`, `qweight`, `qzeros` and `scales`, and maybe `g_idx` and `bias`, each of which may be None.
    version : int
        Of its zero points, see `from_gptq`; GPTQModel's layers hold those of version 2 as soon as they are loaded.
    zeros_mode : str, optional
        See `from_gptq`.

    Raises
    ------
    ArgumentError
        As `from_gptq`, or the module lacks an attribute or is packed in planes (GPTQModel's format "gptq_p").
    """
    found = {}
    for name in ("bits", "qweight", "qzeros", "scales"):
        if getattr(module, name, None) is None:
            raise ArgumentError(f"module is a {type(module).__name__} without {name}; expected a QuantLinear of GPTQ")
        found[name] = getattr(module, name)
    if getattr(module, "planar", False):
        raise ArgumentError(f"module is a {type(module).__name__} packed in planes (gptq_p); allowed: gptq and gptq_v2")
    g_idx, bias = getattr(module, "g_idx", None), getattr(module, "bias", None)
    if g_idx is not None and not g_idx.numel():
        g_idx = None
    held = {name: part.detach() for name, part in found.items() if name != "bits"}
    bias = None if bias is None else bias.detach()
    return from_gptq(**held, g_idx=g_idx, bits=found["bits"], version=version, bias=bias, zeros_mode=zeros_mode)
