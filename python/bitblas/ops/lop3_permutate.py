"""LOP3Permutate: packed codes, interleaved for decoders that mask several at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import packing
from ..config import check_dtype_name, check_size
from ..errors import ArgumentError, ConfigError
from .weight_operator import INTEGERS, WeightOperator, alike, as_bytes, check_choice, torch_dtype

_STORAGE_DTYPES = ("int8", "uint8", "int32", "uint32")


@dataclass(frozen=True)
class LOP3PermutateConfig:
    """What `LOP3Permutate` interleaves.

    Parameters
    ----------
    M, N : int
        Rows, and codes of a row, which fill words of 32 bits.
    datatype : str
        What codes are decoded to: float16, bfloat16, int8 or int4.
    storage_dtype : str
        Dtype of the packed codes: int8, uint8, int32 or uint32.
    dequantize_bits : int
        Bits of a code: 1, 2, 4 or 8, and not more than those of `datatype`.

    Raises
    ------
    ConfigError
        A value is not allowed, or a row does not fill words.
    """

    M: int
    N: int
    datatype: str = "float16"
    storage_dtype: str = "int8"
    dequantize_bits: int = 4

    def __post_init__(self) -> None:
        for name in ("M", "N"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        for name, allowed in (("datatype", tuple(packing.LANE_BITS)), ("storage_dtype", _STORAGE_DTYPES)):
            object.__setattr__(self, name, check_dtype_name(name, getattr(self, name), allowed))
        width = packing.LANE_BITS[self.datatype]
        check_choice("dequantize_bits", self.dequantize_bits, [bits for bits in (1, 2, 4, 8) if bits <= width])
        per_word = 32 // self.dequantize_bits
        if self.N % per_word:
            raise ConfigError(
                f"N is {self.N}; it must be a multiple of {per_word}, the codes of {self.dequantize_bits} bits in a word"
            )


class LOP3Permutate(WeightOperator[LOP3PermutateConfig]):
    """Deals the codes of each 32-bit word out to lanes as wide as the dtype that they are decoded to.

    Input: the packed codes of the weight, M·N·bits/8 bytes of any integer dtype and shape. Result: of the same dtype and shape.
    The order is that of `bitblas.quantization.interleave_weight`. Parameters: see `WeightOperator`.
    """

    config_class = LOP3PermutateConfig

    M = property(lambda self: self.config.M)
    N = property(lambda self: self.config.N)
    datatype = property(lambda self: self.config.datatype)
    storage_dtype = property(lambda self: self.config.storage_dtype)
    dequantize_bits = property(lambda self: self.config.dequantize_bits)

    def retrieve_2d_weight_shape(self) -> tuple[int, int]:
        """Shape of the packed codes in `storage_dtype`."""
        per_element = torch_dtype(self.config.storage_dtype).itemsize * 8 // self.config.dequantize_bits
        return self.config.M, self.config.N // per_element

    def _input_shape(self) -> tuple[int, ...]:
        return self.retrieve_2d_weight_shape()

    def _input_dtypes(self) -> tuple[torch.dtype, ...]:
        usual = alike(torch_dtype(self.config.storage_dtype))
        return *usual, *(dtype for dtype in INTEGERS if dtype not in usual)

    def _output_dtypes(self) -> tuple[torch.dtype, ...]:
        return INTEGERS

    def _check_shape(self, inp: torch.Tensor) -> None:
        expected = self.config.M * self.config.N * self.config.dequantize_bits // 8
        if inp.nbytes != expected:
            raise ArgumentError(
                f"inp has shape {tuple(inp.shape)} and {inp.nbytes} bytes; expected {self.retrieve_2d_weight_shape()} of "
                f"{self.config.storage_dtype}, {expected} bytes"
            )

    def _compute(self, inp: torch.Tensor) -> torch.Tensor:
        bits = self.config.dequantize_bits
        sources = packing.interleave_sources(bits, self.config.datatype)
        moved = packing.reorder_codes(as_bytes(inp.contiguous()), bits, sources)
        return moved.view(inp.dtype).view(inp.shape)


__all__ = ["LOP3Permutate", "LOP3PermutateConfig"]
