"""Folders of BitNet-b1.58: with packed weights, or with floats that are rounded at every forward pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codecs import QuantizedWeight
from ..codecs.bitnet import from_bitnet, scaled_bias, ternary
from ..errors import CheckpointError
from . import verify
from .folder import read_weight
from .foreign import Facts
from .layers import Contents, MadeLayer, add_weight, check_bias
from .names import FLOATS, is_linear
from .shards import Shards
from .spec import NORM, LayerSpec
from .writing import ShardWriter

#: The least mean magnitude of a weight, and magnitude of a row of activations, in transformers and in 1bitLLM's models.
EPS = 1e-5
#: Linear layers of a block of 1bitLLM's models, and its norms with the names that these have in transformers.
_LAYERS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
LATENT_NORMS: Mapping[str, str] = {
    "self_attn.inner_attn_ln": "self_attn.attn_sub_norm",
    "mlp.ffn_layernorm": "mlp.ffn_sub_norm",
}
#: What a config that says nothing means in 1bitLLM's models, and would mean something else in transformers' BitNet.
LATENT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ARCHITECTURE = "BitnetForCausalLM"


@dataclass(frozen=True)
class TernaryLayer(MadeLayer):
    """A layer with ternary weights, whose activations are rounded row by row.

    Attributes
    ----------
    is_latent : bool
        Whether its weight is still to be rounded.
    divide : bool
        Whether values are divided by `weight_scale`.
    rms_norm_eps : float or None
        That of the norm in front of it.
    """

    is_latent: bool
    divide: bool = False
    rms_norm_eps: float | None = None

    def _parts(self, source: Shards) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        weight, scale, bias = (f"{self.name}.{part}" for part in ("weight", "weight_scale", "bias"))
        return source.get(weight), source.find(scale), source.find(bias)

    def _decode(self, source: Shards) -> QuantizedWeight:
        weight, scale, bias = self._parts(source)
        if self.is_latent:
            return ternary(weight, EPS, bias)
        assert scale is not None
        return from_bitnet(weight, scale, bias if self.divide else scaled_bias(bias, scale), divide=self.divide)

    def write(self, source: Shards, writer: ShardWriter) -> dict[str, Any]:
        """Convert it."""
        weight = self._decode(source)
        return add_weight(
            writer,
            self.name,
            weight,
            dynamic_quantization="row",
            activation_eps=EPS,
            rms_norm_eps=self.rms_norm_eps,
        )

    def check(self, source: Shards, made: Shards, note: Any) -> None:
        """Compare it with what the source's tensors stand for, or with its weight to the bound of rounding."""
        weight, scale, bias = self._parts(source)
        found = read_weight(made, self.name, LayerSpec.from_json(self.name, note))
        if scale is None:
            verify.check_ternary(self.name, weight, found, EPS)
        else:
            verify.check_weight(self.name, verify.bitnet_reference(weight, scale, self.divide, self.facts.n), found)
        check_bias(self.name, verify.bitnet_bias(bias, scale, self.divide), found.bias)


