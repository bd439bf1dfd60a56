"""Foreign tensors to and from codes, scales and zero points: one file for each family of checkpoints."""

from .weight import QuantizedWeight

__all__ = ["QuantizedWeight"]
