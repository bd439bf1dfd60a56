"""A matmul with its weight: what a layer calls, with everything checked once that does not change from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..runtime import Kernels
from .arguments import PLAIN, Door
from .watching import is_seen

#: A mapping, such as a module's buffers, and a name in it.
Place = tuple[Mapping[str, torch.Tensor | None], str]


def are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether tensors have memory of this process: those of a fake mode, or inside of torch.func, must not outlive it."""
    return all(type(t) in PLAIN and not torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


class BoundMatmul:
    """An operator and its operands.

    Parameters
    ----------
    door : Door
        The operator's.
    kernels : callable
        Gives the operator's kernels, which may change by tuning.
    places : sequence of (mapping, str)
        Where all operands but A are found, in the kernel's order, as the kernel takes them, and where one must be None that the
        operator does not want.
    order_place : (mapping, str)
        Where the order is found in which the columns of A are multiplied, or None.
    """

    __slots__ = (
        "_absent",
        "_door",
        "_floats",
        "_kernels",
        "_order",
        "_order_home",
        "_order_name",
        "_places",
        "tensors",
    )

    def __init__(
        self,
        door: Door,
        kernels: Callable[[], Kernels],
        places: Sequence[Place],
        order_place: Place,
    ) -> None:
        self._door, self._kernels = door, kernels
        found = [(home, name, home.get(name)) for home, name in places]
        self._places = [(home, name, t, t.data_ptr()) for home, name, t in found if t is not None]
        self._absent = [(home, name) for home, name, t in found if t is None]
        tensors = [tensor for _, _, tensor, _ in self._places]
        # of their own: a tensor may be given another shape, or dtype, in place
        self.tensors = tuple(tensor.detach() for tensor in tensors)
        self._order_home, self._order_name = order_place
        self._order = self._order_home.get(self._order_name)
        self._floats = tuple(t for t in tensors if t.is_floating_point())

    def holds(self) -> bool:
        """Whether the tensors are still found in their places, and those in the same memory."""
        for home, name, tensor, address in self._places:
            if home.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        for home, name in self._absent:
            if home.get(name) is not None:
                return False
        return self._order_home.get(self._order_name) is self._order

    def __call__(self, A: torch.Tensor) -> torch.Tensor | None:
        """See `Matmul.forward`; None where A, or a gradient, needs a closer look. Nothing is computed then."""
        if torch.is_grad_enabled():
            if not isinstance(A, torch.Tensor) or A.requires_grad:
                return None
            for tensor in self._floats:
                if tensor.requires_grad:
                    return None
        if is_seen():
            return None
        entered = self._door.enter_bound(A, self.tensors, self._order)
        if entered is None:
            return None
        m, operands, out, shape = entered
        if m:
            self._kernels().launch(m, operands, out)
        return out if shape is None else out.view(shape)
