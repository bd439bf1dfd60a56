"""Layers for torch models."""

from .bitlinear import BitLinear
from .linear import Linear
from .replace import deploy, quantize_, ternarize_

__all__ = ["BitLinear", "Linear", "deploy", "quantize_", "ternarize_"]
