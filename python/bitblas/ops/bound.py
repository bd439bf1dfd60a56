"""A matmul with its weight: what a layer calls, with everything checked once that does not change from call to call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .arguments import Door


class BoundMatmul:
    """An operator and its operands.

    Parameters
    ----------
    door : Door
        The operator's.
    run : callable
        Computes, given m, the operands and the output.
    tensors : tuple of torch.Tensor
        All operands but A, in the kernel's order, as the kernel takes them.
    """

    __slots__ = ("_checked", "_door", "_run", "tensors")

    def __init__(
        self,
        door: Door,
        run: Callable[[int, Sequence[torch.Tensor], torch.Tensor], None],
        tensors: tuple[torch.Tensor, ...],
    ) -> None:
        self._door, self._run, self.tensors = door, run, tensors
        self._checked = [(tensor, tensor.data_ptr()) for tensor in tensors]

    def holds(self) -> bool:
        """Whether all operands still have the memory in which they were checked, and none asks for a gradient."""
        for tensor, address in self._checked:
            if tensor.data_ptr() != address or tensor.requires_grad:
                return False
        return True

    def __call__(self, A: torch.Tensor) -> torch.Tensor:
        """See `Matmul.forward`."""
        m, operands, out = self._door.enter_bound(A, self.tensors)
        self._run(m, operands, out)
        return out
