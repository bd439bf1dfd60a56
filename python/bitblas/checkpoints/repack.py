"""Folders of Hugging Face models into ours: quantized by GPTQ, AWQ or llm-compressor, of BitNet, and dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ..codecs import quantize
from ..errors import ArgumentError, CheckpointError
from ..formats import DataFormat, parse_format
from .bitnet import has_latent_weights, read_bitnet, read_latent
from .convert import Copy, Piece, Summary, Task, convert
from .foreign import find_layers, parse_method
from .journal import check_folders
from .layers import Contents, DenseLayer, ForeignLayer, Rounding, dense_facts
from .names import is_linear
from .shards import Shards, open_shards, read_json
from .spec import LayerSpec, make_config

#: Where a config says how a model is quantized; the second one in folders of older versions of llm-compressor.
_QUANTIZATION = ("quantization_config", "compression_config")
#: Models whose layers hold their weights transposed, as (in, out).
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def repack(
    src: str | Path,
    dst: str | Path,
    *,
    W_dtype: str | None = None,
    group_size: int = 128,
    symmetric: bool | None = None,
    exclude: Sequence[str] = (),
    verify: bool = True,
) -> Summary:
    """Make one of our folders of a model.

    Parameters
    ----------
    src : str or Path
        A Hugging Face folder with safetensors files.
    dst : str or Path
        Where to write: missing, empty, or left by an unfinished run, which is continued.
    W_dtype : str, optional
        For a dense model, the format to round its linear layers to.
    group_size : int
        For a dense model: how many consecutive columns share a scale; -1: all.
    symmetric : bool, optional
        For a dense model: without zero points; None: as is usual for the format.
    exclude : sequence of str
        For a dense model: patterns, as of a shell, for the names of layers that stay dense.
    verify : bool
        Whether each layer is read back and compared with its source.

    Returns
    -------
    Summary

    Raises
    ------
    ArgumentError
        The arguments do not go together, or with the model.
    CheckpointError
        `src` is damaged or of a kind that is not known, `dst` holds something else or cannot be written.
    """
    source_path, target = Path(src), Path(dst)
    check_folders(source_path, target)
    config = read_json(source_path / "config.json")
    found = _quantization(source_path, config)
    is_latent = found is None and _is_latent(source_path, config)
    if (found is not None or is_latent) and (W_dtype is not None or exclude):
        raise ArgumentError(
            f"SRC is {src}, which is quantized already: a format and patterns to exclude are for dense models"
        )
    if found is None and not is_latent and W_dtype is None:
        raise ArgumentError(f"SRC is {src}, which is not quantized: name a format to round to (--format uint4)")
    source = open_shards(source_path)
    options: dict[str, Any] = {}
    if W_dtype is None:
        contents = _quantized(source, config, found)
    else:
        rounding = _rounding(parse_format(W_dtype), group_size, symmetric)
        options = {
            "W_dtype": rounding.W_dtype,
            "group_size": group_size,
            "symmetric": symmetric,
            "exclude": sorted(exclude),
        }
        contents = Contents(_dense_layers(source, rounding, exclude, config), config)
    layers = contents.layers
    taken = {name for layer in layers for name in layer.inputs}.union(contents.dropped)
    copies = [
        Copy(name, info.num_bytes, contents.new_names.get(name))
        for name, info in source.infos.items()
        if name not in taken
    ]
    dense = [copy.name.removesuffix(".weight") for copy in copies if is_linear(copy.name, source, keep=("lm_head",))]

    def new_config(notes: Mapping[str, Any]) -> dict[str, Any]:
        specs = {layer.name: LayerSpec.from_json(layer.name, notes[layer.name]) for layer in layers}
        kept = {key: value for key, value in contents.config.items() if key not in _QUANTIZATION}
        return {**kept, "quantization_config": make_config(specs, dense)}

    return convert(source, target, Task("repack", options, [*layers, *copies], new_config), verify)


def _quantization(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What says how a model is quantized: in its config, or in a file of its own, as AutoGPTQ and AutoAWQ had it."""
    found = next((config[key] for key in _QUANTIZATION if config.get(key)), None)
    if found is not None:
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{folder / 'config.json'}: quantization_config is {found!r}; expected an object")
        return found
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / file).is_file():
            return {"quant_method": method, **read_json(folder / file)}
    return None


def _is_latent(folder: Path, config: Mapping[str, Any]) -> bool:
    try:
        return has_latent_weights(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def _quantized(source: Shards, config: Mapping[str, Any], found: Mapping[str, Any] | None) -> Contents:
    if found is None:
        return read_latent(source, config)
    if str(found.get("quant_method", "")).lower() == "bitnet":
        return read_bitnet(source, config, found)
    return Contents(_foreign_layers(source, found, source.folder), config)


def _foreign_layers(source: Shards, config: Mapping[str, Any], folder: Path) -> list[Piece]:
    try:
        method, bits = parse_method(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    parts = (*method.required, *method.optional)
    return [
        ForeignLayer(name, facts, tuple(f"{name}.{part}" for part in parts if f"{name}.{part}" in source), method)
        for name, facts in find_layers(source, method, bits).items()
    ]


def _rounding(fmt: DataFormat, group_size: int, symmetric: bool | None) -> Rounding:
    """How to round, checked before anything is written."""
    if fmt.is_native:
        raise ArgumentError(f"W_dtype is {fmt.name!r}, which is not quantized")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise ArgumentError(f"group_size is {group_size!r}; allowed: -1 and integers of at least 1")
    quantize(torch.ones(1, 1), fmt.name, symmetric=symmetric)
    return Rounding(fmt.name, group_size, symmetric)


def _dense_layers(source: Shards, rounding: Rounding, exclude: Sequence[str], config: Mapping[str, Any]) -> list[Piece]:
    if config.get("model_type") in _TRANSPOSED:
        raise CheckpointError(
            f"model_type is {config['model_type']!r}, whose layers hold transposed weights: it cannot be rounded"
        )
    layers: list[Piece] = []
    for tensor, info in source.infos.items():
        name = tensor.removesuffix(".weight")
        if not is_linear(tensor, source) or any(fnmatchcase(name, pattern) for pattern in exclude):
            continue
        try:
            facts = dense_facts(info.shape, rounding)
        except ValueError as error:
            raise CheckpointError(f"{source.where(tensor)} {error}") from error
        inputs = (tensor, f"{name}.bias") if f"{name}.bias" in source else (tensor,)
        layers.append(DenseLayer(name, facts, inputs, rounding))
    if not layers:
        raise CheckpointError(f"{source.folder} has no weight that would be rounded")
    return layers
