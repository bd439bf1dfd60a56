"""BitNet-b1.58's layers: float ones that quantize at each call, and packed ones on the int8 × int2 operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from bitblas import nn
from bitblas.errors import ArgumentError, ConfigError

#: The least mean magnitude of a weight, and the least magnitude of a row of activations, that are divided by.
EPS = 1e-5
#: What a state_dict calls the tensors of a packed layer, and what `bitblas.BitLinear` does.
_NAMES = {"qweight": "w_packed", "sw": "w_scale"}


def weight_quant(weight: torch.Tensor, num_bits: int = 1) -> torch.Tensor:
    """Round a weight to -1, 0 or 1 times its mean magnitude.

    Parameters
    ----------
    weight : torch.Tensor
        Any shape, floating-point.
    num_bits : int
        1, BitNet's name for three values.

    Returns
    -------
    torch.Tensor
        Of the weight's shape and dtype. s = max(mean|w|, 1e-5) and w/s, rounded to nearest, are float32.

    Raises
    ------
    ConfigError
        Another number of bits.
    """
    check_bits(num_bits, 8)
    codes, scale = ternary(weight)
    return (codes * scale).to(weight.dtype)


def activation_quant(x: torch.Tensor, num_bits: int = 8) -> torch.Tensor:
    """Round activations to multiples of a 127th of the largest of their row.

    Parameters
    ----------
    x : torch.Tensor
        (..., K), floating-point.
    num_bits : int
        8.

    Returns
    -------
    torch.Tensor
        Of the shape and dtype of x. s = max(max|x|, 1e-5)/127, of a row, and x/s, rounded to nearest, are float32.

    Raises
    ------
    ConfigError
        Another number of bits.
    """
    check_bits(1, num_bits)
    codes, scale = quantized_rows(x)
    return (codes * scale).to(x.dtype)


def check_bits(weight_bits: int, input_bits: int) -> None:
    """Raise ConfigError unless weights are ternary, which BitNet calls 1 bit, and activations int8."""
    if (weight_bits, input_bits) != (1, 8):
        raise ConfigError(f"weight_bits is {weight_bits!r} and input_bits {input_bits!r}; allowed: 1 (ternary) and 8")


def ternary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a weight, -1, 0 or 1 in float32, and their scale, float32 without dimensions."""
    weight = weight.float()
    scale = weight.abs().mean().clamp(min=EPS)
    return (weight / scale).round().clamp(-1, 1), scale


def quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of activations (..., K), whole numbers in float32, and their scales (..., 1), as the operator has them."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    scale = largest / largest.new_full((), 127)  # a number of Python's would be multiplied by its reciprocal on cards
    return (x / scale).round(), scale


class BitLinear(nn.BitLinear):
    """A float layer to be trained: `bitblas.BitLinear` with BitNet's numbers, one scale for all weights and an eps of 1e-5.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As of `torch.nn.Linear`.
    weight_bits, input_bits : int
        1 and 8.

    Raises
    ------
    ConfigError
        Other numbers of bits, or another dtype than float32, float16 and bfloat16.
    """

    weight_bits, input_bits = 1, 8

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_bits: int = 1,
        input_bits: int = 8,
    ) -> None:
        check_bits(weight_bits, input_bits)
        super().__init__(in_features, out_features, bias, eps=EPS, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, quant_type: str = "ai8pc_wpt", eps: float = EPS) -> BitLinear:
        """A layer that holds the very parameters of a torch layer, as of `bitblas.BitLinear`."""
        return super().from_linear(linear, quant_type, eps)  # type: ignore[return-value]  # of this class


