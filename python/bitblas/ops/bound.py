"""A matmul with its weight: what a layer calls, with everything checked once that does not change from call to call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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

    Attributes
    ----------
    dtype : torch.dtype
        What A must have.
    """

    __slots__ = ("_door", "_kernels", "_places", "dtype", "tensors")

    def __init__(self, door: Door, kernels: Callable[[], Kernels], tensors: tuple[torch.Tensor, ...]) -> None:
        self._door, self._kernels, self.tensors = door, kernels, tensors
        self.dtype = door.dtype
        self._places: list[tuple[Mapping[str, object], str, torch.Tensor, int]] = []

    def at(self, places: Sequence[tuple[Mapping[str, object], str]]) -> BoundMatmul:
        """Remember that the tensors, in their order, are found in mappings by names."""
        self._places = [(home, name, t, t.data_ptr()) for (home, name), t in zip(places, self.tensors, strict=True)]
        return self

    def holds(self) -> bool:
        """Whether the tensors are still found there, and in the same memory."""
        for home, name, tensor, address in self._places:
            if home.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def __call__(self, A: torch.Tensor) -> torch.Tensor:
        """See `Matmul.forward`."""
        m, operands, out = self._door.enter_bound(A, self.tensors)
        if m:
            self._kernels().launch(m, operands, out if out.dim() == 2 else out.view(m, -1))
        return out
