"""What is computed, as tensor expressions: no tiles of the machine, no threads. Importing this imports TVM."""

from .matmul import BLOCKS, MatmulExpr, matmul_func

__all__ = ["BLOCKS", "MatmulExpr", "matmul_func"]
