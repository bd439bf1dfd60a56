"""Our folders back to dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import ArgumentError, CheckpointError
from . import verify
from .convert import Copy, Piece, Summary, Task, convert
from .folder import open_folder, read_weight
from .journal import check_folders
from .layers import check_bias
from .shards import Shards, read_json
from .spec import PARTS, LayerSpec
from .writing import ShardWriter

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class UnpackedLayer:
    """A quantized layer that becomes dense."""

    name: str
    spec: LayerSpec
    dtype: torch.dtype
    inputs: tuple[str, ...]
    max_bytes: int

    @property
    def outputs(self) -> tuple[str, ...]:
        """Its tensors."""
        return (f"{self.name}.weight", f"{self.name}.bias")

    def write(self, source: Shards, writer: ShardWriter) -> dict[str, Any]:
        """Dequantize it."""
        weight = read_weight(source, self.name, self.spec)
        dense = weight.dequantize(self.dtype)
        if not dense.isfinite().all():
            self._fail(source, "scales")
        writer.add(f"{self.name}.weight", dense)
        if weight.bias is not None:
            bias = weight.bias.to(self.dtype)
            if not bias.isfinite().all():
                self._fail(source, "bias")
            writer.add(f"{self.name}.bias", bias)
        return self.spec.to_json()

    def _fail(self, source: Shards, part: str) -> NoReturn:
        """Say that values are too large for the dtype, or were no numbers."""
        name = str(self.dtype).removeprefix("torch.")
        reason = f"{source.where(f'{self.name}.{part}')} gives values that {name} cannot hold"
        if self.dtype is torch.float16 and source.get(f"{self.name}.{part}").isfinite().all():
            reason += ": take another dtype (--dtype bfloat16)"
        raise CheckpointError(reason)

    def check(self, source: Shards, made: Shards, note: Any) -> None:
        """Compare it with the values that its codes stand for, rounded to the dtype."""
        weight = read_weight(source, self.name, self.spec)
        verify.check_dense(self.name, weight, made.get(f"{self.name}.weight"))
        bias = None if weight.bias is None else weight.bias.to(self.dtype)
        check_bias(self.name, bias, made.find(f"{self.name}.bias"))


def unpack(src: str | Path, dst: str | Path, *, dtype: str = "float16", verify: bool = True) -> Summary:
    """Make a dense folder of one of ours.

    Parameters
    ----------
    src : str or Path
        What `repack` made.
    dst : str or Path
        Where to write: missing, empty, or left by an unfinished run, which is continued.
    dtype : str
        "float16", "bfloat16" or "float32", for the layers that were quantized. All other tensors are copied.
    verify : bool
        Whether each layer is read back and compared with its source.

    Returns
    -------
    Summary

    Raises
    ------
    ArgumentError
        An argument is not allowed.
    CheckpointError
        `src` is damaged or none of ours, a value is beyond `dtype`, or `dst` holds something else or cannot be written.
    """
    source_path, target = Path(src), Path(dst)
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
    check_folders(source_path, target)
    config = read_json(source_path / "config.json")
    specs, source = open_folder(source_path)
    layers: list[Piece] = []
    for name, spec in specs.items():
        inputs = tuple(f"{name}.{part}" for part in PARTS if f"{name}.{part}" in source)
        weight = read_weight(source, name, spec)
        if spec.rms_norm_eps is not None:
            raise CheckpointError(f"{name} has an RMSNorm in front of it, for which a dense model has no place")
        max_bytes = (weight.out_features * (weight.in_features + 1)) * _DTYPES[dtype].itemsize
        layers.append(UnpackedLayer(name, spec, _DTYPES[dtype], inputs, max_bytes))
    taken = {name for layer in layers for name in layer.inputs}
    copies = [Copy(name, info.num_bytes) for name, info in source.infos.items() if name not in taken]

    def new_config(notes: Mapping[str, Any]) -> dict[str, Any]:
        dense = {
            key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "torch_dtype")
        }
        return {**dense, "torch_dtype" if "torch_dtype" in config else "dtype": dtype}

    return convert(source, target, Task("unpack", {"dtype": dtype}, [*layers, *copies], new_config), verify)
