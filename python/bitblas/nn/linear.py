"""Linear: a layer with a quantized weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..codecs import QuantizedWeight
from ..codecs.gptq import from_gptq_module
from ..codecs.rounding import quantize
from ..config import DEFAULT_BUCKETS, MatmulConfig, check_buckets, check_flag, check_size
from ..errors import ArgumentError
from .layer import QuantizedLayer
from .state import FLOATS, describe, fit_tensor, packed_layout, relay


class Linear(QuantizedLayer):
    """y = x · dequantize(W)ᵀ (+ bias), with the weight in 1 to 16 bits, in buffers.

    Parameters
    ----------
    in_features, out_features : int
        K and N, at least 1.
    bias : bool
        Whether a bias is added.
    A_dtype, W_dtype, accum_dtype, out_dtype, group_size, with_scaling, with_zeros, zeros_mode, dynamic_quantization,
    activation_eps
        As of `bitblas.MatmulConfig`; None for `with_scaling` means False.
    opt_M : int, sequence of int, or None
        `M` of the config: an int accepts only that many rows.
    enable_tuning : bool
        Use a stored tuning record where there is one. Construction never measures.
    fast_decoding, propagate_b
        Hints of the original BitBLAS: accepted, without effect.
    device : torch.device or str, optional
        Where the buffers are; torch's default device where it is None. On "meta" they have no data.
    dense_cache : bool
        As of `bitblas.Matmul`.
    act_order : bool
        Whether there is a buffer `perm`; `load_state_dict` and `repack_from_gptq` make one where it is needed.

    Attributes
    ----------
    qweight : torch.Tensor
        int8 (N, ceil(K·bits/8)), in the layout that the kernels of this device read; in a `state_dict` packed. Where W_dtype is
        a floating-point dtype, or int8 like A_dtype, it is called `weight` instead, (N, K).
    scales : torch.Tensor or None
        (N, K / group_size) in A_dtype, float32 beside an A of at most 8 bits.
    zeros : torch.Tensor or None
        As scales; for ``zeros_mode="quantized"`` int8 (K / group_size, ceil(N·bits/8)).
    bias : torch.Tensor or None
        (N,).
    perm : torch.Tensor or None
        int32 (K,): the order in which activations are multiplied (act-order).
    format : torch.Tensor or None
        uint8 (128,): names the format of `qweight`, so that a state_dict of another one is refused.

    The kernels are loaded, or built, by the first call; `build_operators` and `warmup` do it ahead. They follow the device:
    `.to()` lays the weight out for the kernels there, exactly. Changing the dtype (`.half()`, `.float()`) changes A_dtype and
    out_dtype, where they are floats, and rounds scales. Gradients flow to x and to the bias; those of `dynamic_quantization`
    are passed straight through the rounding of x.

    Raises
    ------
    ConfigError
        A value is not allowed.
    UnsupportedError
        There are no kernels for the config or the device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        A_dtype: str = "float16",
        W_dtype: str = "float16",
        accum_dtype: str = "float16",
        out_dtype: str = "float16",
        group_size: int = -1,
        with_scaling: bool | None = None,
        with_zeros: bool = False,
        zeros_mode: str | None = None,
        opt_M: int | Sequence[int] | None = DEFAULT_BUCKETS,
        enable_tuning: bool = True,
        fast_decoding: bool | None = None,
        propagate_b: bool = False,
        *,
        device: torch.device | str | None = None,
        dynamic_quantization: str | None = None,
        activation_eps: float | None = None,
        dense_cache: bool = False,
        act_order: bool = False,
    ) -> None:
        super().__init__()
        self._options = (check_flag("enable_tuning", enable_tuning), check_flag("dense_cache", dense_cache))
        config = MatmulConfig(
            M=check_buckets("opt_M", opt_M),
            N=check_size("out_features", out_features),
            K=check_size("in_features", in_features),
            A_dtype=A_dtype,
            W_dtype=W_dtype,
            out_dtype=out_dtype,
            accum_dtype=accum_dtype,
            with_bias=check_flag("bias", bias),
            group_size=group_size,
            with_scaling=with_scaling,  # type: ignore[arg-type]
            with_zeros=with_zeros,
            zeros_mode=zeros_mode,  # type: ignore[arg-type]
            fast_decoding=fast_decoding,
            propagate_b=propagate_b,
            dynamic_quantization=dynamic_quantization,
            activation_eps=activation_eps,
        )
        place = torch.empty(0, device=device).device
        self._choose(config, place)
        self._make_buffers(place, check_flag("act_order", act_order))

    def _make_buffers(self, device: torch.device, act_order: bool) -> None:
        config, shape = self.config, (self.config.N, self.config.num_groups)
        fmt, scale_dtype = config.format, getattr(torch, config.scale_dtype)
        weight_dtype = getattr(torch, fmt.torch_name) if fmt.is_native else torch.int8
        packed_zeros = (config.num_groups, (config.N * fmt.bits + 7) // 8)

        def buffer(name: str, wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if wanted else None)

        buffer(self._weight_name, True, tuple(self._operator.retrieve_weight_shape()), weight_dtype)
        buffer("scales", config.with_scaling, shape, scale_dtype)
        if config.zeros_packed:
            buffer("zeros", True, packed_zeros, torch.int8)
        else:
            buffer("zeros", config.with_zeros, shape, scale_dtype)
        buffer("bias", config.with_bias, (config.N,), getattr(torch, config.bias_dtype))
        buffer("perm", False, (config.K,), torch.int32)
        if act_order:
            self._set_perm(torch.arange(config.K, dtype=torch.int32, device=device))
        if self._weight_name == "qweight":
            self.register_buffer("format", self._expected_format().to(device))
        # those that are None last, perm, which may come later, before the others: `torch.export` counts them, and else takes
        # another input of its graph for a buffer
        missing = [name for name, tensor in self._buffers.items() if tensor is None]
        for name in sorted(missing, key=lambda name: name != "perm"):
            self._buffers[name] = self._buffers.pop(name)

    # -- what it is ------------------------------------------------------------------------------------------------------

    @property
    def consistent(self) -> bool:
        """Whether weights and activations have one format."""
        return self.config.A_dtype == self.config.W_dtype

    A_dtype = property(lambda self: self.config.A_dtype)
    W_dtype = property(lambda self: self.config.W_dtype)
    accum_dtype = property(lambda self: self.config.accum_dtype)
    out_dtype = property(lambda self: self.config.out_dtype)
    group_size = property(lambda self: self.config.group_size)
    with_scaling = property(lambda self: self.config.with_scaling)
    with_zeros = property(lambda self: self.config.with_zeros)
    zeros_mode = property(lambda self: self.config.zeros_mode)
    opt_M = property(lambda self: self.config.M)
    bits = property(lambda self: self.config.format.bits)
    source_format = property(lambda self: self._operator.source_format)

    def extra_repr(self) -> str:
        """What stands in the parentheses of `repr`."""
        config = self.config
        parts = [f"in_features={config.K}, out_features={config.N}, bias={config.with_bias}"]
        parts += [f"A_dtype={config.A_dtype}, W_dtype={config.W_dtype}, out_dtype={config.out_dtype}"]
        parts += [f"group_size={config.group_size}"] if config.is_grouped else []
        parts += [f"zeros_mode={config.zeros_mode}"] if config.with_zeros else []
        parts += ["act_order=True"] if self.perm is not None else []
        return ", ".join(parts)

    # -- weights ---------------------------------------------------------------------------------------------------------

    def load_and_transform_weight(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Encode a weight and put it, and what is given beside it, into the buffers.

        Parameters
        ----------
        weight : torch.Tensor
            (out_features, in_features), as `Matmul.transform_weight` takes it, on any device.
        scales, zeros, bias : torch.Tensor, optional
            Of the buffers' shapes, or (out_features,) where there is one group; any floating-point dtype for those that are
            floats. What is not given stays.

        Raises
        ------
        ArgumentError
            A wrong shape or dtype, a value that the format cannot hold, or a tensor that the layer was built without.
        """
        device = weight.device if self._weight.is_meta else self.device
        if device != self.device:
            self._choose(self.config, device)
        given = {"scales": scales, "zeros": zeros, "bias": bias}
        ready = {name: fit_tensor(name, t, self._tensor(name), device) for name, t in given.items() if t is not None}
        ready[self._weight_name] = self._operator.transform_weight(weight).to(device)
        if self._weight.is_meta:
            self._make_buffers(device, self.perm is not None)
        for name, tensor in ready.items():
            self._put(name, tensor)

    def load_quantized(self, weight: QuantizedWeight, device: torch.device | str | None = None) -> None:
        """Put a quantized weight into the buffers.

        Parameters
        ----------
        weight : QuantizedWeight
            Of the layer's shape, format, group size and mode of zero points.
        device : torch.device or str, optional
            Where the layer is to be afterwards; None: where it is.

        Raises
        ------
        ArgumentError
            The weight is another than the layer was built for.
        """
        config = self.config
        groups = weight.scales.shape[1]
        mode = weight.zeros_mode if weight.zeros is not None else None
        found = (weight.out_features, weight.in_features, weight.W_dtype, groups, mode)
        mine = (config.N, config.K, config.W_dtype, config.num_groups, config.zeros_mode if config.with_zeros else None)
        if found != mine or not config.with_scaling:
            raise ArgumentError(
                f"the weight is {describe(*found)}; this layer takes {describe(*mine)}"
                + ("" if config.with_scaling else ", without scales")
            )
        if weight.bias is not None and not config.with_bias and bool(weight.bias.any()):
            raise ArgumentError("the weight comes with a bias; this layer was built with bias=False")
        place = torch.empty(0, device=device).device if device is not None else self.device
        if place.type == "meta":
            place = weight.packed.device
        if place != self.device:
            self._choose(config, place)  # every tensor is replaced below
        packed = weight.packed.to(place)
        new = {"scales": weight.scales, "zeros": weight.zeros, "bias": weight.bias if config.with_bias else None}
        ready = {name: fit_tensor(name, t, self._tensor(name), place) for name, t in new.items() if t is not None}
        native = relay(packed, packed_layout(config), self._operator.layout)
        ready[self._weight_name] = native.clone() if native is weight.packed else native
        if config.with_bias and weight.bias is None:
            ready["bias"] = torch.zeros_like(self._tensor("bias"), device=place)  # type: ignore[arg-type]
        self._set_perm(None if weight.perm is None else weight.perm.to(place, copy=True))
        for name, tensor in ready.items():
            self._put(name, tensor)
        if "format" in self._buffers:
            self._put("format", self._expected_format().to(place))

    def to_quantized(self) -> QuantizedWeight:
        """The weight in the canonical form, on the layer's device; scales of one where the layer has none.

        Raises
        ------
        ArgumentError
            The weight is in a floating-point dtype.
        """
        config = self.config
        if config.format.is_native:
            raise ArgumentError(f"the weight is {config.W_dtype}; there is nothing quantized")
        scales = self._tensor("scales")
        if scales is None:
            scales = torch.ones((config.N, 1), dtype=getattr(torch, config.scale_dtype), device=self.device)
            if config.with_zeros:
                scales = scales.expand(config.N, config.num_groups).contiguous()
        return QuantizedWeight(
            config.W_dtype,
            relay(self._weight, self._operator.layout, packed_layout(config)),
            config.K,
            scales,
            self._tensor("zeros"),
            config.zeros_mode,
            self._tensor("perm"),
            self._tensor("bias"),
        )

    def repack_from_gptq(self, m: torch.nn.Module, device: torch.device | str | None = None) -> None:
        """Take the weight of a GPTQ layer whose zero points are stored minus one (checkpoint format "gptq").

        Parameters
        ----------
        m : torch.nn.Module
            With the attributes `qweight`, `qzeros`, `scales`, `bits`, and `g_idx` and `bias` where it has them.
        device : torch.device or str, optional
            Where the layer is to be afterwards; None: where it is.

        Raises
        ------
        ArgumentError
            The tensors are damaged, or of another shape, group size or format than this layer.
        """
        self._repack(m, 1, device)

    def repack_from_gptq_v2(self, m: torch.nn.Module, device: torch.device | str | None = None) -> None:
        """As `repack_from_gptq`, for zero points that are stored as they are (checkpoint format "gptq_v2")."""
        self._repack(m, 2, device)

    def _repack(self, m: torch.nn.Module, version: int, device: torch.device | str | None) -> None:
        mode = self.config.zeros_mode if self.config.with_zeros else None
        self.load_quantized(from_gptq_module(m, version, mode), device)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        *,
        A_dtype: str | None = None,
        out_dtype: str | None = None,
        accum_dtype: str = "float32",
        opt_M: int | Sequence[int] | None = DEFAULT_BUCKETS,
        enable_tuning: bool = True,
        device: torch.device | str | None = None,
        dynamic_quantization: str | None = None,
        activation_eps: float | None = None,
        dense_cache: bool = False,
    ) -> Linear:
        """A layer that holds a quantized weight.

        Parameters
        ----------
        weight : QuantizedWeight
            What it is to multiply with.
        A_dtype, out_dtype : str, optional
            None: the dtype of the scales, and A_dtype.
        accum_dtype, opt_M, enable_tuning, dynamic_quantization, activation_eps, dense_cache
            As of the constructor.
        device : torch.device or str, optional
            None: where the weight is.
        """
        a_dtype = A_dtype or str(weight.scales.dtype).removeprefix("torch.")
        layer = cls(
            weight.in_features,
            weight.out_features,
            weight.bias is not None,
            A_dtype=a_dtype,
            W_dtype=weight.W_dtype,
            accum_dtype=accum_dtype,
            out_dtype=out_dtype or (a_dtype if a_dtype in FLOATS else "float32"),
            group_size=weight.group_size,
            with_scaling=True,
            with_zeros=weight.zeros is not None,
            zeros_mode=weight.zeros_mode,
            opt_M=opt_M,
            enable_tuning=enable_tuning,
            device="meta",
            dynamic_quantization=dynamic_quantization,
            activation_eps=activation_eps,
            dense_cache=dense_cache,
        )
        layer.load_quantized(weight, weight.packed.device if device is None else device)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        W_dtype: str = "uint4",
        group_size: int = -1,
        symmetric: bool | None = None,
        **options: Any,
    ) -> Linear:
        """A layer that holds the weight of a torch layer, rounded to the nearest values of a format.

        Parameters
        ----------
        linear : torch.nn.Linear
            Of float16, bfloat16 or float32.
        W_dtype : str
            A format of at most 8 bits.
        group_size : int
            How many consecutive in_features share a scale; -1: all.
        symmetric : bool, optional
            Whether the range of each group is centred at 0; None: for all formats but uint.
        **options
            As of `from_quantized`; A_dtype is that of the weight by default.

        Raises
        ------
        ArgumentError
            The weight is no matrix of finite numbers of these dtypes, or its groups do not come out even.
        """
        weight = quantize(linear.weight, W_dtype, group_size, symmetric, None, linear.bias)
        return cls.from_quantized(weight, **options)
