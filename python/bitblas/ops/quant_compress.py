"""QuantCompress: values of few bits, joined into bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from .. import packing
from ..config import check_dtype_name, check_size
from ..errors import ArgumentError, ConfigError
from .weight_operator import WeightOperator, alike, check_choice, torch_dtype

_DTYPES = ("int8", "uint8", "int32", "uint32")


@dataclass(frozen=True)
class QuantCompressConfig:
    """What `QuantCompress` joins.

    Parameters
    ----------
    M, N : int
        Shape of the input; a row of N values fills elements of `storage_dtype`.
    input_dtype, storage_dtype : str
        Dtypes of the input and of the result: int8, uint8, int32 or uint32.
    dequantize_bits : int
        Bits of a value: 1, 2, 4 or 8.

    Raises
    ------
    ConfigError
        A value is not allowed, or a row does not fill elements.
    """

    M: int
    N: int
    input_dtype: str = "int8"
    storage_dtype: str = "int8"
    dequantize_bits: int = 4

    def __post_init__(self) -> None:
        for name in ("M", "N"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        for name in ("input_dtype", "storage_dtype"):
            object.__setattr__(self, name, check_dtype_name(name, getattr(self, name), _DTYPES))
        check_choice("dequantize_bits", self.dequantize_bits, (1, 2, 4, 8))
        if self.N % self.values_per_element:
            raise ConfigError(
                f"N is {self.N}; it must be a multiple of {self.values_per_element}, the values of {self.dequantize_bits} bits "
                f"in an element of {self.storage_dtype}"
            )

    @property
    def values_per_element(self) -> int:
        """Values that an element of the result holds."""
        return torch_dtype(self.storage_dtype).itemsize * 8 // self.dequantize_bits


class QuantCompress(WeightOperator[QuantCompressConfig]):
    """Joins the values of each row into elements of the storage dtype, the first in the lowest bits.

    Input: M·N values of the input dtype, in any shape. Result: (M, N / values per element), see `retrieve_qweight_shape`.
    Values are not masked, as with `bitblas.quantization.general_compress`. Parameters: see `WeightOperator`.
    """

    config_class = QuantCompressConfig
    default_name = "quant_compress"

    M = property(lambda self: self.config.M)
    N = property(lambda self: self.config.N)
    input_dtype = property(lambda self: self.config.input_dtype)
    storage_dtype = property(lambda self: self.config.storage_dtype)
    dequantize_bits = property(lambda self: self.config.dequantize_bits)

    def retrieve_qweight_shape(self) -> tuple[int, int]:
        """Shape of the result."""
        return self.config.M, self.config.N // self.config.values_per_element

    def _input_shape(self) -> tuple[int, ...]:
        return self.config.M, self.config.N

    def _input_dtypes(self) -> tuple[torch.dtype, ...]:
        return alike(torch_dtype(self.config.input_dtype))

    def _output_dtypes(self) -> tuple[torch.dtype, ...]:
        return alike(torch_dtype(self.config.storage_dtype))

    def _check_shape(self, inp: torch.Tensor) -> None:
        if inp.numel() != prod(self._input_shape()):
            raise ArgumentError(
                f"inp has shape {tuple(inp.shape)}; it must have M x N = {self._input_shape()} elements"
            )

    def _compute(self, inp: torch.Tensor) -> torch.Tensor:
        joined = packing.join_values(inp.reshape(self._input_shape()), self.config.dequantize_bits, "inp")
        return joined.view(torch_dtype(self.config.storage_dtype))


__all__ = ["QuantCompress", "QuantCompressConfig"]
