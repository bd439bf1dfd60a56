"""What clients read of an operator, by the names that they know."""

from __future__ import annotations

from functools import cached_property

import torch

from ..config import MatmulConfig


class WithFacts:
    """The facts of an operator's config."""

    config: MatmulConfig

    M = property(lambda self: self.config.M)
    N = property(lambda self: self.config.N)
    K = property(lambda self: self.config.K)
    A_dtype = property(lambda self: self.config.A_dtype)
    W_dtype = property(lambda self: self.config.W_dtype)
    out_dtype = property(lambda self: self.config.out_dtype)
    accum_dtype = property(lambda self: self.config.accum_dtype)
    storage_dtype = property(lambda self: self.config.storage_dtype)
    with_scaling = property(lambda self: self.config.with_scaling)
    with_zeros = property(lambda self: self.config.with_zeros)
    with_bias = property(lambda self: self.config.with_bias)
    group_size = property(lambda self: self.config.group_size)
    zeros_mode = property(lambda self: self.config.zeros_mode)
    dynamic_quantization = property(lambda self: self.config.dynamic_quantization)
    activation_eps = property(lambda self: self.config.activation_eps)
    scale_per_tensor = property(lambda self: self.config.scale_per_tensor)
    fast_decoding = property(lambda self: self.config.fast_decoding)
    propagate_a = property(lambda self: False)
    propagate_b = property(lambda self: False)

    @property
    def bit(self) -> int:
        """Bits of a weight."""
        return self.config.format.bits

    @property
    def source_format(self) -> str:
        """The format's family, as the original BitBLAS names it: uint, int, nf, fp, fp_e4m3, fp_e5m2 or bf."""
        names = {"nf4": "nf", "float8_e4m3": "fp_e4m3", "float8_e5m2": "fp_e5m2", "bfloat16": "bf"}
        fmt = self.config.format
        return fmt.kind if fmt.is_integer else names.get(fmt.name, "fp")

    @cached_property
    def lut(self) -> torch.Tensor | None:
        """The (16,) values of nf4, in the dtype of scales, on the CPU; None for other formats."""
        if self.config.W_dtype != "nf4":
            return None
        dtype = getattr(torch, self.config.scale_dtype)
        return torch.tensor(self.config.format.codebook, dtype=dtype, device="cpu")  # whatever the default device is
