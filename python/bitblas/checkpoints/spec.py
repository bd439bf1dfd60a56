"""What `config.json` says of the quantized layers of one of our folders, and how that is written and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..codecs import QuantizedWeight
from ..codecs.weight import ZEROS_MODES
from ..config import DEFAULT_BUCKETS, DYNAMIC_QUANTIZATIONS
from ..errors import CheckpointError, ConfigError
from ..formats import parse_format
from ..nn.linear import Linear

QUANT_METHOD = "bitblas"
FORMAT_VERSION = 1

#: The tensors of a layer, without its prefix; those after the first two are there where the layer has them, `format` always.
PARTS = ("qweight", "scales", "zeros", "perm", "bias", "format")
#: The factors of a norm in front of the layer, where it has one.
NORM = "rms_norm.weight"
#: What an entry says only where it is something else than None.
_OPTIONAL = ("in_features", "dynamic_quantization", "activation_eps", "rms_norm_eps")


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized.

    Attributes
    ----------
    W_dtype : str
        Name of the format.
    group_size : int
        How many consecutive columns share a scale; -1: all.
    zeros_mode : str or None
        ``"original"``, ``"rescale"``, ``"quantized"``; None where there are no zero points.
    act_order : bool
        Whether there is a `perm`.
    in_features : int or None
        K, where the tensors do not tell it: one group, no `perm`, and pad bits at the end of a row.
    dynamic_quantization : str or None
        How activations are rounded to int8: ``"row"``, ``"group"``; None: not at all.
    activation_eps : float or None
        The least magnitude that a row of them is taken to have; None: that of `MatmulConfig`.
    rms_norm_eps : float or None
        The eps of an RMSNorm that activations pass first, whose factors are the tensor `rms_norm.weight` of the layer; None:
        there is none.
    """

    W_dtype: str
    group_size: int
    zeros_mode: str | None = None
    act_order: bool = False
    in_features: int | None = None
    dynamic_quantization: str | None = None
    activation_eps: float | None = None
    rms_norm_eps: float | None = None

    @staticmethod
    def of(weight: QuantizedWeight) -> LayerSpec:
        """The spec of a weight."""
        told = weight.group_size != -1 or weight.perm is not None or weight.in_features * weight.format.bits % 8 == 0
        return LayerSpec(
            W_dtype=weight.W_dtype,
            group_size=weight.group_size,
            zeros_mode=None if weight.zeros is None else weight.zeros_mode,
            act_order=weight.perm is not None,
            in_features=None if told else weight.in_features,
        )

    def to_json(self) -> dict[str, Any]:
        """The entry of `config.json`."""
        entry: dict[str, Any] = {
            "W_dtype": self.W_dtype,
            "group_size": self.group_size,
            "zeros_mode": self.zeros_mode,
            "act_order": self.act_order,
        }
        return entry | {key: value for key in _OPTIONAL if (value := getattr(self, key)) is not None}

    def empty_layer(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: str,
        opt_M: int | Sequence[int] | None = DEFAULT_BUCKETS,
        kind: type[Linear] = Linear,
    ) -> Linear:
        """A layer for such a weight, on the device meta, for activations and outputs of one dtype; `kind` is its class.

        Raises
        ------
        ConfigError, UnsupportedError
            There is none.
        """
        return kind(
            in_features,
            out_features,
            bias,
            A_dtype=dtype,
            W_dtype=self.W_dtype,
            accum_dtype="float32",
            out_dtype=dtype,
            group_size=self.group_size,
            with_scaling=True,
            with_zeros=self.zeros_mode is not None,
            zeros_mode=self.zeros_mode,
            opt_M=opt_M,
            device="meta",
            act_order=self.act_order,
            dynamic_quantization=self.dynamic_quantization,
            activation_eps=self.activation_eps,
        )

    @staticmethod
    def from_json(name: str, entry: object) -> LayerSpec:
        """Read an entry, that of the layer `name`.

        Raises
        ------
        CheckpointError
            Something is missing, unknown or of another kind.
        """
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"layer {name} is {entry!r}; expected an object")
        required = {"W_dtype", "group_size", "zeros_mode", "act_order"}
        missing, unknown = required - set(entry), set(entry) - required - set(_OPTIONAL)
        if missing or unknown:
            wrong = f"has no {min(missing)!r}" if missing else f"has {min(unknown)!r}, which is not known"
            raise CheckpointError(f"layer {name} {wrong}")
        try:
            fmt = parse_format(entry["W_dtype"])
        except ConfigError as error:
            raise CheckpointError(f"layer {name}: {error}") from error
        group, features = entry["group_size"], entry.get("in_features")
        if fmt.is_native:
            raise CheckpointError(f"layer {name}: W_dtype is {fmt.name!r}, which is not quantized")
        if type(group) is not int or (group < 1 and group != -1):
            raise CheckpointError(f"layer {name}: group_size is {group!r}; expected -1 or a positive integer")
        if entry["zeros_mode"] is not None and entry["zeros_mode"] not in ZEROS_MODES:
            raise CheckpointError(f"layer {name}: zeros_mode is {entry['zeros_mode']!r}; expected null, {ZEROS_MODES}")
        if type(entry["act_order"]) is not bool:
            raise CheckpointError(f"layer {name}: act_order is {entry['act_order']!r}; expected true or false")
        if features is not None and (type(features) is not int or features < 1):
            raise CheckpointError(f"layer {name}: in_features is {features!r}; expected a positive integer")
        rows = entry.get("dynamic_quantization")
        if rows is not None and rows not in DYNAMIC_QUANTIZATIONS:
            raise CheckpointError(f"layer {name}: dynamic_quantization is {rows!r}; expected {DYNAMIC_QUANTIZATIONS}")
        eps = {key: _number(name, key, entry.get(key)) for key in ("activation_eps", "rms_norm_eps")}
        if rows is None and eps["activation_eps"] is not None:
            raise CheckpointError(f"layer {name} has 'activation_eps', and its activations are not quantized")
        return LayerSpec(fmt.name, group, entry["zeros_mode"], entry["act_order"], features, rows, **eps)


def _number(name: str, key: str, value: object) -> float | None:
    """A positive number of an entry, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise CheckpointError(f"layer {name}: {key} is {value!r}; expected a positive number")
    return float(value)


def make_config(layers: Mapping[str, LayerSpec], dense: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a folder.

    Parameters
    ----------
    layers : Mapping
        The quantized layers by name.
    dense : iterable of str
        The linear layers that are not quantized.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "modules_to_not_convert": sorted(dense),
        "layers": {name: spec.to_json() for name, spec in layers.items()},
    }


def parse_config(config: object) -> dict[str, LayerSpec]:
    """The layers of a `quantization_config`, the inverse of `make_config`.

    Raises
    ------
    CheckpointError
        It is not ours, of a newer version, or malformed.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config is {config!r}; expected an object")
    if config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"quant_method is {config.get('quant_method')!r}; expected {QUANT_METHOD!r}")
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"format_version is {version!r}; expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version is {version}; this bitblas knows versions up to {FORMAT_VERSION}: install a newer one"
        )
    layers = config.get("layers")
    if not isinstance(layers, Mapping):
        raise CheckpointError(f"layers is {layers!r}; expected an object with an entry for each quantized layer")
    return {name: LayerSpec.from_json(name, entry) for name, entry in layers.items()}
