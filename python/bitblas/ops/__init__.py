"""Operators: the only place that strings plan, artifacts, build and runtime together."""

from ..config import MatmulConfig
from .matmul import Matmul

__all__ = ["Matmul", "MatmulConfig"]