def has_latent_weights(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of 1bitLLM's models, which is called a Llama's, and none of transformers'.

    Raises
    ------
    CheckpointError
        It is so in part, or weights are packed in a way of integration/BitNet.
    """
    architectures = config.get("architectures") or ()
    if config.get("packed") is True and _ARCHITECTURE in architectures:
        raise CheckpointError(
            f"the weights were packed by save_quantized of integration/BitNet: load the folder with its "
            f"{_ARCHITECTURE}.from_quantized"
        )
    if "weight_bits" not in config and _ARCHITECTURE not in architectures:
        return False
    wanted = {"architectures": [_ARCHITECTURE], "model_type": "llama", "weight_bits": 1, "input_bits": 8}
    for key, value in wanted.items():
        if config.get(key) != value:
            raise CheckpointError(
                f"{key} is {config.get(key)!r}; of BitNet models with float weights those are known whose {key} is {value!r}"
            )
    return True


def read_latent(source: Shards, config: Mapping[str, Any]) -> Contents:
    """A folder in the layout of 1bitLLM/bitnet_b1_58-3B, which becomes one of transformers' BitNet.

    Raises
    ------
    CheckpointError
        A tensor is missing or not known, or the config is of another kind.
    """
    config = {**LATENT_DEFAULTS, **config}
    if config.get("rope_scaling") is not None:
        raise CheckpointError(f"rope_scaling is {config['rope_scaling']!r}; BitNet models with float weights have none")
    blocks = config["num_hidden_layers"]
    if type(blocks) is not int or blocks < 1:
        raise CheckpointError(f"num_hidden_layers is {blocks!r}; expected a positive integer")
    names = [f"model.layers.{block}.{layer}" for block in range(blocks) for layer in _LAYERS]
    new_names = {
        f"model.layers.{block}.{old}.weight": f"model.layers.{block}.{new}.weight"
        for block in range(blocks)
        for old, new in LATENT_NORMS.items()
    }
    for tensor in new_names:
        if tensor not in source:
            raise CheckpointError(f"{source.folder} has no tensor {tensor}")
    for tensor in source.infos:
        if is_linear(tensor, source) and tensor.removesuffix(".weight") not in names:
            raise CheckpointError(f"{source.where(tensor)} is no weight of a BitNet model with {blocks} blocks")
    dropped = ("architectures", "model_type", "weight_bits", "input_bits", "auto_map", "pretraining_tp", "rope_scaling")
    kept = {key: value for key, value in config.items() if key not in dropped}
    return Contents(
        layers=[_latent_layer(source, name) for name in names],
        new_names=new_names,
        # they follow from rope_theta
        dropped=[tensor for tensor in source.infos if tensor.endswith(".rotary_emb.inv_freq")],
        config={"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", **kept},
    )


def read_bitnet(source: Shards, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> Contents:
    """A folder whose `quant_method` is "bitnet", transformers' own.

    Raises
    ------
    CheckpointError
        What its config asks for is not known, or a tensor is missing or not what it should be.
    """
    path = source.folder / "config.json"
    kind, mode = quantization.get("linear_class", "bitlinear"), quantization.get("quantization_mode", "offline")
    if kind not in ("bitlinear", "autobitlinear"):
        raise CheckpointError(f"{path}: linear_class is {kind!r}; expected 'bitlinear' or 'autobitlinear'")
    if mode not in ("offline", "online"):
        raise CheckpointError(f"{path}: quantization_mode is {mode!r}; expected 'offline' or 'online'")
    is_latent, eps = kind == "autobitlinear" and mode == "online", None
    if quantization.get("use_rms_norm"):
        eps = quantization.get("rms_norm_eps", 1e-6)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < float("inf"):
            raise CheckpointError(f"{path}: rms_norm_eps is {eps!r}; expected a positive number")
    names = _converted(source, quantization.get("modules_to_not_convert"), is_latent)
    layers = [
        _latent_layer(source, name, eps) if is_latent else _packed_layer(source, name, kind == "bitlinear", eps)
        for name in names
    ]
    _check_norms(source, names, eps is not None)
    return Contents(layers, config)


def _converted(source: Shards, patterns: object, is_latent: bool) -> list[str]:
    """The layers that are of transformers' classes: those with a scale; without packed weights, those that no pattern names."""
    if patterns is not None and not (isinstance(patterns, list) and all(isinstance(part, str) for part in patterns)):
        raise CheckpointError(f"modules_to_not_convert is {patterns!r}; expected null or a list of names")
    weights = {tensor.removesuffix(".weight"): tensor for tensor in source.infos if tensor.endswith(".weight")}
    scales = {
        tensor.removesuffix(".weight_scale"): tensor for tensor in source.infos if tensor.endswith(".weight_scale")
    }
    head = () if patterns is None else ("lm_head",)  # which transformers leaves out where nothing is said
    linear = [
        name
        for name, tensor in weights.items()
        if is_linear(tensor, source, head if is_latent else ()) and not _is_left_out(name, patterns or ())
    ]
    packed = [name for name, tensor in weights.items() if source.infos[tensor].dtype == "U8"]
    for name, tensor in scales.items():
        if name not in weights:
            raise CheckpointError(f"{source.where(tensor)} is there without {name}.weight")
    if is_latent:
        for name in (*scales, *packed):
            raise CheckpointError(f"{source.where(weights[name])} is packed; config.json says that weights are not")
        if any(name.rpartition(".")[2] == "lm_head" for name in linear):
            raise CheckpointError(f"modules_to_not_convert is {patterns!r}; expected lm_head to be in it, or null")
    for name in () if is_latent else (*packed, *linear):
        if name not in scales:
            where = source.where(weights[name])
            raise CheckpointError(f"{source.folder} has no tensor {name}.weight_scale, which belongs to {where}")
    found = linear if is_latent else list(scales)
    if not found:
        raise CheckpointError(f"{source.folder} has no layer to convert, though its quant_method is 'bitnet'")
    return found


def _is_left_out(name: str, patterns: Sequence[str]) -> bool:
    """Whether transformers leaves a layer as it is: by its beginning, up to a dot, a regular expression, or its end."""
    try:
        return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key) for key in patterns)
    except re.error as error:
        raise CheckpointError(
            f"modules_to_not_convert is {patterns!r}, of which one is no expression: {error}"
        ) from error


def _check_norms(source: Shards, names: Sequence[str], wanted: bool) -> None:
    for name in names:
        tensor = f"{name}.{NORM}"
        if wanted and tensor not in source:
            raise CheckpointError(f"{source.folder} has no tensor {tensor}, and use_rms_norm is true")
        if not wanted and tensor in source:
            raise CheckpointError(f"{source.where(tensor)} is there, and use_rms_norm is not true")


def _latent_layer(source: Shards, name: str, eps: float | None = None) -> TernaryLayer:
    tensor = f"{name}.weight"
    if tensor not in source:
        raise CheckpointError(f"{source.folder} has no tensor {tensor}")
    info = source.infos[tensor]
    if info.dtype not in FLOATS or len(info.shape) != 2 or not all(info.shape):
        raise CheckpointError(
            f"{source.where(tensor)} is {info.dtype} {info.shape}; expected floats with two dimensions"
        )
    return TernaryLayer(name, Facts(*info.shape, 2, 1), _inputs(source, name), is_latent=True, rms_norm_eps=eps)


def _packed_layer(source: Shards, name: str, divide: bool, eps: float | None) -> TernaryLayer:
    tensor, bias = f"{name}.weight", source.infos.get(f"{name}.bias")
    info = source.infos[tensor]
    kinds = ("U8",) if divide else ("U8", "I8", *FLOATS)
    if info.dtype not in kinds or len(info.shape) != 2 or not all(info.shape):
        expected = "U8" if divide else "U8, I8 or floats"
        raise CheckpointError(
            f"{source.where(tensor)} is {info.dtype} {info.shape}; expected {expected} with two dimensions"
        )
    rows, columns = info.shape
    rows *= 4 if info.dtype == "U8" else 1
    if bias is not None and len(bias.shape) == 1 and info.dtype == "U8":
        rows = min(rows, bias.shape[0])
    return TernaryLayer(name, Facts(rows, columns, 2, 1), _inputs(source, name), False, divide, eps)


def _inputs(source: Shards, name: str) -> tuple[str, ...]:
    return tuple(tensor for part in ("weight", "weight_scale", "bias") if (tensor := f"{name}.{part}") in source)
