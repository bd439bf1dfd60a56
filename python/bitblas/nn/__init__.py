"""Layers for torch models."""

from .linear import Linear
from .replace import quantize_

__all__ = ["Linear", "quantize_"]
