"""A matmul with its weight: what a layer calls, with everything checked once that does not change from call to call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..runtime import Kernels
from .arguments import Door


class BoundMatmul:
    """An operator and its operands.

    Parameters
    ----------
    door : Door
        The operator's.
    kernels : callable
        Gives the operator's kernels, which may change by tuning.
    tensors : tuple of torch.Tensor
        All operands but A, in the kernel's order, as the kernel takes them. They must stay in their memory.
    """

    __slots__ = ("_door", "_kernels", "tensors")

    def __init__(self, door: Door, kernels: Callable[[], Kernels], tensors: tuple[torch.Tensor, ...]) -> None:
        self._door, self._kernels, self.tensors = door, kernels, tensors

    def __call__(self, A: torch.Tensor) -> torch.Tensor:
        """See `Matmul.forward`."""
        m, operands, out = self._door.enter_bound(A, self.tensors)
        if m:
            self._kernels().launch(m, operands, out if out.dim() == 2 else out.view(m, -1))
        return out
