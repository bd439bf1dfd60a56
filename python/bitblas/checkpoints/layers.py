"""The pieces of a repacked folder: layers from a foreign method, or rounded from dense weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch

from ..codecs import QuantizedWeight, format_tensor
from ..codecs.rounding import quantize
from ..errors import CheckpointError
from ..formats import parse_format
from . import verify
from .convert import Piece
from .folder import read_weight
from .foreign import Facts, Method
from .shards import Shards
from .spec import PARTS, LayerSpec
from .writing import ShardWriter, as_bytes


@dataclass(frozen=True)
class MadeLayer:
    """A layer that is written quantized: its name, what is known of it, and the tensors that it is made from."""

    name: str
    facts: Facts
    inputs: tuple[str, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Its tensors."""
        return tuple(f"{self.name}.{part}" for part in PARTS)

    @property
    def max_bytes(self) -> int:
        """Of all its tensors, at most: scales are not known before they are read, and float32 at most."""
        facts = self.facts
        codes = facts.n * ceil(facts.k * facts.bits / 8)
        scales = facts.n * facts.groups * 4
        zeros = facts.groups * ceil(facts.n * facts.bits / 8)
        return codes + scales + zeros + 4 * facts.k + 8 * facts.n + 4096


@dataclass(frozen=True)
class ForeignLayer(MadeLayer):
    """A layer that another project quantized."""

    method: Method

    def _tensors(self, source: Shards) -> dict[str, torch.Tensor | None]:
        return {part: source.find(f"{self.name}.{part}") for part in (*self.method.required, *self.method.optional)}

    def write(self, source: Shards, writer: ShardWriter) -> dict[str, Any]:
        """Convert it."""
        return add_weight(writer, self.name, self.method.decode(self._tensors(source), self.facts))

    def check(self, source: Shards, made: Shards, note: Any) -> None:
        """Compare it with what the source's tensors stand for."""
        tensors = self._tensors(source)
        weight = read_weight(made, self.name, LayerSpec.from_json(self.name, note))
        verify.check_weight(self.name, self.method.reference(tensors, self.facts), weight)
        check_bias(self.name, tensors["bias"], weight.bias)


@dataclass(frozen=True)
class Rounding:
    """How dense weights are rounded: see `codecs.quantize`."""

    W_dtype: str
    group_size: int
    symmetric: bool | None


@dataclass(frozen=True)
class DenseLayer(MadeLayer):
    """A dense layer that is rounded to the nearest code."""

    rounding: Rounding

    def write(self, source: Shards, writer: ShardWriter) -> dict[str, Any]:
        """Round it."""
        dense, bias, how = source.get(f"{self.name}.weight"), source.find(f"{self.name}.bias"), self.rounding
        return add_weight(writer, self.name, quantize(dense, how.W_dtype, how.group_size, how.symmetric, bias=bias))

    def check(self, source: Shards, made: Shards, note: Any) -> None:
        """Compare each value with that of the source, to the bound of rounding."""
        weight = read_weight(made, self.name, LayerSpec.from_json(self.name, note))
        verify.check_rounding(self.name, source.get(f"{self.name}.weight"), weight)
        check_bias(self.name, source.find(f"{self.name}.bias"), weight.bias)


@dataclass(frozen=True)
class Contents:
    """What becomes of a folder.

    Attributes
    ----------
    layers : sequence of Piece
        Those that are written quantized. Their tensors, and those of `dropped`, are not copied.
    config : Mapping
        What `config.json` says beside how these are quantized.
    new_names : Mapping
        Of tensors that are copied, those that get another name.
    dropped : collection of str
        Tensors that nothing is made of.
    """

    layers: Sequence[Piece]
    config: Mapping[str, Any]
    new_names: Mapping[str, str] = field(default_factory=dict)
    dropped: Collection[str] = ()


def add_weight(
    writer: ShardWriter, name: str, weight: QuantizedWeight, **activations: str | float | None
) -> dict[str, Any]:
    """Write a layer's tensors; return its entry of `config.json`, which says what is done to its `activations`, too."""
    spec = replace(LayerSpec.of(weight), **activations)  # type: ignore[arg-type]  # each key has its own type
    tensors: Mapping[str, torch.Tensor | None] = {
        "qweight": weight.packed,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "perm": weight.perm,
        "bias": weight.bias,
        "format": format_tensor(spec.W_dtype, spec.group_size, spec.zeros_mode),
    }
    for part in PARTS:
        tensor = tensors[part]
        if tensor is not None:
            writer.add(f"{name}.{part}", tensor)
    return spec.to_json()


def check_bias(name: str, wanted: torch.Tensor | None, found: torch.Tensor | None) -> None:
    """Compare a bias bit by bit."""
    if (wanted is None) != (found is None):
        raise CheckpointError(f"{name}: the bias was {'lost' if found is None else 'made up'}")
    if wanted is not None and found is not None and not torch.equal(as_bytes(wanted), as_bytes(found)):
        raise CheckpointError(f"{name}: the bias that was written differs from the source's")


def dense_facts(shape: tuple[int, ...], rounding: Rounding) -> Facts:
    """What a dense weight becomes.

    Raises
    ------
    ValueError
        The group size does not divide K.
    """
    n, k = shape
    group = k if rounding.group_size == -1 else rounding.group_size
    if k % group:
        raise ValueError(
            f"has {k} columns, which groups of {group} do not divide: take another --group-size, or --exclude it"
        )
    return Facts(n, k, parse_format(rounding.W_dtype).bits, k // group)
