"""Operators: the only place that strings plan, artifacts, build and runtime together."""

from ..config import MatmulConfig
from .general_matmul_splitk import MatmulConfigWithSplitK, MatmulWithSplitK
from .ladder_permutate import LadderPermutate, LadderPermutateConfig
from .lop3_permutate import LOP3Permutate, LOP3PermutateConfig
from .matmul import Matmul
from .quant_compress import QuantCompress, QuantCompressConfig

__all__ = [
    "LOP3Permutate",
    "LOP3PermutateConfig",
    "LadderPermutate",
    "LadderPermutateConfig",
    "Matmul",
    "MatmulConfig",
    "MatmulConfigWithSplitK",
    "MatmulWithSplitK",
    "QuantCompress",
    "QuantCompressConfig",
]
