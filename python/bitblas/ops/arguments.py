"""The door of a matmul: what a call hands over is checked here once, and made ready for a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar, TypeGuard

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..config import MatmulConfig
from ..errors import ArgumentError
from ..packing import unpack_nibbles

# looked up once: these stand in the path of every call
_STRIDED = torch.strided
#: Tensors of other classes are looked at closely: some have no memory.
PLAIN = (torch.Tensor, torch.nn.Parameter)

#: scale, zeros, bias and output.
_MOST_EXTRAS = 4

_FLAGS = {"scale": "with_scaling", "zeros": "with_zeros", "bias": "with_bias"}
_REASONS = {
    "W": "every call needs it",
    **{name: f"this operator was built with {flag}=True" for name, flag in _FLAGS.items()},
}


@dataclass(frozen=True)
class Operand:
    """What a tensor of a call must be.

    Attributes
    ----------
    name : str
        The argument to blame.
    shape : tuple of int
        Its shape.
    allowed : tuple of torch.dtype
        The dtypes in which it may come.
    dtype : torch.dtype
        The dtype in which the kernel takes it: equal, another view of the same bytes, or a lossless conversion.
    device : str
        Kind of the device: ``"cpu"`` or ``"cuda"``.
    usual : torch.dtype or None
        `dtype`, where a tensor may come in it.
    """

    name: str
    shape: tuple[int, ...]
    allowed: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: str = "cpu"
    usual: torch.dtype | None = field(init=False)
    on_cpu: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_cpu", self.device == "cpu")
        object.__setattr__(self, "usual", self.dtype if self.dtype in self.allowed else None)

    def is_ready(self, tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
        """Whether the kernel can take `tensor` as it is: the usual case, decided in one expression."""
        return (
            tensor is not None
            and type(tensor) in PLAIN
            and tensor.dtype is self.usual
            and tensor.shape == self.shape
            and tensor.is_cpu is self.on_cpu
            and tensor.layout is _STRIDED
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and tensor.data_ptr() != 0
        )

    def convert(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return what the kernel can take, or raise ArgumentError."""
        if tensor is not None:
            check_tensor(self.name, tensor, self.device)
        tensor = self.check(tensor).detach().resolve_neg().contiguous()
        if tensor.dtype is self.dtype:
            return tensor
        if self.dtype is torch.int8:  # bytes
            return tensor.view(torch.int8)
        return tensor.to(self.dtype)

    def check(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor of this shape, (N,) as (N, 1), any one number as (1,), or raise ArgumentError.

        That is what can be said without its data.
        """
        if tensor is None:
            raise ArgumentError(f"{self.name} is missing; {_REASONS[self.name]}")
        if tensor.dtype not in self.allowed:
            names = ", ".join(dict.fromkeys(str(dtype) for dtype in self.allowed))
            raise ArgumentError(f"{self.name} has dtype {tensor.dtype}; allowed: {names}")
        if self.shape[-1] == 1 and len(self.shape) == 2 and tensor.shape == self.shape[:1]:
            tensor = tensor.unsqueeze(1)
        if self.shape == (1,) and tensor.numel() == 1:
            tensor = tensor.reshape(1)
        if tensor.shape != self.shape:
            raise ArgumentError(f"{self.name} has shape {tuple(tensor.shape)}; expected {self.shape}")
        return tensor


class Door:
    """Checks and binds the arguments of one operator.

    Parameters
    ----------
    config : MatmulConfig
        What the operator was built for.
    weight_shape : tuple of int
        Shape of the weights in its layout.
    """

    #: Kind of the device that all tensors must be on.
    device: ClassVar[str] = "cpu"

    def __init__(self, config: MatmulConfig, weight_shape: tuple[int, ...]) -> None:
        self._on_cpu = self.device == "cpu"
        self._k, self._n = config.K, config.N
        self._static_m = config.M if isinstance(config.M, int) else None
        self._int4 = config.A_dtype == "int4"
        self._columns = config.layout.startswith("t")
        self._a_dtype: torch.dtype = getattr(torch, config.held_dtype)
        #: the dtype in which the kernel takes A, where it may take an A as it is
        self._kernel_dtype: torch.dtype = getattr(torch, config.activation_dtype)
        self._usual = None if self._columns or self._kernel_dtype is not self._a_dtype else self._a_dtype
        self._out_dtype: torch.dtype = getattr(torch, config.out_dtype)
        #: how an A makes an output of its own dtype, where that is the one, takes a fifth less
        self._same_dtype = self._out_dtype is self._kernel_dtype
        wanted = operands_of(config, weight_shape)
        self._operands = tuple(replace(operand, device=self.device) for operand in wanted)

    def enter(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        extras: Sequence[torch.Tensor | None],
        named: dict[str, torch.Tensor | None] | None,
        output: torch.Tensor | None,
    ) -> tuple[int, list[torch.Tensor], torch.Tensor]:
        """Check a call.

        Returns
        -------
        (int, list of torch.Tensor, torch.Tensor)
            m; the kernel's operands in its order, A first, as a contiguous (m, K); and the output in its final shape.

        Raises
        ------
        ArgumentError
            Naming the argument, its value, and what is allowed.
        """
        a, m, shape = self._activation(A)
        if named or len(extras) != len(self._operands) - 1:
            bound, output = self.bind(extras, named or {}, output)
            extras = list(bound.values())
        operands = [a]
        for operand, tensor in zip(self._operands, (W, *extras), strict=True):
            if not operand.is_ready(tensor):
                tensor = operand.convert(tensor)
            operands.append(tensor)
        if output is not None:
            return m, operands, self._output(output, shape, operands)
        return m, operands, a.new_empty(*shape, dtype=self._out_dtype)  # a tuple would take half as long again

    def is_ready(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the kernel can take these operands, all that it wants but A, as they are."""
        return len(tensors) == len(self._operands) and all(
            operand.is_ready(tensor) for operand, tensor in zip(self._operands, tensors, strict=True)
        )

    def enter_bound(
        self, A: torch.Tensor, operands: Sequence[torch.Tensor], order: torch.Tensor | None
    ) -> tuple[int, Sequence[torch.Tensor], torch.Tensor, tuple[int, ...] | None] | None:
        """`enter` with operands that `is_ready` has found so, in as few steps as can be; None where A needs a closer look.

        `order` is an index of A's columns, or None. The output is (m, N), and after it comes its final shape, None for that.
        """
        if not (
            type(A) in PLAIN
            and A.dtype is self._usual
            and A.is_cpu is self._on_cpu
            and A.layout is _STRIDED
            and A.is_contiguous()
            and not A.is_neg()
            and A.data_ptr()
        ):
            return None
        size, shape = A.shape, None
        if len(size) != 2:
            if not size or size[-1] != self._k:
                return None
            shape, A = (*size[:-1], self._n), A.view(-1, self._k)
            size = A.shape
        m, k = size
        if k != self._k or (self._static_m is not None and self._static_m != m):
            return None
        a = A if order is None else A.index_select(-1, order)
        out = a.new_empty(m, self._n) if self._same_dtype else a.new_empty(m, self._n, dtype=self._out_dtype)
        return m, (a, *operands), out, shape

    def _activation(self, A: torch.Tensor) -> tuple[torch.Tensor, int, tuple[int, ...]]:
        """A as a contiguous (m, K), m, and the output's shape."""
        if (
            type(A) in PLAIN
            and A.dtype is self._usual
            and A.is_cpu is self._on_cpu
            and A.layout is _STRIDED
            and A.is_contiguous()
            and not A.is_neg()
            and A.data_ptr()
        ):
            shape = A.shape
            if len(shape) == 2:
                m, k = shape
                if k == self._k and (self._static_m is None or self._static_m == m):
                    return A, m, (m, self._n)
            elif shape and shape[-1] == self._k:
                m = A.numel() // self._k
                if self._static_m is None or self._static_m == m:
                    return A.view(m, self._k), m, (*shape[:-1], self._n)
        return self._activation_slowly(A)

    def _activation_slowly(self, A: torch.Tensor) -> tuple[torch.Tensor, int, tuple[int, ...]]:
        check_tensor("A", A, self.device)
        if A.dtype is not self._a_dtype:
            raise ArgumentError(f"A has dtype {A.dtype}; this operator takes {self._a_dtype}")
        given, A = tuple(A.shape), A.detach().resolve_neg()
        if self._columns and A.dim() > 1:
            A = A.mT
        if self._int4 and A.dim() and A.shape[-1] != self._k and A.shape[-1] == (self._k + 1) // 2:
            A = unpack_nibbles(A, self._k)
        shape = A.shape
        if not shape or shape[-1] != self._k:
            raise ArgumentError(f"A has shape {given}; {self._k_place()} must be K = {self._k}{self._packed_k()}")
        rows = prod(shape[:-1])
        if self._static_m is not None and rows != self._static_m and rows:
            raise ArgumentError(f"A has shape {given}, {rows} rows; this operator was built for M = {self._static_m}")
        A = A.reshape(rows, self._k).contiguous()
        return A if A.dtype is self._kernel_dtype else A.view(self._kernel_dtype), rows, (*shape[:-1], self._n)

    def _k_place(self) -> str:
        return "its dimension before the last (layout t*)" if self._columns else "its last dimension"

    def _packed_k(self) -> str:
        return f", or {(self._k + 1) // 2} where two values share a byte" if self._int4 else ""

    def bind(
        self,
        extras: Sequence[torch.Tensor | None],
        named: dict[str, torch.Tensor | None],
        output: torch.Tensor | None,
    ) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None]:
        """Assign tensors given by position to the wanted names, in order, and one more to the output.

        Raises
        ------
        ArgumentError
            A tensor is superfluous, or given twice.
        """
        names = [operand.name for operand in self._operands[1:]]
        for name, tensor in named.items():
            if tensor is not None and name not in names:
                raise ArgumentError(f"{name} was given, but this operator was built with {_FLAGS[name]}=False")
        if len(extras) > _MOST_EXTRAS:
            raise ArgumentError(
                f"{len(extras)} arguments were given by position after W; allowed: scale, zeros, bias, output"
            )
        if len(extras) == _MOST_EXTRAS:
            if output is not None and extras[-1] is not None:
                raise ArgumentError("output was given twice, by position and by name")
            *extras, last = extras
            output = output if last is None else last
        present = [extra for extra in extras if extra is not None]
        places = [name for name in names if named.get(name) is None]
        found = {**named, **dict(zip(places, present, strict=False))}
        if len(present) > len(places):
            extra, wanted = present[len(places)], ", ".join(names) or "no scale, zeros or bias"
            what = f"tensor of shape {tuple(extra.shape)}" if isinstance(extra, torch.Tensor) else type(extra).__name__
            raise ArgumentError(f"a {what} is superfluous: this operator takes {wanted}; give an output by name")
        return {name: found.get(name) for name in names}, output

    def _output(self, output: torch.Tensor, shape: tuple[int, ...], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        check_tensor("output", output, self.device)
        if output.dtype is not self._out_dtype:
            raise ArgumentError(f"output has dtype {output.dtype}; this operator gives {self._out_dtype}")
        if output.shape != shape:
            raise ArgumentError(f"output has shape {tuple(output.shape)}; expected {shape}")
        if not output.is_contiguous():
            raise ArgumentError(f"output has strides {output.stride()}; it must be contiguous")
        if output.is_neg():
            raise ArgumentError("output is a negated view; it must be a plain tensor")
        if output.requires_grad and torch.is_grad_enabled():
            raise ArgumentError("output requires a gradient; give a tensor that does not, or none")
        if any(_overlap(output, tensor) for tensor in inputs):
            raise ArgumentError("output shares memory with an input; give a tensor of its own, or none")
        return output


def operands_of(config: MatmulConfig, weight_shape: tuple[int, ...]) -> tuple[Operand, ...]:
    """What the kernels of a config take beside A, in their order, on a CPU."""
    a_dtype, out_dtype = getattr(torch, config.held_dtype), getattr(torch, config.out_dtype)
    return (_weight_operand(config, weight_shape), *_wanted_operands(config, a_dtype, out_dtype))


def _weight_operand(config: MatmulConfig, shape: tuple[int, ...]) -> Operand:
    fmt = config.format
    if fmt.is_native:  # the kernel takes the bytes, whatever they are called
        dtype = getattr(torch, fmt.torch_name)
        return Operand("W", shape, (dtype,), dtype)
    allowed = {torch.int8: None, torch.uint8: None}
    if fmt.torch_name:
        allowed[getattr(torch, fmt.torch_name)] = None
    return Operand("W", shape, tuple(allowed), torch.int8)


def _wanted_operands(config: MatmulConfig, a_dtype: torch.dtype, out_dtype: torch.dtype) -> list[Operand]:
    dtype = getattr(torch, config.scale_dtype)
    allowed = tuple(getattr(torch, name) for name in config.scale_dtypes)
    shape = (config.N, config.num_groups)
    wanted = []
    if config.with_scaling:
        wanted.append(Operand("scale", config.scale_shape, allowed, dtype))
    if config.zeros_packed:
        packed = (config.num_groups, (config.N * config.format.bits + 7) // 8)
        wanted.append(Operand("zeros", packed, (torch.int8, torch.uint8), torch.int8))
    elif config.with_zeros:
        wanted.append(Operand("zeros", shape, allowed, dtype))
    if config.with_bias:
        wanted.append(Operand("bias", (config.N,), (a_dtype, out_dtype), getattr(torch, config.bias_dtype)))
    return wanted


def check_tensor(name: str, tensor: object, device: str = "cpu") -> None:
    """Raise ArgumentError unless `tensor` is a dense torch tensor on a device of this kind."""
    if isinstance(tensor, torch.Tensor) and tensor.device.type != device:
        raise ArgumentError(f"{name} is on device {tensor.device}; this operator runs on {device}")
    check_dense(name, tensor)


def check_dense(name: str, tensor: object) -> None:
    """Raise ArgumentError unless `tensor` is a dense torch tensor with data, on any device."""
    check_kind(name, tensor)
    assert isinstance(tensor, torch.Tensor)
    if isinstance(tensor, FakeTensor):
        raise ArgumentError(f"{name} is a FakeTensor; it must have data")
    if tensor.is_meta:
        raise ArgumentError(f"{name} is on device meta; it must have data")
    if tensor.numel() and tensor._is_zerotensor():
        raise ArgumentError(f"{name} is a zero tensor without memory; clone() gives it some")
    if tensor.numel() and not tensor.untyped_storage().data_ptr():
        raise ArgumentError(f"{name} has no memory: its storage was freed")


def check_kind(name: str, tensor: object) -> None:
    """Raise ArgumentError unless `tensor` is a dense torch tensor, which may be without data, on any device."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise ArgumentError(f"{name} has layout {tensor.layout}; it must be a dense tensor")
    if tensor.is_nested:
        raise ArgumentError(f"{name} is a nested tensor; it must be a dense tensor")


def _overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the bytes of two contiguous tensors meet."""
    a, b = first.data_ptr(), second.data_ptr()
    return a < b + second.nbytes and b < a + first.nbytes
