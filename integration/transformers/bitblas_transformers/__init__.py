"""Lets transformers load, run, quantize and save models whose linear layers are bitblas's: importing this registers it.

>>> import bitblas_transformers
>>> model = AutoModelForCausalLM.from_pretrained(folder)  # one that `bitblas repack` or `save_pretrained` wrote
"""

from .bitnet import replace_bitnet_
from .config import BitBLASConfig
from .quantizer import BitBLASHfQuantizer

__all__ = ["BitBLASConfig", "BitBLASHfQuantizer", "replace_bitnet_"]
