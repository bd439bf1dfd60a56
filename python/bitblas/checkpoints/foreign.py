"""Folders that other projects quantized: what their config says, which tensors are a layer, and the codec for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from ..codecs import QuantizedWeight, from_awq, from_compressed, from_gptq
from ..errors import CheckpointError
from . import verify
from .shards import Shards

Tensors = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Facts:
    """What is known of a layer before its tensors are read: out_features, in_features, bits of a code, groups of scales."""

    n: int
    k: int
    bits: int
    groups: int


@dataclass(frozen=True)
class Method:
    """One way to store a quantized layer.

    Attributes
    ----------
    name : str
        As `quant_method` calls it.
    required, optional : tuple of str
        The tensors of a layer, without its prefix; the first one tells that there is a layer.
    facts : callable
        Takes the shapes of these tensors; raises ValueError where they do not go together.
    decode : callable
        The codec: tensors and facts to a `QuantizedWeight`.
    reference : callable
        The same for the verification.
    check : callable
        Takes the facts of a layer and which of its tensors there are; raises ValueError where the config says otherwise.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    facts: Callable[[Mapping[str, tuple[int, ...]], int], Facts]
    decode: Callable[[Tensors, Facts], QuantizedWeight]
    reference: Callable[[Tensors, Facts], verify.Reference]
    check: Callable[[Facts, Collection[str]], None] = lambda facts, parts: None


def parse_method(config: Mapping[str, Any]) -> tuple[Method, tuple[int, ...] | None]:
    """The method of a `quantization_config`, and the bits that it names; None: any, as the tensors say.

    Raises
    ------
    CheckpointError
        It is of another kind, or asks for something that is not known.
    """
    kind = str(config.get("quant_method", "")).lower()
    if kind == "bitblas":
        raise CheckpointError("quant_method is 'bitblas': it has been repacked already")
    if kind not in _PARSERS:
        known = ", ".join((*_PARSERS, "bitnet"))
        raise CheckpointError(f"quant_method is {config.get('quant_method')!r}; expected one of {known}")
    return _PARSERS[kind](config)


def _parse_gptq(config: Mapping[str, Any]) -> tuple[Method, tuple[int, ...] | None]:
    version = _gptq_version(config)
    bits, group = _bits(config, "bits", (2, 3, 4, 8)), _group_size(config, "group_size")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"dynamic is {dynamic!r}; expected an object")
    for part in (config, *(override for override in dynamic.values() if isinstance(override, Mapping))):
        for key in ("adapter", "lora"):
            if part.get(key):
                raise CheckpointError(f"{key} is {part[key]!r}; what is added to quantized layers is not known")
    sym = True if config.get("sym") is True and not dynamic else None

    def check(facts: Facts, parts: Collection[str]) -> None:
        if dynamic:  # which may say something else of any layer
            return
        _check_groups(facts, group)
        if config.get("desc_act") and "g_idx" not in parts and facts.groups > 1:
            raise ValueError("it has no g_idx, and desc_act is true: which columns share a scale is not known")

    def decode(tensors: Tensors, facts: Facts) -> QuantizedWeight:
        qweight, qzeros, scales = _all_of(tensors, "qweight", "qzeros", "scales")
        order, bias = tensors["g_idx"], tensors["bias"]
        return from_gptq(qweight, qzeros, scales, order, facts.bits, version, sym=sym, bias=bias)

    def reference(tensors: Tensors, facts: Facts) -> verify.Reference:
        return verify.gptq_reference(tensors, facts.bits, version)

    method = Method("gptq", ("qweight", "qzeros", "scales"), ("g_idx", "bias"), _gptq_facts, decode, reference, check)
    return method, None if dynamic else (bits,)


def _gptq_version(config: Mapping[str, Any]) -> int:
    """How zero points are stored, by either of the two names that GPTQModel has for it."""
    found = {key: str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)}
    for key, layout in found.items():
        if layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{key} is {layout!r}; expected 'gptq' or 'gptq_v2'")
    if len(set(found.values())) > 1:
        raise CheckpointError(f"checkpoint_format is {found['checkpoint_format']!r}, and format {found['format']!r}")
    return 2 if "gptq_v2" in found.values() else 1


