"""One of our folders, read: its layers, and each as a `QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..codecs import QuantizedWeight, parse_format_tensor
from ..errors import ArgumentError, CheckpointError
from ..formats import parse_format
from .shards import Shards, open_shards, read_json
from .spec import NORM, LayerSpec, parse_config


def open_folder(folder: str | Path) -> tuple[dict[str, LayerSpec], Shards]:
    """The quantized layers of one of our folders, by name, and the tensors: of each layer, those that its entry says, and no
    layer's without an entry.

    Raises
    ------
    CheckpointError
        It is no such folder, or damaged as far as headers tell; or config.json and the tensors do not go together.
    """
    layers, shards = _parse_folder(Path(folder) / "config.json"), open_shards(Path(folder))
    for tensor in shards.infos:
        name, _, part = tensor.rpartition(".")
        if part in ("qweight", "format") and name not in layers:
            raise CheckpointError(f"{shards.where(tensor)} is a quantized layer's, and config.json has no layer {name}")
    for name, spec in layers.items():
        has = {"qweight": True, "scales": True, "format": True, "zeros": spec.zeros_mode is not None}
        for part, wanted in {**has, "perm": spec.act_order, NORM: spec.rms_norm_eps is not None}.items():
            tensor = f"{name}.{part}"
            if wanted and tensor not in shards:
                raise CheckpointError(f"{shards.folder} has no tensor {tensor}, which config.json says is there")
            if not wanted and tensor in shards:
                raise CheckpointError(f"{shards.where(tensor)} is there, and config.json says that the layer has none")
    return layers, shards


def read_layers(folder: str | Path) -> dict[str, LayerSpec]:
    """The quantized layers of one of our folders, by name.

    Parameters
    ----------
    folder : str or Path
        What `repack` made: a directory with a `config.json` and safetensors files.

    Raises
    ------
    CheckpointError
        It is no such folder, its `quantization_config` is malformed or of a newer version, or the tensors are those of
        other layers.
    """
    return open_folder(folder)[0]


def _parse_folder(path: Path) -> dict[str, LayerSpec]:
    config = read_json(path)
    if "quantization_config" not in config:
        raise CheckpointError(f"{path} has no quantization_config: the model is not quantized")
    try:
        return parse_config(config["quantization_config"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_weight(shards: Shards, name: str, spec: LayerSpec) -> QuantizedWeight:
    """A layer of one of our folders; its tensors are mapped from their file.

    Raises
    ------
    CheckpointError
        A tensor is missing, or is not what `spec` says.
    """
    packed, scales = shards.get(f"{name}.qweight"), shards.get(f"{name}.scales")
    zeros = shards.get(f"{name}.zeros") if spec.zeros_mode else None
    perm = shards.get(f"{name}.perm") if spec.act_order else None
    try:
        features = _in_features(packed, scales, perm, spec)
        weight = QuantizedWeight(
            spec.W_dtype,
            packed,
            features,
            scales,
            zeros,
            spec.zeros_mode or "original",
            perm,
            shards.find(f"{name}.bias"),
        )
        _compare(parse_format_tensor(shards.get(f"{name}.format")), spec, features)
    except (ArgumentError, IndexError) as error:
        raise CheckpointError(f"{shards.where(f'{name}.qweight')}: {error}") from error
    if spec.group_size not in (weight.group_size, features if weight.group_size == -1 else None):
        raise CheckpointError(
            f"{shards.where(f'{name}.scales')}: they are of groups of {weight.group_size}; config.json says {spec.group_size}"
        )
    return weight


def _in_features(packed: torch.Tensor, scales: torch.Tensor, perm: torch.Tensor | None, spec: LayerSpec) -> int:
    if spec.in_features is not None:
        return spec.in_features
    if perm is not None:
        return perm.shape[0]
    if spec.group_size != -1:
        return scales.shape[1] * spec.group_size
    return packed.shape[1] * 8 // parse_format(spec.W_dtype).bits


def _compare(said: Mapping[str, object], spec: LayerSpec, features: int) -> None:
    """Hold what the format tensor says against `config.json`."""
    meant = {"W_dtype": spec.W_dtype, "group_size": spec.group_size, "zeros_mode": spec.zeros_mode}
    for key, value in meant.items():
        same = (-1, features) if key == "group_size" and value in (-1, features) else (value,)
        if said[key] not in same:
            raise ArgumentError(f"its format tensor says that {key} is {said[key]!r}, and config.json {value!r}")


def read_weights(folder: str | Path) -> Iterator[tuple[str, QuantizedWeight]]:
    """Every quantized layer of one of our folders, one at a time.

    Yields
    ------
    (str, QuantizedWeight)
        Its name and its weight, whose tensors are mapped from their file.

    Raises
    ------
    CheckpointError
        The folder or a tensor is not what it should be.
    """
    layers, shards = open_folder(folder)
    for name, spec in layers.items():
        yield name, read_weight(shards, name, spec)
