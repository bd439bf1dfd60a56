"""What is computed, as tensor expressions: no tiles of the machine, no threads. Importing this imports TVM."""

from .matmul import MatmulExpr, matmul_func

__all__ = ["MatmulExpr", "matmul_func"]
