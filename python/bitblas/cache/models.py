"""Which operators a model needs: those of its quantized layers, as `bitblas.Linear` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints import open_folder, read_weight
from ..checkpoints.shards import read_json
from ..config import DEFAULT_BUCKETS, MatmulConfig
from ..errors import BitBLASError, CheckpointError


def configs_of_model(
    folder: str | Path, A_dtype: str | None = None, M: int | Sequence[int] | None = DEFAULT_BUCKETS
) -> dict[MatmulConfig, list[str]]:
    """The operators of a model that `bitblas repack` wrote, each with the names of the layers that share it.

    Parameters
    ----------
    folder : str or Path
        The model.
    A_dtype : str, optional
        The dtype that the model will run in; None: that of its config.json, or else that of a layer's scales.
    M : int, sequence of int, or None
        `opt_M` of the layers.

    Raises
    ------
    CheckpointError
        The folder is none of ours, or damaged; or a layer has no operator.
    """
    layers, shards = open_folder(folder)
    described = read_json(Path(folder) / "config.json")
    said = A_dtype or described.get("dtype") or described.get("torch_dtype")
    found: dict[MatmulConfig, list[str]] = {}
    for name, spec in layers.items():
        weight = read_weight(shards, name, spec)
        a_dtype = str(said or weight.scales.dtype).removeprefix("torch.")
        try:
            sizes = (weight.in_features, weight.out_features)
            layer = spec.empty_layer(*sizes, weight.bias is not None, a_dtype, opt_M=M)
        except BitBLASError as error:
            raise CheckpointError(f"{folder}: layer {name} has no operator: {error}") from error
        found.setdefault(layer.config, []).append(name)
    if not found:
        raise CheckpointError(f"{folder} has no quantized layers")
    return found
