"""Operators: the only place that strings plan, artifacts, build and runtime together."""

import importlib

from ..config import FlashAttenConfig, MatmulConfig
from . import torch_attention  # noqa: F401 - so that a graph which was exported with it can be loaded
from .matmul import Matmul

#: Where the operators are that few need: `import bitblas` does without them.
_MODULES = {
    "FlashAtten": "attention",
    "LOP3Permutate": "lop3_permutate",
    "LOP3PermutateConfig": "lop3_permutate",
    "LadderPermutate": "ladder_permutate",
    "LadderPermutateConfig": "ladder_permutate",
    "MatmulConfigWithSplitK": "general_matmul_splitk",
    "MatmulWithSplitK": "general_matmul_splitk",
    "QuantCompress": "quant_compress",
    "QuantCompressConfig": "quant_compress",
}

__all__ = ["FlashAttenConfig", "Matmul", "MatmulConfig", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
