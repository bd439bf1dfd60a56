"""Another name of what `bitblas.ops` exports on Matmul, as the original BitBLAS has it."""

from ..config import MatmulConfig
from .common import OptimizeStrategy, TransformKind
from .matmul import Matmul

__all__ = ["Matmul", "MatmulConfig", "OptimizeStrategy", "TransformKind"]
