"""Who sees a call beside the kernels, so that it goes by the operators of torch that they know; and what is refused then."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad, profiler

from ..errors import ArgumentError

#: How many modes, such as those of fake tensors, see what torch dispatches: they may give tensors without memory.
_num_modes = torch._C._len_torch_dispatch_stack
#: The innermost transform of torch.func that is at work, or None; tensors inside of it have no memory that a kernel could read.
_transform = torch._C._functorch.peek_interpreter_stack
#: What torch.jit.trace records into, or None: what does not go by the dispatcher it takes for a constant.
_recorder = torch._C._get_tracing_state


def is_seen() -> bool:
    """Whether a mode, a transform of torch.func, a recorder, a profiler or forward-mode derivatives see the next operator.

    So does a compiler, which calls for `torch.compiler.is_compiling` before this.
    """
    return (
        _num_modes() != 0
        or _transform() is not None
        or _recorder() is not None
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
    )


def check_has_memory(*tensors: torch.Tensor | None) -> None:
    """Raise where a tensor of a call that fills an output is inside of a transform of torch.func, and has no memory.

    Raises
    ------
    ArgumentError
        One is.
    """
    for tensor in tensors:
        if tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise ArgumentError(
                "output was given inside of a transform of torch.func, such as torch.vmap; give none there"
            )


def refuse_derivatives(no_tangent: str, no_gradient: str, *tensors: torch.Tensor | None) -> None:
    """Raise where torch would drop a tangent without a word, or torch.func asks for a gradient.

    Raises
    ------
    ArgumentError
        With `no_tangent`, or `no_gradient`.
    """
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            continue
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ArgumentError(f"an operand has a tangent (forward-mode derivatives, torch.func.jvp); {no_tangent}")
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise ArgumentError(no_gradient)
            tensor = torch._C._functorch.get_unwrapped(tensor)