class BitLinearBitBLAS(nn.BitLinear):
    """A layer for inference: float until `post_process_weights`, then two bits for each weight, and one kernel a call.

    Parameters
    ----------
    in_features, out_features : int
        K and N.
    bias : bool
        Whether a bias is added.
    weight_bits, input_bits : int
        1 and 8.
    quant_type : str
        As of `bitblas.BitLinear`: ``"ai8pc_wpt"``, one scale, or ``"ai8pc_wpc"``, one for each row, as joined layers have them.
    device, dtype
        As of `torch.nn.Linear`.

    Attributes
    ----------
    weight : torch.nn.Parameter
        (N, K), before the weights are packed.
    qweight : torch.Tensor
        int8 (N, ceil(K / 4)), afterwards: in the layout that the kernels of this device read; in a `state_dict` packed.
    sw : torch.Tensor
        float32 (1,) or (N,), afterwards: one over the scales, as in the original BitBLAS. A state_dict holds it.

    Raises
    ------
    ConfigError
        Other numbers of bits, or another dtype than float32, float16 and bfloat16.
    """

    weight_bits, input_bits = 1, 8

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        weight_bits: int = 1,
        input_bits: int = 8,
        *,
        quant_type: str = "ai8pc_wpt",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_bits(weight_bits, input_bits)
        super().__init__(in_features, out_features, bias, EPS, quant_type, device, dtype)

    @classmethod
    def from_bit_linear(cls, bitlinear: Any, weight_group: int | Sequence[int] = 1) -> BitLinearBitBLAS:
        """A packed layer of a float one, which stays as it is.

        Parameters
        ----------
        bitlinear : torch.nn.Module
            With `weight` (N, K) in float32, float16 or bfloat16, and `bias`, (N,) or None.
        weight_group : int or sequence of int
            Into how many parts of equal numbers of rows the weight is divided, or how many rows each has: those of projections
            that were joined, such as q, k and v. Each part has a mean magnitude, and so a scale, of its own; where there are
            several parts, scales are rounded to the weight's dtype.

        Raises
        ------
        ArgumentError
            The parts do not make up the rows.
        ConfigError
            Another dtype.
        """
        weight, bias = bitlinear.weight.detach(), getattr(bitlinear, "bias", None)
        rows = rows_of_parts(weight.shape[0], weight_group)
        parts = [ternary(part) for part in weight.split(rows)]
        codes = torch.cat([codes for codes, _ in parts])
        scales = torch.cat([scale.expand(count) for (_, scale), count in zip(parts, rows, strict=True)])
        made = cls.from_ternary(
            codes, kept_by_sw(scales), None if bias is None else bias.detach(), eps=EPS, dtype=weight.dtype
        )
        return made.train(bitlinear.training)  # type: ignore[return-value]  # of this class

    @torch.no_grad()
    def post_process_weights(self) -> None:
        """Pack the float weights that were loaded, and free them.

        Raises
        ------
        ArgumentError
            They hold a NaN or an infinity.
        """
        self.deploy()

    def deploy(self) -> BitLinearBitBLAS:
        """As of `bitblas.BitLinear`."""
        if not self.deployed:
            super().deploy()
            self.w_scale.copy_(kept_by_sw(self.w_scale))
        return self

    def replace_weight_param_with_qweight(self) -> None:
        """Drop the float weight, so that `qweight` and `sw` of a packed checkpoint can be loaded."""
        self.deploy()

    @property
    def qweight(self) -> torch.Tensor:
        """See the class."""
        return self.w_packed

    @property
    def sw(self) -> torch.Tensor:
        """See the class."""
        return self.w_scale.detach().float().reciprocal().view(-1)

    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of a packed layer, float32 (N, K) of -1, 0 and 1, and its scales, float32 (N, 1)."""
        weight = self.to_quantized()
        ones = torch.ones_like(weight.scales, dtype=torch.float32)
        return replace(weight, scales=ones, bias=None).dequantize(), weight.scales.float()

    def native_forward(self, input: torch.Tensor) -> torch.Tensor:
        """The same in torch, with operands that were rounded to the layer's dtype: to compare with.

        Parameters
        ----------
        input : torch.Tensor
            (..., K) in the layer's dtype.

        Returns
        -------
        torch.Tensor
            (..., N), likewise.
        """
        if self.deployed:
            codes, scales = self.unpacked()
            weight = (codes * scales).to(input.dtype)
        else:
            weight = weight_quant(self.weight)
        return torch.nn.functional.linear(activation_quant(input), weight, self.bias)

    # -- a state_dict's names ----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.deployed:
            destination[prefix + "qweight"] = destination.pop(prefix + "w_packed")
            destination.pop(prefix + "w_scale")
            destination[prefix + "sw"] = self.sw

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for name, own in _NAMES.items():
            tensor = given.pop(prefix + name, None)
            if isinstance(tensor, torch.Tensor):
                given[prefix + own] = tensor if name == "qweight" else self._scale_of(tensor)
        missing: list[str] = []
        errors: list[str] = []
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing, unexpected_keys, errors)
        for name, own in _NAMES.items():
            missing = [prefix + name if key == prefix + own else key for key in missing]
            errors = [text.replace(own, name) for text in errors]
        missing_keys += missing
        error_msgs += errors

    def _scale_of(self, sw: torch.Tensor) -> torch.Tensor:
        """The scales of a `sw`, in the shape of those of this layer where there are as many, or one for all rows."""
        scale, shape = sw.detach().float().reciprocal(), self.config.scale_shape
        return scale.expand(shape).contiguous() if scale.numel() == 1 else scale.view(-1, 1)


def kept_by_sw(scale: torch.Tensor) -> torch.Tensor:
    """The nearest scale that one over one over it is, in float32: so that `sw` keeps it."""
    return scale.float().reciprocal().reciprocal()


def rows_of_parts(n: int, weight_group: int | Sequence[int]) -> list[int]:
    """How many rows each part of a weight of n has; see `BitLinearBitBLAS.from_bit_linear`."""
    if isinstance(weight_group, int):
        rows = [n // weight_group] * weight_group if weight_group > 0 else []
    else:
        rows = list(weight_group)
    if sum(rows) != n or min(rows, default=0) < 1:
        raise ArgumentError(f"weight_group is {weight_group!r}, which does not make up {n} rows")
    return rows
