"""The door of a matmul on a card: tensors on one device, which can run the code, at addresses that vectors can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..config import MatmulConfig
from ..errors import ArgumentError, UnsupportedError
from ..logs import warn_once
from ..target import Target, device_arch, runs_on
from .arguments import Door

#: Kernels load and store so many bytes at once.
ALIGNMENT = 16


class CudaDoor(Door):
    """Checks and binds the arguments of one operator for cards.

    Parameters
    ----------
    config : MatmulConfig
        What the operator was built for.
    weight_shape : tuple of int
        Shape of the weights in its layout.
    target : Target
        What it was compiled for.
    """

    device: ClassVar[str] = "cuda"

    def __init__(self, config: MatmulConfig, weight_shape: tuple[int, ...], target: Target) -> None:
        super().__init__(config, weight_shape)
        self._target = target
        self._able: set[int] = set()  # indices of devices that can run the target's code

    def enter(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        extras: Sequence[torch.Tensor | None],
        named: dict[str, torch.Tensor | None] | None,
        output: torch.Tensor | None,
    ) -> tuple[int, list[torch.Tensor], torch.Tensor]:
        """See `Door`; all tensors must be on one device.

        Raises
        ------
        UnsupportedError
            The device cannot run the target's code.
        """
        m, operands, out = super().enter(A, W, extras, named, output)
        index = self._check_operands(operands)
        if output is not None and (out.get_device() != index or out.data_ptr() % ALIGNMENT):
            self._refuse("output", out, operands[0])
        return m, operands, out

    def enter_bound(
        self, A: torch.Tensor, operands: Sequence[torch.Tensor], order: torch.Tensor | None
    ) -> tuple[int, Sequence[torch.Tensor], torch.Tensor, tuple[int, ...] | None] | None:
        """See `Door`; all tensors must be on one device."""
        entered = super().enter_bound(A, operands, order)
        if entered is None:
            return None
        m, found, out, shape = entered
        checked = list(found)
        self._check_operands(checked)
        return m, checked, out, shape

    def _check_operands(self, operands: list[torch.Tensor]) -> int:
        """The index of the device that all are on; those that are not aligned are replaced by copies."""
        index = operands[0].get_device()
        if index not in self._able:
            check_device("A", operands[0], self.device, self._target)
            self._able.add(index)
        for place, tensor in enumerate(operands):
            if tensor.get_device() != index:  # which is below 0 for those that are on no card
                self._refuse(self._operands[place - 1].name, tensor, operands[0])
            if tensor.data_ptr() % ALIGNMENT:
                operands[place] = tensor.clone()
                if place:  # not A, which is new at each call
                    self._warn_of_copies(self._operands[place - 1].name)
        return index

    def _warn_of_copies(self, name: str) -> None:
        warn_once(
            f"{name} is not aligned",
            f"{name} begins at an address that {ALIGNMENT} does not divide, so that each call copies it; keep a copy of it",
        )

    def _refuse(self, name: str, tensor: torch.Tensor, a: torch.Tensor) -> None:
        if tensor.device != a.device:
            raise ArgumentError(f"{name} is on device {tensor.device}; expected {a.device}, where A is")
        raise ArgumentError(
            f"{name} begins at the address {tensor.data_ptr():#x}; it must be a multiple of {ALIGNMENT}"
        )


def check_device(name: str, tensor: torch.Tensor, kind: str, target: Target) -> None:
    """Raise ArgumentError unless a tensor is on a device of a kind, UnsupportedError unless that can run a target's code."""
    if tensor.device.type != kind:
        raise ArgumentError(f"{name} is on device {tensor.device}; this operator runs on {kind}")
    arch = device_arch(tensor.get_device())
    if not runs_on(target.arch, arch):
        raise UnsupportedError(
            f"{name} is on {tensor.device}, of compute capability {arch}, and this operator was built for {target.arch}, which "
            f"does not run there; construct another with target='cuda -arch={arch}'"
        )
