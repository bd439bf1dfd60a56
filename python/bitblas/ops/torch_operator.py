"""Matmul among torch's own operators: what torch.compile, torch.export and autograd see of it.

``bitblas::matmul`` names its operator by text (`operator_spec`), so that a graph holds tensors and constants only, and an
exported program finds, or builds, its kernels in another process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, Protocol

import torch

from ..config import MatmulConfig
from ..errors import ArgumentError
from ..layout import PackedLayout
from ..target import Target
from .arguments import Operand, operands_of
from .registry import find_operator, write_spec


class Operator(Protocol):
    """What is asked of a `Matmul` here."""

    config: MatmulConfig

    @property
    def layout(self) -> PackedLayout:
        """Where the bits of its weights lie."""

    def launch(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        extras: Sequence[torch.Tensor | None],
        named: dict[str, torch.Tensor | None] | None,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute."""

    def weight_blocks(
        self, weight: torch.Tensor, scale: torch.Tensor | None, zeros: torch.Tensor | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Decode."""


_OPERANDS = "Tensor A, Tensor W, Tensor? scale, Tensor? zeros, Tensor? bias"
_DEVICES = ("cpu", "cuda")


def operator_spec(config: MatmulConfig, target: Target, layout: str, dense_cache: bool) -> str:
    """The text of a matmul."""
    return write_spec("matmul", target, config=config.fields(), layout=layout, dense_cache=dense_cache)


def find_matmul(spec: str) -> Operator:
    """The operator of a text: see `find_operator`."""
    return find_operator(spec)


@lru_cache(maxsize=4096)
def _config_of(spec: str) -> MatmulConfig:
    return MatmulConfig(**json.loads(spec)["config"])


@lru_cache(maxsize=4096)
def _operands_of(spec: str) -> tuple[Operand, ...]:
    config = _config_of(spec)
    held = config.K if config.format.is_native else (config.K * config.format.bits + 7) // 8
    return operands_of(config, (config.N, held))


# -- forward -----------------------------------------------------------------------------------------------------------------


def _matmul(
    A: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    operator: str,
) -> torch.Tensor:
    return find_matmul(operator).launch(A, W, (), {"scale": scale, "zeros": zeros, "bias": bias}, None)


def _matmul_fake(
    A: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    operator: str,
) -> torch.Tensor:
    shape = _output_shape(A, operator)
    _check_operands((W, scale, zeros, bias), operator)
    return A.new_empty(shape, dtype=getattr(torch, _config_of(operator).out_dtype))


def _output_shape(A: torch.Tensor, operator: str) -> tuple[int, ...]:
    """The shape of an output, after the checks that need no data."""
    config = _config_of(operator)
    shape = A.mT.shape if config.layout.startswith("t") and A.dim() > 1 else A.shape
    k = config.K
    halved = (k + 1) // 2 if config.A_dtype == "int4" else k
    if not shape or (shape[-1] != k and shape[-1] != halved):
        raise ArgumentError(f"A has shape {tuple(A.shape)}; K = {k} of its elements are multiplied with a row of W")
    if A.dtype is not getattr(torch, config.held_dtype):
        raise ArgumentError(f"A has dtype {A.dtype}; this operator takes torch.{config.held_dtype}")
    rows = prod(shape[:-1])
    if isinstance(config.M, int) and rows != config.M and rows:
        raise ArgumentError(f"A has shape {tuple(A.shape)}; this operator was built for M = {config.M}")
    return (*shape[:-1], config.N)


def _check_operands(tensors: tuple[torch.Tensor | None, ...], operator: str) -> None:
    """Look at all operands but A, in the order of the schema."""
    found = dict(zip(("W", "scale", "zeros", "bias"), tensors, strict=True))
    for operand in _operands_of(operator):
        operand.check(found[operand.name])


def _matmul_into(
    A: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    operator: str,
) -> None:
    find_matmul(operator).launch(A, W, (), {"scale": scale, "zeros": zeros, "bias": bias}, output)


def _matmul_into_fake(
    A: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    operator: str,
) -> None:
    """Nothing is made: `output` is there."""
    shape, dtype = _output_shape(A, operator), getattr(torch, _config_of(operator).out_dtype)
    _check_operands((W, scale, zeros, bias), operator)
    if output.dtype is not dtype:
        raise ArgumentError(f"output has dtype {output.dtype}; this operator gives {dtype}")
    if output.shape != shape:
        raise ArgumentError(f"output has shape {tuple(output.shape)}; expected {shape}")


# -- gradients ---------------------------------------------------------------------------------------------------------------


def _gradient(
    grad: torch.Tensor, W: torch.Tensor, scale: torch.Tensor | None, zeros: torch.Tensor | None, operator: str
) -> torch.Tensor:
    op = find_matmul(operator)
    config = op.config
    rows = grad.reshape(-1, config.N)
    # products of half precision are fast on cards, and float32 is what CPUs are sure to multiply
    dtype = grad.dtype if grad.is_cuda else torch.float32
    out = torch.zeros((rows.shape[0], config.K), dtype=torch.float32, device=grad.device)
    for place, values in op.weight_blocks(W, scale, zeros):
        out += rows[:, place].to(dtype) @ values.to(dtype)
    out = out.view(*grad.shape[:-1], config.K).to(getattr(torch, config.A_dtype))
    return out.mT.contiguous() if config.layout.startswith("t") and grad.dim() > 1 else out


def _gradient_fake(
    grad: torch.Tensor, W: torch.Tensor, scale: torch.Tensor | None, zeros: torch.Tensor | None, operator: str
) -> torch.Tensor:
    config = _config_of(operator)
    shape = (*grad.shape[:-1], config.K)
    if config.layout.startswith("t") and grad.dim() > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return grad.new_empty(shape, dtype=getattr(torch, config.A_dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, W, scale, zeros, bias, ctx.operator = inputs
    ctx.save_for_backward(W, scale, zeros)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    for place, name in enumerate(("W", "scale", "zeros"), 1):
        if ctx.needs_input_grad[place]:
            raise ArgumentError(
                f"{name} requires a gradient, and there is none for a quantized weight: gradients flow to A and bias. Call "
                f"requires_grad_(False) on it"
            )
    W, scale, zeros = ctx.saved_tensors
    for_a = for_bias = None
    if ctx.needs_input_grad[0]:
        for_a = torch.ops.bitblas.matmul_gradient(grad.contiguous(), W, scale, zeros, ctx.operator)
    if ctx.needs_input_grad[4]:
        for_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return for_a, None, None, None, for_bias, None


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, W, scale, zeros, ctx.operator = inputs
    ctx.save_for_backward(W, scale, zeros)


def _gradient_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient is linear in what comes from above, as the product itself is in A."""
    W, scale, zeros = ctx.saved_tensors
    config = _config_of(ctx.operator)
    if config.dynamic_quantization is not None:
        raise ArgumentError("there is no second derivative where activations are rounded (dynamic_quantization)")
    bias = grad.new_zeros(config.N, dtype=getattr(torch, config.out_dtype)) if config.with_bias else None
    return torch.ops.bitblas.matmul(grad, W, scale, zeros, bias, ctx.operator), None, None, None, None


def _define() -> None:
    """Register all of them."""
    library = torch.library
    library.define("bitblas::matmul", f"({_OPERANDS}, str operator) -> Tensor")
    library.define("bitblas::matmul_into", f"({_OPERANDS}, Tensor(a!) output, str operator) -> ()")
    library.define(
        "bitblas::matmul_gradient", "(Tensor grad, Tensor W, Tensor? scale, Tensor? zeros, str operator) -> Tensor"
    )
    for name, kernel, fake in (
        ("bitblas::matmul", _matmul, _matmul_fake),
        ("bitblas::matmul_into", _matmul_into, _matmul_into_fake),
        ("bitblas::matmul_gradient", _gradient, _gradient_fake),
    ):
        library.impl(name, _DEVICES)(kernel)
        library.register_fake(name)(fake)
    library.register_autograd("bitblas::matmul", _backward, setup_context=_save)
    library.register_autograd("bitblas::matmul_gradient", _gradient_backward, setup_context=_save_gradient)


_define()
