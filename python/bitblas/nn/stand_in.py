"""What stands for the weight of a quantized layer where code asks a `torch.nn.Linear` for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ArgumentError

#: What may be asked of it: what says something about it, and neither gives nor takes values.
_DESCRIPTIONS = frozenset(
    {"dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "nelement", "ndimension"}
    | {"numel", "size", "stride", "__format__", "__hash__", "__len__", "__repr__"}
    | {
        "device",
        "dtype",
        "grad",
        "grad_fn",
        "is_cpu",
        "is_cuda",
        "is_leaf",
        "is_meta",
        "is_quantized",
        "is_sparse",
        "itemsize",
    }
    | {"layout", "names", "nbytes", "ndim", "requires_grad", "shape"}
)


class WeightStandIn(torch.Tensor):
    """A tensor that has a dtype, a device, a shape, and no values: models ask their layers for those of `weight`."""

    @staticmethod
    def of(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> WeightStandIn:
        """One of a shape; it takes the memory of one element."""
        return torch.empty((), dtype=dtype, device=device).expand(shape).as_subclass(WeightStandIn)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Describe it; refuse to compute with it."""
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__repr__":
            this = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                return f"WeightStandIn(shape={tuple(this.shape)}, dtype={this.dtype}, device={str(this.device)!r})"
        if name in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ArgumentError(
            f"the weight of a quantized layer was asked for {name}; it has a dtype, a device and a shape only. "
            "layer.to_quantized().dequantize() gives its values"
        )