def _gptq_facts(shapes: Mapping[str, tuple[int, ...]], bits: int) -> Facts:
    """Bits from the zero points of a group, which are as many as there are columns."""
    (rows, n), (groups, words) = shapes["qweight"], shapes["qzeros"]
    if words * 32 % n or words * 32 // n not in (2, 3, 4, 8):
        raise ValueError(f"qzeros has shape {shapes['qzeros']}, which goes with no number of bits for {n} columns")
    found = words * 32 // n
    return Facts(n, rows * 32 // found, found, groups)


def _parse_awq(config: Mapping[str, Any]) -> tuple[Method, tuple[int, ...] | None]:
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(f"version is {version!r}; expected 'gemm'")
    bits = _bits(config, "w_bit" if "w_bit" in config else "bits", (4,))
    group = _group_size(config, "q_group_size" if "q_group_size" in config else "group_size")

    def decode(tensors: Tensors, facts: Facts) -> QuantizedWeight:
        qweight, qzeros, scales = _all_of(tensors, "qweight", "qzeros", "scales")
        return from_awq(qweight, qzeros, scales, facts.bits, bias=tensors["bias"])

    def facts(shapes: Mapping[str, tuple[int, ...]], bits: int) -> Facts:
        (k, words), groups = shapes["qweight"], shapes["qzeros"][0]
        return Facts(words * 8, k, 4, groups)

    def reference(tensors: Tensors, facts: Facts) -> verify.Reference:
        return verify.awq_reference(tensors)

    def check(facts: Facts, parts: Collection[str]) -> None:
        _check_groups(facts, group)

    return Method("awq", ("qweight", "qzeros", "scales"), ("bias",), facts, decode, reference, check), (bits,)


def _parse_compressed(config: Mapping[str, Any]) -> tuple[Method, tuple[int, ...] | None]:
    if config.get("format") != "pack-quantized":
        raise CheckpointError(f"format is {config.get('format')!r}; expected 'pack-quantized'")
    if config.get("sparsity_config"):
        raise CheckpointError("sparsity_config is given; sparse weights are not known")
    transforms = config.get("transform_config")
    if any(transforms.values()) if isinstance(transforms, Mapping) else transforms:
        raise CheckpointError("transform_config is given; rotations of activations and weights are not known")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"config_groups is {groups!r}; expected an object with a group or more")
    widths = {_group_bits(name, group) for name, group in groups.items()}

    def decode(tensors: Tensors, facts: Facts) -> QuantizedWeight:
        packed, scale, shape = _all_of(tensors, "weight_packed", "weight_scale", "weight_shape")
        return from_compressed(
            packed,
            scale,
            shape,
            tensors["weight_zero_point"],
            tensors["weight_g_idx"],
            facts.bits,
            bias=tensors["bias"],
        )

    def reference(tensors: Tensors, facts: Facts) -> verify.Reference:
        return verify.compressed_reference(tensors, facts.bits)

    required = ("weight_packed", "weight_scale", "weight_shape")
    optional = ("weight_zero_point", "weight_g_idx", "bias")
    return Method("compressed-tensors", required, optional, _compressed_facts, decode, reference), tuple(sorted(widths))


def _group_bits(name: str, group: Any) -> int:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"config_groups.{name} has no weights")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise CheckpointError(
                f"config_groups.{name} has {key}: only weights that are quantized by themselves are known"
            )
    if weights.get("type", "int") != "int":
        raise CheckpointError(f"config_groups.{name}: type is {weights.get('type')!r}; expected 'int'")
    if group.get("format") not in (None, "pack-quantized"):
        raise CheckpointError(f"config_groups.{name}: format is {group['format']!r}; expected 'pack-quantized'")
    return _bits(weights, "num_bits", tuple(range(1, 9)))


