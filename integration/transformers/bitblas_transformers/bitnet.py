"""transformers' own BitNet layers, in a model that is loaded, replaced by ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.integrations.bitnet import AutoBitLinear, BitLinear

from bitblas.checkpoints.bitnet import EPS
from bitblas.checkpoints.spec import QUANT_METHOD, LayerSpec
from bitblas.codecs import QuantizedWeight
from bitblas.codecs.bitnet import from_bitnet, scaled_bias, ternary
from bitblas.errors import ArgumentError, ConfigError
from bitblas.logs import progress
from bitblas.nn import Linear
from bitblas.nn.operators import build_operators

from .config import BitBLASConfig
from .layers import NormedLinear
from .quantizer import BitBLASHfQuantizer

M = TypeVar("M", bound=torch.nn.Module)


def replace_bitnet_(model: M, build: bool = True) -> M:
    """Replace transformers' layers for BitNet by `bitblas.Linear`, in place.

    transformers' class for packed weights unpacks them at every forward pass; ours multiplies integers with what is packed. A
    weight that is rounded at every forward pass (`quantization_mode` "online") is rounded once, and cannot be trained any more.
    Activations are rounded as before, row by row, s = max(max |a|, 1e-5) / 127, but in float32 whatever the model's dtype is,
    and sums are exact. Each weight is freed as its layer is replaced; operators of equal shape are built once and shared.

    Parameters
    ----------
    model : torch.nn.Module
        With layers of the classes `BitLinear` or `AutoBitLinear` of `transformers.integrations.bitnet`, in float32, float16 or
        bfloat16.
    build : bool
        Whether to load or build the kernels now, instead of by the first call.

    Returns
    -------
    torch.nn.Module
        `model`. Of a `PreTrainedModel` `save_pretrained` now writes one of our folders.

    Raises
    ------
    ArgumentError
        The model has no such layer, or the weight of one is damaged, or on the device meta: the message names it. The layers
        before it are replaced already.
    BuildError, ArtifactError, UnsupportedError
        As the constructor of `bitblas.Matmul`.
    """
    places = _places(model)
    made: dict[str, Linear] = {}
    specs: dict[str, LayerSpec] = {}
    with progress("replacing", len(places)) as step:
        while places:
            names, layer = places.popitem()
            step(names[0])
            made[names[0]], specs[names[0]] = _replacement(names[0], layer)
            for name in names:
                model.set_submodule(name, made[names[0]])
    if isinstance(model, PreTrainedModel):
        _tell(model, specs)
    if build:
        build_operators(layer.bitblas_matmul for layer in made.values())
    return model


def _places(model: torch.nn.Module) -> dict[tuple[str, ...], torch.nn.Module]:
    """The layers to be replaced, from the last to the first, each with all names that it has in the model."""
    if isinstance(model, (BitLinear, AutoBitLinear)):
        raise ArgumentError(f"model is a {type(model).__name__} itself; expected a model that has such layers")
    names: dict[torch.nn.Module, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (BitLinear, AutoBitLinear)):
            names.setdefault(layer, []).append(name)
    if not names:
        raise ArgumentError(
            f"model is a {type(model).__name__} without layers of the classes BitLinear and AutoBitLinear of transformers: "
            "bitblas.quantize_ is for dense models"
        )
    return {tuple(found): layer for layer, found in reversed(names.items())}


def _replacement(name: str, layer: Any) -> tuple[Linear, LayerSpec]:
    """Our layer, and its entry of `config.json`."""
    try:
        weight, norm = _weight(layer), layer.rms_norm
        floats = layer.weight_scale.dtype if isinstance(layer, BitLinear) else layer.weight.dtype
        dtype = str(floats).removeprefix("torch.")
        made = (Linear if norm is None else NormedLinear).from_quantized(
            weight, A_dtype=dtype, out_dtype=dtype, dynamic_quantization="row", activation_eps=EPS
        )
    except (ArgumentError, ConfigError) as error:
        raise type(error)(f"{name}: {error}") from error
    spec = replace(LayerSpec.of(weight), dynamic_quantization="row", activation_eps=EPS)
    if norm is not None:
        made.rms_norm, spec = norm, replace(spec, rms_norm_eps=norm.variance_epsilon)
    return made.train(layer.training), spec


def _weight(layer: Any) -> QuantizedWeight:
    if layer.weight.is_meta:
        raise ArgumentError("weight is on the device meta; expected one with data")
    if isinstance(layer, BitLinear):
        return from_bitnet(layer.weight, layer.weight_scale, layer.bias, divide=True, out_features=layer.out_features)
    if layer.online_quant:
        return ternary(layer.weight, EPS, layer.bias)
    bias = scaled_bias(layer.bias, layer.weight_scale)
    return from_bitnet(layer.weight, layer.weight_scale, bias, out_features=layer.out_features)


def _tell(model: PreTrainedModel, specs: Mapping[str, LayerSpec]) -> None:
    """Make the model one that our quantizer loaded, so that it is saved as such."""
    dense = sorted(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    config = BitBLASConfig(modules_to_not_convert=dense, layers={name: spec.to_json() for name, spec in specs.items()})
    told: Any = model
    told.hf_quantizer, told.quantization_method = BitBLASHfQuantizer(config, pre_quantized=True), QUANT_METHOD
    told.config.quantization_config = config
    told.is_quantized = True
    conversions = getattr(model, "_weight_conversions", None)  # of loading; saving reverts them
    if conversions is not None:
        told._weight_conversions = [each for each in conversions if not _is_of_quantizer(each)]


def _is_of_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
