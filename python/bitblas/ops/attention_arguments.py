"""The door of an attention: what a call hands over is checked here once, and made ready for a kernel."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..config import FlashAttenConfig, Sizes
from ..errors import ArgumentError
from .arguments import PLAIN, check_tensor

Shape = tuple[int, ...]


class AttentionDoor:
    """Checks and binds the arguments of one operator.

    Parameters
    ----------
    config : FlashAttenConfig
        What the operator was built for.
    """

    #: Kind of the device that all tensors must be on.
    device: ClassVar[str] = "cpu"

    def __init__(self, config: FlashAttenConfig) -> None:
        self._config = config
        self._dtypes = tuple(getattr(torch, name) for name in (config.Q_dtype, config.K_dtype, config.V_dtype))
        self._out_dtype = getattr(torch, config.Out_dtype)

    def enter(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None
    ) -> tuple[Sizes, list[torch.Tensor], torch.Tensor]:
        """Check a call.

        Returns
        -------
        (Sizes, list of torch.Tensor, torch.Tensor)
            The sizes; Q, K and V as kernels take them; the output, contiguous, to be filled.

        Raises
        ------
        ArgumentError
            An argument is of the wrong kind, shape, dtype or device.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if type(tensor) not in PLAIN or tensor.is_neg() or tensor.device.type != self.device:
                check_tensor(name, tensor, self.device)
        sizes = check_operands(self._config, q, k, v)
        if output is None:
            output = torch.empty(sizes.output_shape(self._config), dtype=self._out_dtype, device=q.device)
        else:
            check_tensor("output", output, self.device)
            check_output(self._config, sizes, q, output)
        return sizes, [self._ready(tensor) for tensor in (q, k, v)], output

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as kernels take it: its last elements side by side."""
        tensor = tensor.detach().resolve_neg()
        return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def check_operands(config: FlashAttenConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sizes:
    """The sizes of a call, or ArgumentError: what can be said without data.

    Q gives batch, heads and queries, K the keys and the heads that are shared; V has to match.
    """
    named = {"q": (q, config.Q_dtype), "k": (k, config.K_dtype), "v": (v, config.V_dtype)}
    for name, (tensor, dtype) in named.items():
        if tensor.dtype is not getattr(torch, dtype):
            raise ArgumentError(f"{name} has dtype {tensor.dtype}; this operator takes torch.{dtype}")
        if tensor.dim() != 4:
            raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}; expected 4 dimensions, {_DIMENSIONS[name]}")
        if tensor.device != q.device:
            raise ArgumentError(f"{name} is on device {tensor.device}; expected {q.device}, where q is")
    batch, seq_len, heads, _ = q.shape
    keys, heads_kv = (k.shape[1] if config.layout == "nnn" else k.shape[3]), k.shape[2]
    _check("q", q, (batch, seq_len, heads, config.dim), {0: config.batch, 1: config.seq_len, 2: config.heads})
    k_shape = (batch, keys, heads_kv, config.dim) if config.layout == "nnn" else (batch, config.dim, heads_kv, keys)
    at_keys = 1 if config.layout == "nnn" else 3
    _check("k", k, k_shape, {at_keys: config.seq_len_kv, 2: config.heads_kv})
    _check("v", v, (batch, keys, heads_kv, config.dim_v), {})
    if (heads_kv == 0 and heads > 0) or (heads_kv and heads % heads_kv):
        raise ArgumentError(f"k has {heads_kv} heads, which do not divide the {heads} heads of q")
    return Sizes(batch, heads, heads_kv, seq_len, keys)


def check_output(config: FlashAttenConfig, sizes: Sizes, q: torch.Tensor, output: torch.Tensor) -> None:
    """Raise ArgumentError unless a tensor can take the output."""
    dtype, shape = getattr(torch, config.Out_dtype), sizes.output_shape(config)
    if output.device != q.device:
        raise ArgumentError(f"output is on device {output.device}; expected {q.device}, where q is")
    if output.dtype is not dtype:
        raise ArgumentError(f"output has dtype {output.dtype}; this operator gives {dtype}")
    if output.shape != shape:
        raise ArgumentError(f"output has shape {tuple(output.shape)}; expected {shape}")
    if not output.is_contiguous():
        raise ArgumentError(f"output has the strides {output.stride()}; it must be contiguous")


_DIMENSIONS = {
    "q": "(batch, seq_len, heads, dim)",
    "k": "(batch, seq_len_kv, heads_kv, dim), or (batch, dim, heads_kv, seq_len_kv) for the layout ntn",
    "v": "(batch, seq_len_kv, heads_kv, dim_v)",
}


def _check(name: str, tensor: torch.Tensor, expected: Shape, given: dict[int, object]) -> None:
    """Compare a shape with what the others, and the config, ask for; a size that the config leaves open is None."""
    wanted = tuple(size if given.get(place) is None else given[place] for place, size in enumerate(expected))
    if tuple(tensor.shape) != wanted:
        raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}, {_DIMENSIONS[name]}")