def _compressed_facts(shapes: Mapping[str, tuple[int, ...]], bits: int) -> Facts:
    """K is in `weight_shape` alone: taken as the most that the words hold."""
    (n, words), scale = shapes["weight_packed"], shapes["weight_scale"]
    return Facts(n, words * 32 // bits, bits, scale[1] if len(scale) == 2 else 1)


def _bits(config: Mapping[str, Any], key: str, allowed: tuple[int, ...]) -> int:
    bits = config.get(key)
    if type(bits) is not int or bits not in allowed:
        raise CheckpointError(f"{key} is {bits!r}; expected one of {', '.join(map(str, allowed))}")
    return bits


def _group_size(config: Mapping[str, Any], key: str) -> int | None:
    """None where nothing is said."""
    group = config.get(key)
    if group is not None and (type(group) is not int or (group < 1 and group != -1)):
        raise CheckpointError(f"{key} is {group!r}; expected -1 or a positive integer")
    return group


def _check_groups(facts: Facts, group: int | None) -> None:
    """Raise ValueError unless a layer has the groups that its config says."""
    if group is None:
        return
    expected = 1 if group == -1 else ceil(facts.k / group)
    if facts.groups != expected:
        raise ValueError(
            f"its scales are of {facts.groups} groups of its {facts.k} columns; group_size is {group} in config.json"
        )


def _all_of(tensors: Tensors, *names: str) -> list[torch.Tensor]:
    return [tensor for name in names if (tensor := tensors[name]) is not None]


_PARSERS: dict[str, Callable[[Mapping[str, Any]], tuple[Method, tuple[int, ...] | None]]] = {
    "gptq": _parse_gptq,
    "awq": _parse_awq,
    "compressed-tensors": _parse_compressed,
}


def find_layers(source: Shards, method: Method, bits: tuple[int, ...] | None) -> dict[str, Facts]:
    """The layers of a folder that a method stored.

    Parameters
    ----------
    source : Shards
        The folder's weights.
    method : Method
        Which method.
    bits : tuple of int, optional
        The bits of codes that its config names; None: any.

    Raises
    ------
    CheckpointError
        A layer lacks a tensor, or has one of a shape or dtype that cannot be.
    """
    main, *_ = method.required
    found = {}
    known = {*method.required, *method.optional}
    for tensor in source.infos:
        name, _, part = tensor.rpartition(".")
        if not name or part not in known | {"weight_global_scale"} or part in ("scales", "bias"):
            continue
        if f"{name}.{main}" not in source:
            raise CheckpointError(f"{source.where(tensor)} is there without {name}.{main}")
        if part not in known:
            raise CheckpointError(f"{source.where(tensor)} is not known to {method.name} with integers")
        if part == main:
            found[name] = _facts_of(source, name, method, bits)
    if not found:
        raise CheckpointError(
            f"{source.folder} has no tensor that ends in .{main}, though its quant_method is {method.name!r}"
        )
    return found


def _facts_of(source: Shards, name: str, method: Method, bits: tuple[int, ...] | None) -> Facts:
    main, *_ = method.required
    shapes = {}
    for part in method.required:
        tensor = f"{name}.{part}"
        if tensor not in source:
            raise CheckpointError(
                f"{source.folder} has no tensor {tensor}, which belongs to {source.where(f'{name}.{main}')}"
            )
        shapes[part] = source.infos[tensor].shape
        if part in ("qweight", "qzeros", "weight_packed"):
            info = source.infos[tensor]
            if info.dtype != "I32" or len(info.shape) != 2 or not all(info.shape):
                raise CheckpointError(
                    f"{source.where(tensor)} is {info.dtype} {info.shape}; expected I32 with two dimensions"
                )
    try:
        facts = method.facts(shapes, _likely_bits(source, name, method, bits))
        method.check(facts, [part for part in method.optional if f"{name}.{part}" in source])
    except ValueError as error:
        raise CheckpointError(f"{source.where(f'{name}.{main}')}: {error}") from error
    if bits is not None and facts.bits not in bits:
        expected = " or ".join(map(str, bits))
        raise CheckpointError(
            f"{source.where(f'{name}.{main}')} has codes of {facts.bits} bits; config.json says {expected}"
        )
    return facts


def _likely_bits(source: Shards, name: str, method: Method, bits: tuple[int, ...] | None) -> int:
    """Where a config names several: that which goes with the shape that is stored beside the codes."""
    if bits is None or len(bits) == 1 or method.name != "compressed-tensors":
        return bits[0] if bits else 0
    k = int(source.get(f"{name}.weight_shape")[-1])
    words = source.infos[f"{name}.weight_packed"].shape[1]
    for width in bits:
        if -(-k * width // 32) == words:
            return width
    raise CheckpointError(
        f"{source.where(f'{name}.weight_packed')} has {words} words a row, which no group of the config gives"
    )
