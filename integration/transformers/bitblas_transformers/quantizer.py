"""Puts bitblas's linear layers into a model before its weights are loaded, and lays these out afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from bitblas.checkpoints import Shards
from bitblas.checkpoints.spec import NORM, PARTS, QUANT_METHOD, LayerSpec
from bitblas.codecs import format_tensor, parse_format_tensor
from bitblas.codecs.rounding import quantize
from bitblas.errors import ArgumentError, CheckpointError, ConfigError
from bitblas.formats import parse_format
from bitblas.nn import Linear
from bitblas.nn.operators import build_operators

from .config import BitBLASConfig
from .layers import NormedLinear, make_norm

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@register_quantizer(QUANT_METHOD)
class BitBLASHfQuantizer(HfQuantizer):
    """What `from_pretrained` calls for a folder whose config.json says ``bitblas``, or for a `BitBLASConfig`.

    Activations have the model's dtype: float32, float16 or bfloat16. Scales and zero points that are floats are rounded to it.
    """

    requires_calibration = False
    quantization_config: BitBLASConfig

    def __init__(self, quantization_config: BitBLASConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        #: names of the layers that are quantized while they are loaded
        self._wanted: frozenset[str] = frozenset()
        #: of activations
        self.dtype = torch.float32

    # -- before the weights ----------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse weights on a disk: kernels read them where they are."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ArgumentError(f"device_map is {device_map}; quantized layers cannot be on a disk")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Learn the dtype of the model, which is that of activations."""
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype}; activations can be {', '.join(map(str, _DTYPES))}")
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._wanted = self._choose(model)
            return
        if self.quantization_config.layers is None:
            raise CheckpointError("quantization_config has no 'layers': it does not say what is quantized, and how")
        shards, stored = _open_files(kwargs.get("checkpoint_files")), set[str]()
        for name, spec in self.quantization_config.layers.items():
            place = find_place(model, name)
            if shards is not None:
                found = next((other for other in _names(model, name) if f"{other}.qweight" in shards), name)
                stored.add(found)
            if place is not None:
                layer = empty_layer(name, model.get_submodule(place), spec, self.dtype)
                if shards is not None:
                    compare_with_files(found, layer, shards)
                model.set_submodule(place, with_stand_in(layer))
        if shards is not None:
            check_named(shards, stored)

    def _choose(self, model: PreTrainedModel) -> frozenset[str]:
        """The layers to be rounded; raises ConfigError where the groups do not fit one."""
        config = self.quantization_config
        fmt = parse_format(config.W_dtype)
        if fmt.is_native:
            raise ConfigError(f"W_dtype is {config.W_dtype!r}, which is not quantized")
        in_float32 = list(model._keep_in_fp32_modules or ())
        dense = self.get_modules_to_not_convert(model, config.modules_to_not_convert, in_float32)
        wanted = set()
        for name, module in model.named_modules():
            if not isinstance(module, (torch.nn.Linear, Conv1D)) or not should_convert_module(name, dense):
                continue
            features = sizes(module)[0]
            if config.group_size != -1 and features % config.group_size:
                raise ConfigError(
                    f"group_size is {config.group_size}, which does not divide the {features} inputs of {name}: choose "
                    "another, or name the layer in modules_to_not_convert"
                )
            wanted.add(name)
        return frozenset(wanted)

    # -- while they are loaded -------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of a dense folder is to be rounded."""
        layer, _, part = param_name.rpartition(".")
        return part == "weight" and layer in self._wanted

    def get_quantize_ops(self) -> Rounding:
        """What rounds one tensor."""
        return Rounding(self)

    # -- after that ------------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        if self.pre_quantized:
            for name, spec in (config.layers or {}).items():
                place = find_place(model, name)
                if place is not None:
                    lay_out(name, layers[place], spec)
        else:
            config.layers = {name: LayerSpec.of(layer.to_quantized()) for name, layer in layers.items()}
            dense = (name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
            config.modules_to_not_convert = sorted(dense)
        for layer in layers.values():
            vars(layer).pop("weight", None)
        build_operators(layer.bitblas_matmul for layer in layers.values())
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """A state_dict holds the packed form."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the input of a layer, so that adapters can be trained beside it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A layer's call is an operator of torch's."""
        return True


class Rounding(ConversionOps):
    """Takes the dense weight of a layer as it is read, and puts a quantized layer in its place."""

    def __init__(self, quantizer: BitBLASHfQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]  # all are given by name
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """The layer is set, so nothing is left to be set by the caller."""
        config, dtype = self.quantizer.quantization_config, _name(self.quantizer.dtype)
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        dense: Any = model.get_submodule(name)
        bias = dense.bias
        if bias is not None:  # zeros where it is read later
            bias = torch.zeros_like(bias, device=weight.device) if bias.is_meta else bias.detach()
        rounded = quantize(
            weight.mT if isinstance(dense, Conv1D) else weight,
            config.W_dtype,
            config.group_size,
            config.symmetric,
            scale_dtype=self.quantizer.dtype,
            bias=bias,
        )
        layer = Linear.from_quantized(rounded, A_dtype=dtype, out_dtype=dtype)
        model.set_submodule(name, with_stand_in(layer))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def sizes(dense: Any) -> tuple[int, int]:
    """Inputs and outputs of a dense linear layer."""
    return (dense.nx, dense.nf) if isinstance(dense, Conv1D) else (dense.in_features, dense.out_features)


def empty_layer(name: str, dense: torch.nn.Module, spec: LayerSpec, dtype: torch.dtype) -> Linear:
    """A quantized layer without memory, in the place of a dense one.

    Raises
    ------
    CheckpointError
        The model has no linear layer there, or one of other sizes.
    """
    if not isinstance(dense, (torch.nn.Linear, Conv1D)):
        raise CheckpointError(f"{name} is quantized in config.json; the model has a {type(dense).__name__} there")
    inputs, outputs = sizes(dense)
    if spec.in_features not in (None, inputs):
        raise CheckpointError(f"{name} has {spec.in_features} inputs in config.json, and {inputs} in the model")
    try:
        if spec.rms_norm_eps is None:
            return spec.empty_layer(inputs, outputs, dense.bias is not None, _name(dtype))
        layer = spec.empty_layer(inputs, outputs, dense.bias is not None, _name(dtype), kind=NormedLinear)
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error
    layer.rms_norm = make_norm(layer, spec.rms_norm_eps, dtype)
    return layer


def compare_with_files(name: str, layer: Linear, shards: Shards) -> None:
    """Hold a layer to its tensors in the files.

    Raises
    ------
    CheckpointError
        A tensor is missing, or has another shape, or the layer has none of its kind.
    """
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    for part in (*PARTS, NORM):
        tensor, buffer = f"{name}.{part}", held.get(part)
        if buffer is None:
            if tensor in shards:
                raise CheckpointError(f"{shards.where(tensor)} is there, and the model's layer has no {part}")
            continue
        if tensor not in shards:
            raise CheckpointError(f"{tensor} is in no file of {shards.folder}")
        if (shape := shards.infos[tensor].shape) != tuple(buffer.shape):
            raise CheckpointError(f"{shards.where(tensor)} has shape {shape}; the model takes {tuple(buffer.shape)}")


def check_named(shards: Shards, stored: set[str]) -> None:
    """Raise CheckpointError where the files have a quantized layer that is not among the `stored` ones of config.json."""
    for tensor in shards.infos:
        name, _, part = tensor.rpartition(".")
        if part in ("qweight", "format") and name not in stored:
            raise CheckpointError(f"{shards.where(tensor)} is a quantized layer's, which config.json does not name")


def _open_files(files: Sequence[str] | None) -> Shards | None:
    """What is in the files of a model; None where they are not known, or none of safetensors."""
    paths = [Path(file) for file in files or ()]
    if not paths or any(path.suffix != ".safetensors" or path.parent != paths[0].parent for path in paths):
        return None
    return Shards(paths[0].parent, [path.name for path in paths])


def with_stand_in(layer: Linear) -> Linear:
    """Give a layer a `weight` while a model is loaded: some models name those of their parts where they initialize them.

    It is no buffer, and marked as transformers marks what is not to be initialized.
    """
    stand_in = torch.empty(0, device="meta")
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    vars(layer)["weight"] = stand_in
    return layer


def lay_out(name: str, layer: Linear, spec: LayerSpec) -> None:
    """Hold what was loaded to what config.json says of it, and lay it out for the kernels.

    Raises
    ------
    CheckpointError
        A tensor was in no file, or is not what the layer takes; or `format` says something else than config.json.
    """
    for part, tensor in layer.named_buffers():
        was_read = getattr(tensor, "_is_hf_initialized", False)  # set by transformers
        if tensor.is_meta or not was_read:
            raise CheckpointError(f"{name}.{part} is in no file of the folder, or has another shape there")
    if (held := layer.get_buffer("qweight").dtype) is not torch.int8:
        raise CheckpointError(f"{name}.qweight is {held}; expected torch.int8")
    wanted = parse_format_tensor(format_tensor(spec.W_dtype, spec.group_size, spec.zeros_mode))
    try:
        found = parse_format_tensor(layer.get_buffer("format").cpu())
        if found != wanted:
            raise ArgumentError(f"format says {found}; config.json says {wanted}")
        for part in ("scales", "zeros", "bias"):  # they come in the model's dtype
            tensor = getattr(layer, part)
            if tensor is not None and tensor.isinf().any():
                raise ArgumentError(f"{part} holds values beyond {tensor.dtype}: load the model in another dtype")
        layer.load_packed_()
    except ArgumentError as error:
        raise CheckpointError(f"{name}.{error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_place(model: PreTrainedModel, name: str) -> str | None:
    """Where a model has a layer of the folder: a model without a head has other names than one with it, and no head.

    Raises
    ------
    CheckpointError
        It has no such layer, and should.
    """
    for place in _names(model, name):
        try:
            model.get_submodule(place)
        except AttributeError:
            continue
        return place
    if model.base_model is model and not name.startswith(f"{model.base_model_prefix}."):
        return None
    raise CheckpointError(f"{name} is quantized in config.json; {type(model).__name__} has no such layer")


def _names(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """What a layer may be called: with the name of the model's base, or without."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name
