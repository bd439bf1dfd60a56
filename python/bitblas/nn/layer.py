"""What is called alike in all layers with a quantized weight."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentError
from ..ops import Matmul
from ..ops.bound import BoundMatmul
from .portable import Portable
from .stand_in import WeightStandIn
from .state import FLOATS

#: Devices that autocast knows, of those that there are kernels for.
_AUTOCAST_DEVICES = ("cpu", "cuda")


def under_autocast(A: torch.Tensor) -> bool:
    """Whether autocast may change the dtype of A."""
    kind = A.device.type
    return kind in _AUTOCAST_DEVICES and A.is_floating_point() and torch.is_autocast_enabled(kind)


class QuantizedLayer(Portable):
    """A module that multiplies its input with a quantized weight in its buffers."""

    def __getattr__(self, name: str) -> Any:
        """Of a quantized layer `weight` says the dtype, the device and the shape that models ask a layer for."""
        if name == "weight" and self.__dict__.get("_operator") is not None and self._weight_name != "weight":
            config = self.config
            dtype = getattr(torch, config.A_dtype if config.A_dtype in FLOATS else config.held_dtype)
            return WeightStandIn.of((config.N, config.K), dtype, self.device)
        return super().__getattr__(name)

    @property
    def bitblas_matmul(self) -> Matmul:
        """The operator, shared with layers of the same config on the same kind of device."""
        return self._operator

    in_features = property(lambda self: self.config.K)
    out_features = property(lambda self: self.config.N)

    def forward(self, A: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """Compute A · dequantize(W)ᵀ (+ bias).

        Parameters
        ----------
        A : torch.Tensor
            (..., in_features) in A_dtype, on the layer's device; under autocast any float.
        output : torch.Tensor, optional
            (..., out_features) in out_dtype, contiguous, to be filled and returned.

        Returns
        -------
        torch.Tensor
            (..., out_features) in out_dtype.

        Raises
        ------
        ArgumentError
            A tensor is of the wrong shape, dtype or device, or asks for a gradient that there is not.
        BuildError, ArtifactError, UnsupportedError
            By the first call, as for the constructor of `Matmul`.
        """
        if output is None and not torch.compiler.is_compiling():
            bound = self._bound
            if bound is None or not bound.holds():
                bound = self._bind()
            out = None if bound is None else bound(A)
            if out is not None:
                return out
        return self._forward(A, output)

    def _bind(self) -> BoundMatmul | None:
        """Check the buffers once, for the calls that follow; None where some have to be converted at each call."""
        names = (self._weight_name, *self._floating, "perm")
        *places, order = ((self._buffers if name in self._buffers else self._parameters, name) for name in names)
        self._bound = self._operator.bind(places, order)
        return self._bound

    def _order(self, A: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
        """The activations in the order of the weight's columns."""
        if not A.dim() or A.shape[-1] != self.config.K:
            raise ArgumentError(f"A has shape {tuple(A.shape)}; its last dimension must be K = {self.config.K}")
        return A.index_select(-1, perm)

    def _forward(self, A: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """All that may have to be done: conversions, gradients, graphs, errors."""
        a_dtype = self.config.A_dtype
        if not isinstance(A, torch.Tensor):
            raise ArgumentError(f"A is a {type(A).__name__}; it must be a torch.Tensor")
        if a_dtype in FLOATS and under_autocast(A):
            A = A.to(getattr(torch, a_dtype))
        if torch.is_grad_enabled():
            for name in (self._weight_name, self._scale_name, "zeros"):
                tensor = self._tensor(name)
                if tensor is not None and tensor.requires_grad:
                    raise ArgumentError(
                        f"{name} requires a gradient, and a quantized weight has none: gradients flow to the input and the "
                        f"bias. Call requires_grad_(False) on it"
                    )
        perm = self._tensor("perm")
        return self._operator(
            A if perm is None else self._order(A, perm),
            self._weight,
            scale=self._tensor(self._scale_name),
            zeros=self._tensor("zeros"),
            bias=self._tensor("bias"),
            output=output,
        )

    def warmup(self, topk: int = 20) -> None:
        """Choose the fastest tilings by measuring, as `Matmul.hardware_aware_finetune`, and remember them."""
        self._operator.hardware_aware_finetune(topk=topk)
