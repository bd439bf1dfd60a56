"""Mixed-precision matrix multiplication for PyTorch: quantized weights times wide activations, compiled with TVM.

Importing this imports torch, and nothing of TVM: that happens when an operator is first compiled.
"""

from __future__ import annotations

import importlib

from ._version import __version__
from .config import FlashAttenConfig, MatmulConfig
from .errors import (
    ArgumentError,
    ArtifactError,
    BitBLASError,
    BuildError,
    CheckpointError,
    ConfigError,
    RemoteError,
    UnsupportedError,
)
from .logs import logger, set_log_level
from .ops import Matmul
from .utils import auto_detect_nvidia_target

__all__ = [
    "ArgumentError",
    "ArtifactError",
    "BitBLASError",
    "BitLinear",
    "BuildError",
    "CheckpointError",
    "ConfigError",
    "FlashAtten",
    "FlashAttenConfig",
    "Linear",
    "Matmul",
    "MatmulConfig",
    "MatmulConfigWithSplitK",
    "MatmulWithSplitK",
    "RemoteError",
    "UnsupportedError",
    "__version__",
    "auto_detect_nvidia_target",
    "deploy",
    "load_model",
    "logger",
    "quantize_",
    "set_log_level",
    "ternarize_",
]


#: Importable as attributes, without being loaded by `import bitblas`.
_SUBMODULES = ("cache", "checkpoints", "codecs", "module", "nn", "quantization")
_LAZY = {
    "BitLinear": "nn",
    "FlashAtten": "ops",
    "Linear": "nn",
    "MatmulConfigWithSplitK": "ops",
    "MatmulWithSplitK": "ops",
    "deploy": "nn",
    "load_model": "checkpoints.load",
    "quantize_": "nn",
    "ternarize_": "nn",
}


def __getattr__(name: str) -> object:
    if name == "tvm":  # two seconds, so only when touched
        import tvm

        return tvm
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
