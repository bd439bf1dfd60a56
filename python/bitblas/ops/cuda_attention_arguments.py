"""The door of an attention on a card: a device that can run the code, and tensors that vectors can read."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..config import FlashAttenConfig
from ..errors import ArgumentError
from ..plan import AttentionPlan
from ..schedule.cuda.attention_tiles import CHUNK, FragmentAttentionTiling
from .attention_arguments import MOST_KEYS, AttentionDoor, Sizes
from .cuda_arguments import ALIGNMENT, check_device

#: The fewest rows of a block.
_BLOCK_ROWS = 8


class CudaAttentionDoor(AttentionDoor):
    """Checks and binds the arguments of one operator for cards.

    Parameters
    ----------
    config : FlashAttenConfig
        What the operator was built for.
    plan : AttentionPlan
        What was decided for it.
    """

    device: ClassVar[str] = "cuda"

    def __init__(self, config: FlashAttenConfig, plan: AttentionPlan) -> None:
        super().__init__(config)
        self._target = plan.target
        self._able: set[int] = set()  # indices of devices that can run the target's code
        #: Whether kernels read 16 bytes at once.
        self._aligns = any(isinstance(kernel.tiling, FragmentAttentionTiling) for kernel in plan.kernels)

    def enter(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None
    ) -> tuple[Sizes, tuple[torch.Tensor, ...], torch.Tensor]:
        """See `AttentionDoor`.

        Raises
        ------
        ArgumentError
            There are more rows or keys than kernels can number, or the output is not aligned.
        UnsupportedError
            The device cannot run the target's code.
        """
        sizes, operands, out = super().enter(q, k, v, output)
        index = q.get_device()
        if index not in self._able:
            self._check_device(q)
            self._able.add(index)
        blocks = sizes.batch * sizes.heads_kv * -(-sizes.rows // _BLOCK_ROWS)
        if max(sizes.rows, blocks) > MOST_KEYS:
            raise ArgumentError(
                f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; queries of the heads that share a head of k, and "
                f"blocks of {_BLOCK_ROWS} such queries of all heads must be at most {MOST_KEYS}"
            )
        if out.data_ptr() % ALIGNMENT and self._aligns:
            raise ArgumentError(
                f"output begins at the address {out.data_ptr():#x}; it must be a multiple of {ALIGNMENT}"
            )
        return sizes, operands, out

    def _check_device(self, q: torch.Tensor) -> None:
        check_device("q", q, self.device, self._target)

    def _usual_sizes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sizes | None:
        sizes = super()._usual_sizes(q, k, v)
        return sizes if sizes and q.get_device() == k.get_device() == v.get_device() else None

    def _is_usual(self, tensor: torch.Tensor, dtype: torch.dtype) -> bool:
        if not super()._is_usual(tensor, dtype):
            return False
        if not self._aligns:
            return True
        first, second, third, _ = tensor.stride()
        return not (tensor.data_ptr() | (first | second | third) * tensor.element_size()) % ALIGNMENT

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as kernels take it: where they read 16 bytes at once, those are aligned."""
        tensor = super()._ready(tensor)
        return tensor if not self._aligns or is_aligned(tensor) else aligned_copy(tensor)


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether the address of a tensor of 4 dimensions, and each of its rows along the last one, is a multiple of 16 bytes."""
    size = tensor.element_size()
    steps = (stride for length, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if length > 1)
    return not tensor.data_ptr() % ALIGNMENT and not any(stride * size % ALIGNMENT for stride in steps)


def aligned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is aligned, its rows along the last dimension set apart as far as that takes."""
    *shape, length = tensor.shape
    copy = tensor.new_empty((*shape, -(-length // CHUNK) * CHUNK))[..., :length]
    return copy.copy_(tensor)
