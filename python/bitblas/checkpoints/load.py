"""A folder of ours, loaded by transformers and ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, CheckpointError, UnsupportedError
from .bitnet import has_latent_weights
from .shards import Shards, open_shards, read_json
from .spec import QUANT_METHOD, parse_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INSTALL = "pip install 'bitblas[transformers]'"


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a quantized model, with its kernels built and in evaluation mode.

    Parameters
    ----------
    folder : str or Path
        What `bitblas repack` made, or `save_pretrained` of a model with quantized layers.
    dtype : torch.dtype or str, optional
        float32, float16 or bfloat16, of activations and of all that is not quantized. None: what config.json says.
    device : torch.device or str, optional
        Where to load it. None: the current CUDA device, where torch has one, else the CPU.
    **options
        For `from_pretrained` of transformers, such as ``attn_implementation`` or, in the place of `device`, ``device_map``.

    Returns
    -------
    transformers.PreTrainedModel
        Of the class that config.json names.

    Raises
    ------
    CheckpointError
        The folder is none of ours, or damaged, or lacks a tensor of the model; of one that another library quantized the
        message says how to convert it.
    ConfigError
        Activations cannot have the dtype.
    UnsupportedError
        transformers is not installed.
    ArgumentError
        Both `device` and ``device_map`` are given.
    BuildError, ArtifactError
        As the constructor of `Matmul`.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    _check_method(folder, config)
    try:
        import transformers
    except ImportError as error:
        reason = f"load_model needs transformers, which cannot be imported ({error}): {_INSTALL}"
        raise UnsupportedError(reason) from error
    import bitblas_transformers  # noqa: F401 - it registers itself

    if "device_map" in options and device is not None:
        raise ArgumentError(f"device is {device} and device_map is {options['device_map']!r}: give one of them")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if {place.type, torch.get_default_device().type} != {"cpu"}:  # a device_map asks for accelerate
        options.setdefault("device_map", place)
    loader: Any = transformers.AutoModelForCausalLM
    for name in config.get("architectures") or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            loader = named
    shards, wants_report = open_shards(folder), options.pop("output_loading_info", False)
    may_differ = options.pop("ignore_mismatched_sizes", False)
    model, report = loader.from_pretrained(
        folder,
        dtype="auto" if dtype is None else dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    if not may_differ:
        _check_report(shards, report)
    return (model, report) if wants_report else model  # type: ignore[return-value]  # what the option asks for


def _check_report(shards: Shards, report: Mapping[str, Any]) -> None:
    """Refuse what transformers fills with random numbers: tensors that no file has, or has in another shape."""
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise CheckpointError(f"{shards.where(name)} has shape {tuple(found)}; the model takes {tuple(wanted)}")
    for name in sorted(report["missing_keys"]):
        raise CheckpointError(f"{name} is in no file of {shards.folder}")


def _check_method(folder: Path, config: dict[str, Any]) -> None:
    path, quantization = folder / "config.json", config.get("quantization_config")
    if quantization is None and has_latent_weights(config):
        raise CheckpointError(
            f"{path} is that of a BitNet model with float weights. Convert the folder first: "
            f"bitblas repack {folder} DESTINATION"
        )
    if quantization is None:
        raise CheckpointError(
            f"{path} has no quantization_config: the model is dense. Load it with transformers, and quantize it with "
            "bitblas.quantize_ or with quantization_config=bitblas_transformers.BitBLASConfig()"
        )
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"{path}: quant_method is {method!r}; expected {QUANT_METHOD!r}. Convert the folder first: "
            f"bitblas repack {folder} DESTINATION"
        )
    try:
        parse_config(quantization)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
