"""What is computed, as tensor expressions: no tiles of the machine, no threads. Importing this imports TVM."""

from .attention import attention_func
from .matmul import MatmulExpr, matmul_func

__all__ = ["MatmulExpr", "attention_func", "matmul_func"]
