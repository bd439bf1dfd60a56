"""A quantized layer whose activations are normalized first, as BitNet's may be."""

from __future__ import annotations

import torch

from bitblas.nn import Linear


class NormedLinear(Linear):
    """A `bitblas.Linear` with an RMSNorm in front of it, as transformers has it in its layers for BitNet (`use_rms_norm`).

    Attributes
    ----------
    rms_norm : torch.nn.Module
        The norm, of `in_features`; to be set when the layer is made.
    """

    rms_norm: torch.nn.Module

    def forward(self, A: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize A, and multiply it as `bitblas.Linear` does."""
        return super().forward(self.rms_norm(A), output)


def make_norm(layer: Linear, eps: float, dtype: torch.dtype) -> torch.nn.Module:
    """A norm for the input of a layer, on its device."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm  # only here: it takes time

    with layer.device:
        return LlamaRMSNorm(layer.in_features, eps=eps).to(dtype)
