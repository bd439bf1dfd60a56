"""Mixed-precision matrix multiplication for PyTorch: quantized weights times wide activations, compiled with TVM.

Importing this imports torch, and nothing of TVM: that happens when an operator is first compiled.
"""

from __future__ import annotations

from ._version import __version__
from .config import MatmulConfig
from .errors import ArgumentError, ArtifactError, BitBLASError, BuildError, ConfigError, UnsupportedError
from .logs import set_log_level
from .ops import Matmul

__all__ = [
    "ArgumentError",
    "ArtifactError",
    "BitBLASError",
    "BuildError",
    "ConfigError",
    "Matmul",
    "MatmulConfig",
    "UnsupportedError",
    "__version__",
    "set_log_level",
]


def __getattr__(name: str) -> object:
    if name == "tvm":  # two seconds, so only when touched
        import tvm

        return tvm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
