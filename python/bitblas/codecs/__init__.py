"""Foreign tensors to and from codes, scales and zero points: one file for each family of checkpoints."""

from .awq import from_awq
from .bitnet import from_bitnet
from .compressed_tensors import from_compressed
from .gptq import from_gptq, from_gptq_module
from .rounding import quantize
from .weight import QuantizedWeight, format_tensor, parse_format_tensor

__all__ = [
    "QuantizedWeight",
    "format_tensor",
    "from_awq",
    "from_bitnet",
    "from_compressed",
    "from_gptq",
    "from_gptq_module",
    "parse_format_tensor",
    "quantize",
]
