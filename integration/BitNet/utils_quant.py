"""BitNet-b1.58's layers: float ones that quantize at each call, and packed ones on the int8 × int2 operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bitblas import nn
from bitblas.codecs import QuantizedWeight
from bitblas.codecs.ternary import TernaryScheme, to_ternary
from bitblas.errors import ArgumentError, ConfigError
from bitblas.nn.straight_through import row_steps

if TYPE_CHECKING:
    from typing_extensions import Self

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
    scale = TernaryScheme(None).scale(weight.reshape(1, -1), EPS).view(())
    return to_ternary(weight.float() / scale), scale


def quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of activations (..., K), whole numbers in float32, and their scales (..., 1), as the operator has them."""
    scale = row_steps(x.float(), EPS)
    return (x.float() / scale).round(), scale


def ternary_by(weight: torch.Tensor, scheme: TernaryScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a weight (N, K), -1, 0 or 1 in float32, and the scales of a scheme, float32 as a packed layer holds them.

    Raises
    ------
    ArgumentError
        The weight holds a NaN or an infinity.
    """
    scale = scheme.scale(weight, EPS)
    if not bool(scale.isfinite().all()):
        raise ArgumentError("the weight holds a NaN or an infinity")
    return to_ternary(weight.float() / scheme.spread(scale)), scheme.held(scale, weight.dtype)


class _BitNetLinear(nn.BitLinear):
    """What both layers are: `bitblas.BitLinear` with an eps of 1e-5, however it is made."""

    weight_bits, input_bits = 1, 8
    #: What may share a scale.
    quant_types: ClassVar[tuple[str, ...]] = ("ai8pc_wpt",)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear) -> Self:  # type: ignore[override]  # without what is no choice here
        """A layer that holds the very parameters of a torch layer, with one scale, as of `bitblas.BitLinear`."""
        return super().from_linear(linear, "ai8pc_wpt", EPS)  # type: ignore[return-value]  # of this class

    @classmethod
    def from_ternary(  # type: ignore[override]  # likewise
        cls,
        codes: torch.Tensor | QuantizedWeight,
        scale: torch.Tensor | float | None = None,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A packed layer with given weights, as of `bitblas.BitLinear`; ConfigError where the class has no such scales."""
        made = super().from_ternary(codes, scale, bias, eps=EPS, dtype=dtype, device=device)
        cls.check_quant_type(made.quant_type)
        return made  # type: ignore[return-value]  # of this class

    @classmethod
    def check_quant_type(cls, quant_type: str) -> None:
        """Raise ConfigError unless it is one of `quant_types`."""
        if quant_type not in cls.quant_types:
            allowed = " and ".join(map(repr, cls.quant_types))
            raise ConfigError(f"quant_type is {quant_type!r}; of {cls.__name__} allowed: {allowed}")


class BitLinear(_BitNetLinear):
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


class BitLinearBitBLAS(_BitNetLinear):
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
        ``"ai8pc_wpt"``, one scale, or ``"ai8pc_wpc"``, one for each row, as joined layers have them.
    device, dtype
        As of `torch.nn.Linear`.

    Attributes
    ----------
    weight : torch.nn.Parameter
        (N, K), before the weights are packed.
    qweight : torch.Tensor
        int8 (N, ceil(K / 4)), afterwards: in the layout that the kernels of this device read; in a `state_dict` packed.
    sw : torch.Tensor
        float64 (1,) or (N,), afterwards: one over the scales, as in the original BitBLAS. A state_dict holds it; in float32 it
        would not say which scale it is of.

    Raises
    ------
    ConfigError
        Other numbers of bits, another `quant_type`, or another dtype than float32, float16 and bfloat16.
    """

    quant_types = ("ai8pc_wpt", "ai8pc_wpc")

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
        self.check_quant_type(quant_type)
        super().__init__(in_features, out_features, bias, EPS, quant_type, device, dtype)

    @classmethod
    def from_bit_linear(cls, bitlinear: Any, weight_group: int | Sequence[int] = 1) -> BitLinearBitBLAS:
        """A packed layer of a float one, which stays as it is.

        Parameters
        ----------
        bitlinear : torch.nn.Module
            With `weight` (N, K) in float32, float16 or bfloat16, and `bias`, (N,) or None. A `bitblas.BitLinear` is followed in
            what shares a scale.
        weight_group : int or sequence of int
            Into how many parts of equal numbers of rows the weight is divided, or how many rows each has: those of projections
            that were joined, such as q, k and v. Each part has a mean magnitude, and so a scale, of its own; where there are
            several parts, scales are rounded to the weight's dtype.

        Raises
        ------
        ArgumentError
            The parts do not make up the rows, the layer is packed already, or its weight holds a NaN or an infinity.
        ConfigError
            Another dtype, or a `bitblas.BitLinear` with another eps than 1e-5, or with scales that this class does not have.
        """
        scheme = cls._scheme_of(bitlinear)
        weight, bias = bitlinear.weight.detach(), getattr(bitlinear, "bias", None)
        rows = rows_of_parts(weight.shape[0], weight_group)
        parts = [ternary_by(part, scheme) for part in weight.split(rows)]
        codes = torch.cat([codes for codes, _ in parts])
        scales = torch.cat([scale.view(-1).expand(count) for (_, scale), count in zip(parts, rows, strict=True)])
        made = cls.from_ternary(codes, scales, None if bias is None else bias.detach(), dtype=weight.dtype)
        return made.train(bitlinear.training)

    @classmethod
    def _scheme_of(cls, bitlinear: Any) -> TernaryScheme:
        """What shares a scale in a layer that is to be packed."""
        if not isinstance(bitlinear, nn.BitLinear):
            return TernaryScheme(None)
        if bitlinear.deployed:
            raise ArgumentError("the layer is packed already")
        cls.check_quant_type(bitlinear.quant_type)
        if bitlinear.eps != EPS:
            raise ConfigError(
                f"eps is {bitlinear.eps}; of {cls.__name__} it is {EPS}. deploy() packs the layer as it is"
            )
        return TernaryScheme.parse(bitlinear.quant_type)

    @torch.no_grad()
    def post_process_weights(self) -> None:
        """Pack the float weights that were loaded, and free them.

        Raises
        ------
        ArgumentError
            They hold a NaN or an infinity.
        """
        self.deploy()

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
        return self.w_scale.detach().double().reciprocal().view(-1)

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

        Raises
        ------
        ArgumentError
            The weight holds a NaN or an infinity.
        """
        if self.deployed:
            codes, scales = self.unpacked()
        else:
            scheme = TernaryScheme.parse(self.quant_type)
            codes, scales = ternary_by(self.weight, scheme)
        return torch.nn.functional.linear(activation_quant(input), (codes * scales).to(input.dtype), self.bias)

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
        twice = [
            f"{prefix}{name} and {prefix}{own}"
            for name, own in _NAMES.items()
            if prefix + name in state_dict and prefix + own in state_dict
        ]
        if twice:
            error_msgs.append(f"the same tensor is there twice: {', '.join(twice)}")
            return
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
        scale, shape = sw.detach().double().reciprocal().float(), self.config.scale_shape
        return scale.expand(shape).contiguous() if scale.numel() == 1 else scale.view(-1, 1)


def rows_of_parts(n: int, weight_group: int | Sequence[int]) -> list[int]:
    """How many rows each part of a weight of n has; see `BitLinearBitBLAS.from_bit_linear`."""
    if isinstance(weight_group, int):
        rows = [n // weight_group] * weight_group if weight_group > 0 else []
    else:
        rows = list(weight_group)
    if sum(rows) != n or min(rows, default=0) < 1:
        raise ArgumentError(f"weight_group is {weight_group!r}, which does not make up {n} rows")
    return rows
