"""Attention among torch's own operators: ``bitblas::flash_atten``, what torch.compile, torch.export and autograd see of it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch

from ..config import ATTENTION, FlashAttenConfig
from ..errors import ArgumentError
from ..target import Target
from .attention_arguments import check_operands, check_output
from .registry import find_operator, write_spec

_DEVICES = ("cpu", "cuda")
#: What whoever asks for a gradient is told.
NO_GRADIENT = (
    "FlashAtten has no gradient: it is for inference. Call it under torch.no_grad(), or train with "
    "torch.nn.functional.scaled_dot_product_attention"
)


def attention_spec(config: FlashAttenConfig, target: Target) -> str:
    """The text of an attention."""
    return write_spec(ATTENTION, target, config=config.fields())


@lru_cache(maxsize=4096)
def _config_of(spec: str) -> FlashAttenConfig:
    return FlashAttenConfig(**json.loads(spec)["config"])


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operator: str) -> torch.Tensor:
    return find_operator(operator).launch(q, k, v, None)


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operator: str) -> torch.Tensor:
    config = _config_of(operator)
    shape = check_operands(config, q, k, v).output_shape(config)
    return q.new_empty(shape, dtype=getattr(torch, config.Out_dtype))


def _attention_into(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, operator: str) -> None:
    find_operator(operator).launch(q, k, v, output)


def _attention_into_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, operator: str
) -> None:
    """Nothing is made: `output` is there."""
    config = _config_of(operator)
    check_output(config, check_operands(config, q, k, v), q, output)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """An operator that a compiler may trace, with a forward pass that needs it never, and that raises where it is run."""
    q, k, v = ctx.saved_tensors
    return *torch.ops.bitblas.flash_atten_gradient(grad, q, k, v), None


def _gradient(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    raise ArgumentError(NO_GRADIENT)


def _gradient_fake(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _define() -> None:
    """Register all of them."""
    library = torch.library
    library.define("bitblas::flash_atten", "(Tensor q, Tensor k, Tensor v, str operator) -> Tensor")
    library.define("bitblas::flash_atten_into", "(Tensor q, Tensor k, Tensor v, Tensor(a!) output, str operator) -> ()")
    library.define(
        "bitblas::flash_atten_gradient", "(Tensor grad, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)"
    )
    for name, kernel, fake in (
        ("bitblas::flash_atten", _attention, _attention_fake),
        ("bitblas::flash_atten_into", _attention_into, _attention_into_fake),
        ("bitblas::flash_atten_gradient", _gradient, _gradient_fake),
    ):
        library.impl(name, _DEVICES)(kernel)
        library.register_fake(name)(fake)
    library.register_autograd("bitblas::flash_atten", _backward, setup_context=_setup)


_define()
