"""Door of the public API: functions on quantized weights that other projects import."""

from .utils import gen_quant4, general_compress, interleave_weight

__all__ = ["gen_quant4", "general_compress", "interleave_weight"]
