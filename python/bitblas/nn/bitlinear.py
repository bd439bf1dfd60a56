"""BitLinear: a layer with ternary weights, from training to deployment."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.utils.parametrize import is_parametrized

from .. import packing
from ..codecs import QuantizedWeight
from ..codecs.ternary import TERNARY, TernaryScheme, check_codes, scheme_of, to_ternary
from ..config import DEFAULT_BUCKETS, MatmulConfig, check_eps, check_flag, check_size
from ..errors import ArgumentError, ConfigError
from .deployed import DeployedLayer
from .layer import under_autocast
from .state import FLOATS, fit_tensor, packed_layout, relay
from .straight_through import ternary_linear

if TYPE_CHECKING:
    from typing_extensions import Self

#: Rows that have kernels of their own. That of 16 computes eight at a time, for which 2 and 4 would have to wait.
_BUCKETS = (*DEFAULT_BUCKETS[:1], 2, 4, *DEFAULT_BUCKETS[1:])

_DTYPES = tuple(getattr(torch, name) for name in FLOATS)


class BitLinear(DeployedLayer):
    """y = x · Wᵀ (+ bias) with weights in {-1, 0, 1}, and activations rounded to int8 on the way.

    In training the layer has the parameters `weight` (N, K) and `bias` (N,). Each call rounds both operands, in float32::

        s = max(max |x| of the row, eps) / 127      q = rint(x / s)
        t = max(mean |W|, eps)                      w = clamp(rint(W / t), -1, 1)
        y = (q · wᵀ) · (t · s) + bias

    and gradients pass both roundings as if they were not there (straight-through). `deploy` replaces the parameters by two
    bits for each weight; then a call is one kernel, which computes the same.

    Parameters
    ----------
    in_features, out_features : int
        K and N, at least 1.
    bias : bool
        Whether a bias is added.
    eps : float
        See above; at least 2^-119.
    quant_type : str
        What shares a scale: ``ai8pc``, int8 activations, those of a row; with ``_wpt`` all weights (t is one number), with
        ``_wpc`` those of an output channel, with ``_wpg`` each 128 in_features of one, with ``_wpg64`` each 64, and so on.
    device, dtype
        Of the parameters: float32, float16 or bfloat16, which x and y have, too; None: torch's defaults.

    Attributes
    ----------
    w_packed : torch.Tensor
        When deployed: int8 (N, ceil(K / 4)), in the layout that the kernels of this device read; in a `state_dict` packed.
    w_scale : torch.Tensor
        When deployed: t, for ``wpt`` float32 (1,); else (N, 1) or (N, K / group) in the layer's dtype.
    bias : torch.Tensor or None
        (N,): a parameter in training, a buffer when deployed.
    format : torch.Tensor
        When deployed: uint8 (128,), names the format of `w_packed`.

    A `state_dict` of a deployed layer loads into any layer of its shape, which is deployed then. What is said of devices and
    dtypes of `Linear` holds for deployed layers.

    Raises
    ------
    ConfigError
        A value is not allowed.
    """

    _scale_name: ClassVar[str] = "w_scale"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-6,
        quant_type: str = "ai8pc_wpt",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._reset(in_features, out_features, bias, eps, quant_type, dtype or torch.get_default_dtype())
        place = {"device": device, "dtype": getattr(torch, self._asked.A_dtype)}
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **place))
        made = torch.nn.Parameter(torch.empty(out_features, **place)) if self._asked.with_bias else None
        self.register_parameter("bias", made)
        self.reset_parameters()

    def _reset(self, k: int, n: int, bias: bool, eps: float, quant_type: str, dtype: torch.dtype) -> None:
        """All but the tensors."""
        name = str(dtype).removeprefix("torch.")
        if name not in FLOATS:
            raise ConfigError(f"dtype is {dtype}; allowed: {', '.join(FLOATS)}")
        self._scheme = TernaryScheme.parse(quant_type)
        group = self._scheme.group or -1
        if group > 0 and check_size("in_features", k) % group:
            raise ConfigError(f"quant_type is {quant_type!r}; its groups of {group} do not divide in_features {k}")
        self._begin_training()
        self._options = (True, False)
        #: the question of the kernels, with the dtype that the layer was made with
        self._asked = MatmulConfig(
            M=_BUCKETS,
            N=check_size("out_features", n),
            K=check_size("in_features", k),
            A_dtype=name,
            W_dtype=TERNARY,
            out_dtype=name,
            accum_dtype="float32",
            with_bias=check_flag("bias", bias),
            group_size=group,
            with_scaling=True,
            dynamic_quantization="row",
            activation_eps=check_eps("eps", eps),
            scale_per_tensor=self._scheme.group is None,
        )

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `torch.nn.Linear` does: uniform between ±1/√K.

        Raises
        ------
        ArgumentError
            The layer is deployed.
        """
        if self.deployed:
            raise ArgumentError("the layer is deployed: it has no parameters")
        bound = 1 / math.sqrt(self.in_features)
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, quant_type: str = "ai8pc_wpt", eps: float = 1e-6) -> BitLinear:
        """A layer to be trained that holds the very parameters of a torch layer, which it shares with it.

        Parameters
        ----------
        linear : torch.nn.Linear
            Of float32, float16 or bfloat16.
        quant_type, eps
            As of the constructor.

        Raises
        ------
        ArgumentError
            It is no `torch.nn.Linear`.
        ConfigError
            Another dtype, or a value that is not allowed.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise ArgumentError(f"linear is a {type(linear).__name__}; it must be a torch.nn.Linear")
        layer = cls._empty(
            linear.in_features, linear.out_features, linear.bias is not None, eps, quant_type, linear.weight.dtype
        )
        layer.weight = linear.weight  # type: ignore[assignment]  # a parameter as it is
        layer.register_parameter("bias", linear.bias)
        return layer.train(linear.training)

    @classmethod
    def _empty(cls, k: int, n: int, bias: bool, eps: float, quant_type: str, dtype: torch.dtype) -> Self:
        """A layer without tensors."""
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer._reset(k, n, bias, eps, quant_type, dtype)
        return layer

    @classmethod
    def from_ternary(
        cls,
        codes: torch.Tensor | QuantizedWeight,
        scale: torch.Tensor | float | None = None,
        bias: torch.Tensor | None = None,
        *,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> BitLinear:
        """A deployed layer with given weights.

        Parameters
        ----------
        codes : torch.Tensor or QuantizedWeight
            (N, K) of -1, 0 and 1 in any dtype, or an int2 weight without zero points.
        scale : torch.Tensor or float, optional
            One number, (N,), (N, 1) or (N, K / g), which makes the scheme. None: that of a QuantizedWeight, 1 for a tensor.
        bias : torch.Tensor, optional
            (N,); None: that of a QuantizedWeight.
        eps, dtype
            As of the constructor; None: the dtype of the scale, where it is a tensor of one of the three, else float32.
        device : torch.device or str, optional
            None: where the codes are.

        Raises
        ------
        ArgumentError
            Values that are not ternary, or shapes that do not go together.
        """
        if isinstance(codes, QuantizedWeight):
            if codes.W_dtype != TERNARY or codes.zeros is not None or codes.perm is not None:
                raise ArgumentError(f"the weight is {codes.W_dtype}; it must be int2, without zero points and order")
            scale, bias = codes.scales if scale is None else scale, codes.bias if bias is None else bias
            codes = packing.unpack_rows(codes.packed.view(torch.uint8), codes.in_features, 2).to(torch.int8) - 2
        check_codes(codes)
        if bias is not None and not isinstance(bias, torch.Tensor):
            raise ArgumentError(f"bias is a {type(bias).__name__}; it must be a torch.Tensor or None")
        named = isinstance(scale, torch.Tensor) and str(scale.dtype).removeprefix("torch.") in FLOATS
        dtype = dtype or (scale.dtype if named else torch.float32)  # type: ignore[union-attr]
        scheme, factors = scheme_of(1.0 if scale is None else scale, *codes.shape)
        place = torch.device(device) if device is not None else codes.device
        n, k = codes.shape
        layer = cls._empty(k, n, bias is not None, eps, scheme.quant_type, dtype)
        layer._allocate(place)
        layer._fill(codes.to(torch.int8), factors, bias)
        return layer

    # -- what it is ------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> MatmulConfig:
        """That of the kernels which the layer is, or would be, deployed to."""
        if self.deployed:
            return self._operator.config
        name = str(self.weight.dtype).removeprefix("torch.")
        return self._asked if name == self._asked.A_dtype else replace(self._asked, A_dtype=name, out_dtype=name)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return (self._weight if self.deployed else self.weight).device

    in_features = property(lambda self: self._asked.K)
    out_features = property(lambda self: self._asked.N)
    eps = property(lambda self: self._asked.activation_eps)
    quant_type = property(lambda self: self._scheme.quant_type)

    @staticmethod
    def _name_weight(config: MatmulConfig) -> str:
        return "w_packed"

    def extra_repr(self) -> str:
        """What stands in the parentheses of `repr`."""
        asked = self._asked
        parts = [f"in_features={asked.K}, out_features={asked.N}, bias={asked.with_bias}"]
        parts += [f"eps={self.eps}, quant_type={self.quant_type!r}", "deployed" if self.deployed else "training"]
        return ", ".join(parts)

    # -- calling ---------------------------------------------------------------------------------------------------------

    def forward(self, A: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer's output.

        Parameters
        ----------
        A : torch.Tensor
            (..., in_features) in the layer's dtype, on its device; under autocast any float.
        output : torch.Tensor, optional
            Of a deployed layer: (..., out_features) in its dtype, contiguous, to be filled and returned.

        Returns
        -------
        torch.Tensor
            (..., out_features) in the layer's dtype.

        Raises
        ------
        ArgumentError
            A tensor is of the wrong shape, dtype or device.
        BuildError, ArtifactError, UnsupportedError
            By the first call of a deployed layer, as for the constructor of `Matmul`.
        """
        if self._operator is not None:
            return super().forward(A, output)
        if output is not None:
            raise ArgumentError("output was given; a layer fills it when it is deployed")
        weight = self.weight
        if not isinstance(A, torch.Tensor) or not A.dim() or A.shape[-1] != weight.shape[1]:
            found = tuple(A.shape) if isinstance(A, torch.Tensor) else type(A).__name__
            raise ArgumentError(f"A is {found}; it must be a tensor whose last dimension is K = {weight.shape[1]}")
        if under_autocast(A):
            A = A.to(weight.dtype)
        if weight.dtype not in _DTYPES:
            raise ArgumentError(f"the layer's parameters are {weight.dtype}; allowed: {', '.join(map(str, _DTYPES))}")
        if A.dtype is not weight.dtype or A.device != weight.device:
            raise ArgumentError(
                f"A is {A.dtype} on {A.device}; the layer takes {weight.dtype} on {weight.device}, and any float under autocast"
            )
        with torch.autocast(A.device.type, enabled=False):
            return ternary_linear(A, weight, self.bias, self._scheme, self.eps)

    # -- deployment ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def deploy(self) -> Self:
        """Replace the parameters by packed weights, in place; of a layer that is deployed nothing changes.

        Returns
        -------
        BitLinear
            The layer.

        Raises
        ------
        ArgumentError
            The weight holds a NaN or an infinity, the bias what the weight's dtype does not, or one is made of other
            tensors, by a parametrization, pruning or a weight norm.
        ConfigError
            The parameters have another dtype than float32, float16 and bfloat16.
        UnsupportedError
            There are no kernels for the device.
        """
        if self.deployed:
            return self
        if is_parametrized(self):
            raise ArgumentError(
                "the layer is parametrized: torch.nn.utils.parametrize.remove_parametrizations ends that"
            )
        for name in ("weight", "bias"):
            if name not in self._parameters:
                raise ArgumentError(
                    f"{name} is no parameter any more, but made of others, {', '.join(sorted(self._parameters))}: "
                    f"torch.nn.utils.prune.remove and torch.nn.utils.remove_weight_norm end that"
                )
        weight, bias = self.weight.detach(), self.bias
        scale = self._scheme.scale(weight, self.eps)
        if not weight.is_meta and not bool(scale.isfinite().all()):
            raise ArgumentError("the weight holds a NaN or an infinity")
        codes = to_ternary(weight.float() / self._scheme.spread(scale)).to(torch.int8)
        with self._or_as_it_was():
            self._allocate(weight.device)
            self._fill(codes, scale, bias)
        return self

    def _allocate(self, device: torch.device) -> None:
        """Become a deployed layer, with buffers of zeros."""
        config = self.config if "weight" in self._parameters else self._asked
        self._choose(config, device)
        self._end_training()
        shapes = {
            "w_packed": (tuple(self._operator.retrieve_weight_shape()), torch.int8),
            "w_scale": (config.scale_shape, getattr(torch, config.scale_dtype)),
            "bias": ((config.N,) if config.with_bias else None, getattr(torch, config.bias_dtype)),
        }
        for name, (shape, dtype) in shapes.items():
            if shape is not None:
                self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("format", self._expected_format().to(device))
        # those that are None last: see `Linear`
        for name in ("perm", *(() if config.with_bias else ("bias",)), "zeros"):
            self.register_buffer(name, None)

    def _fill(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Put int8 (N, K) codes, a scale and a bias into the buffers."""
        given = {"w_scale": scale} if bias is None else {"w_scale": scale, "bias": bias.detach()}
        ready = {name: fit_tensor(name, t, self._tensor(name), self.device) for name, t in given.items()}
        if not self._weight.is_meta:
            ready["w_packed"] = self._operator.transform_weight(codes).to(self.device)
        for name, tensor in ready.items():
            self._put(name, tensor)

    def to_quantized(self) -> QuantizedWeight:
        """The weight of a deployed layer in the canonical form, on the layer's device, with scales (N, K / group).

        Raises
        ------
        ArgumentError
            The layer is not deployed.
        """
        self._check_deployed()
        config, scale = self.config, self.w_scale
        packed = relay(self._weight, self._operator.layout, packed_layout(config))
        scales = scale.expand(config.N, 1).contiguous() if config.scale_per_tensor else scale
        return QuantizedWeight(TERNARY, packed, config.K, scales, bias=self._tensor("bias"))
