"""The door of an attention: what a call hands over is checked here once, and made ready for a kernel."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..config import FlashAttenConfig, Sizes
from ..errors import ArgumentError
from .arguments import PLAIN, check_tensor

_STRIDED = torch.strided

Shape = tuple[int, ...]


#: Kernels number keys with 32 bits, of which the last block may reach beyond.
MOST_KEYS = (1 << 31) - 1024


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
        self._on_cpu = self.device == "cpu"
        names = config.Q_dtype, config.K_dtype, config.V_dtype, config.Out_dtype
        self._q_dtype, self._k_dtype, self._v_dtype, self._out_dtype = (getattr(torch, name) for name in names)
        #: how a Q makes an output of its own dtype, where that is the one, takes less
        self._same_dtype = self._out_dtype is self._q_dtype
        self._dim, self._dim_v, self._by_columns = config.dim, config.dim_v, config.layout == "ntn"
        self._given = config.batch, config.heads, config.heads_kv, config.seq_len, config.seq_len_kv
        kind = type(self)
        #: whether `_ready` would do nothing with usual tensors: a class with another one has to say what is usual there
        self._takes_usual = kind._ready is AttentionDoor._ready or kind._is_usual is not AttentionDoor._is_usual
        self._is_open = not any(self._given)

    def enter(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None
    ) -> tuple[Sizes, tuple[torch.Tensor, ...], torch.Tensor]:
        """Check a call.

        Returns
        -------
        (Sizes, tuple of torch.Tensor, torch.Tensor)
            The sizes; Q, K and V as kernels take them; the output, contiguous, to be filled.

        Raises
        ------
        ArgumentError
            An argument is of the wrong kind, shape, dtype or device.
        """
        operands: tuple[torch.Tensor, ...] = (q, k, v)
        sizes = self._usual_sizes(q, k, v) if self._takes_usual else None
        if sizes is None:
            sizes, operands = self._enter_slowly(q, k, v)
        if sizes.seq_len_kv > MOST_KEYS:
            raise ArgumentError(f"k has {sizes.seq_len_kv} keys; they must be at most {MOST_KEYS}")
        if output is not None:
            return sizes, operands, self._output(output, sizes, operands)
        batch, heads, _, seq_len, _ = sizes
        if self._same_dtype:  # sizes one by one: a tuple would take half as long again
            return sizes, operands, q.new_empty(batch, seq_len, heads, self._dim_v)
        return sizes, operands, q.new_empty(batch, seq_len, heads, self._dim_v, dtype=self._out_dtype)

    def _usual_sizes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sizes | None:
        """The sizes of tensors that kernels take as they are, in as few steps as can be; None where they need a closer look."""
        try:
            if not (
                self._is_usual(q, self._q_dtype)
                and self._is_usual(k, self._k_dtype)
                and self._is_usual(v, self._v_dtype)
            ):
                return None
            batch, seq_len, heads, dim = q.shape
            if self._by_columns:
                k_batch, k_dim, heads_kv, keys = k.shape
            else:
                k_batch, keys, heads_kv, k_dim = k.shape
            matches = v.shape == (batch, keys, heads_kv, self._dim_v)
        except (RuntimeError, ValueError):  # they have no strides or no address, as sparse ones, or not four sizes
            return None
        if not (matches and dim == k_dim == self._dim and k_batch == batch and heads_kv and heads % heads_kv == 0):
            return None
        sizes = Sizes(batch, heads, heads_kv, seq_len, keys)
        if self._is_open:
            return sizes
        agrees = all(known is None or known == size for known, size in zip(self._given, sizes, strict=True))
        return sizes if agrees else None

    def _is_usual(self, tensor: torch.Tensor, dtype: torch.dtype) -> bool:
        return (
            type(tensor) in PLAIN
            and tensor.dtype is dtype
            and tensor.is_cpu is self._on_cpu
            and (tensor.is_contiguous() or tensor.stride(-1) == 1)
            and not tensor.is_neg()
            and tensor.data_ptr() != 0
        )

    def _enter_slowly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[Sizes, tuple[torch.Tensor, ...]]:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, tensor, self.device)
        return check_operands(self._config, q, k, v), (self._ready(q), self._ready(k), self._ready(v))

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as kernels take it: its last elements side by side."""
        tensor = tensor.detach().resolve_neg()
        return (
            tensor
            if tensor.is_contiguous() or tensor.stride(3) == 1
            else tensor.clone(memory_format=torch.contiguous_format)
        )

    def _output(self, output: torch.Tensor, sizes: Sizes, operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
        batch, heads, _, seq_len, _ = sizes
        if not (
            type(output) in PLAIN
            and output.dtype is self._out_dtype
            and output.is_cpu is self._on_cpu
            and output.get_device() == operands[0].get_device()
            and output.layout is _STRIDED
            and not output.is_nested
            and output.shape == (batch, seq_len, heads, self._dim_v)
            and output.is_contiguous()
            and not output.requires_grad
            and not output.is_neg()
            and output.data_ptr()
        ):
            check_tensor("output", output, self.device)
            check_output(self._config, sizes, operands[0], output)
            if output.is_neg():
                raise ArgumentError("output is a negated view; it must be a plain tensor")
        begin = output.data_ptr()
        end = begin + output.nbytes
        for name, tensor in zip("qkv", operands, strict=True):
            if tensor.data_ptr() < end and begin < _end_of(tensor):
                raise ArgumentError(f"output shares memory with {name}; give a tensor of its own, or none")
        return output


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
    """Raise ArgumentError unless a tensor can take the output: what can be said without data."""
    dtype, shape = getattr(torch, config.Out_dtype), sizes.output_shape(config)
    if output.device != q.device:
        raise ArgumentError(f"output is on device {output.device}; expected {q.device}, where q is")
    if output.dtype is not dtype:
        raise ArgumentError(f"output has dtype {output.dtype}; this operator gives {dtype}")
    if output.shape != shape:
        raise ArgumentError(f"output has shape {tuple(output.shape)}; expected {shape}")
    if not output.is_contiguous():
        raise ArgumentError(f"output has strides {output.stride()}; it must be contiguous")
    if output.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("output requires a gradient; give a tensor that does not, or none")


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


def _end_of(tensor: torch.Tensor) -> int:
    """The address behind the last element of a tensor."""
    if tensor.is_contiguous():
        return tensor.data_ptr() + tensor.nbytes
    if not tensor.numel():
        return tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
