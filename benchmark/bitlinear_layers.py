"""Whole layers as candidates: ours, deployed; torch.nn.Linear; the two that transformers has for BitNet."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

import bitblas
from bitblas import MatmulConfig
from bitblas.bench import Candidate, Peer, Skipped, Verdict, Workload, draw_workload, num_copies

from .model import bytes_of
from .peers.operands import LIMITS

OURS, TORCH = "bitblas", "torch.nn.Linear {}"
PACKED, DENSE = "transformers BitLinear {}", "transformers AutoBitLinear {}"
EAGER = "transformers BitLinear {}, eager"
#: Rows for which transformers' layers are timed: for each number they are compiled anew.
COMPILED_ROWS = (1, 16, 128)


def config_of(dtype: str, shape: tuple[int, int]) -> MatmulConfig:
    """That of a deployed layer with a bias, for N and K."""
    n, k = shape
    return bitblas.BitLinear(k, n, device="meta", dtype=getattr(torch, dtype)).config


def draw_ternary(config: MatmulConfig, m: int, seed: int = 0) -> Workload:
    """A workload whose weight holds -1, 0 and 1, one third each."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-1, 2, (config.N, config.K), dtype=torch.int8, generator=generator)
    return replace(draw_workload(config, m, seed), weight=weight)


def deployed(workload: Workload) -> bitblas.BitLinear:
    """Our layer of a workload."""
    config = workload.config
    return bitblas.BitLinear.from_ternary(
        workload.weight,
        workload.scale,
        workload.bias,
        eps=config.activation_eps,
        dtype=getattr(torch, config.A_dtype),
    )


def ours(workload: Workload, budget: int) -> Candidate:
    """Calls of our deployed layer."""
    candidate = _candidate(OURS, deployed(workload), workload.a, budget, workload.check, "int8 by row", exact=False)
    for index in range(candidate.copies):  # a layer's first call checks its buffers
        candidate.call(index)
    return candidate


def _candidate(
    name: str,
    layer: torch.nn.Module,
    a: torch.Tensor,
    budget: int,
    check: Callable[[Any], Verdict],
    computes: str,
    exact: bool,
) -> Candidate:
    """Calls of copies of a layer, in inference mode."""
    layer.eval().requires_grad_(False)
    layers = [layer, *(copy.deepcopy(layer) for _ in range(num_copies(bytes_of(layer), budget) - 1))]

    def call(index: int) -> torch.Tensor:
        return layers[index % len(layers)](a)

    return Candidate(name, torch.inference_mode()(call), check, computes, exact, copies=len(layers))


# -- torch.nn.Linear -------------------------------------------------------------------------------------------------------


def torch_linear(dtype: str) -> Peer:
    """torch.nn.Linear with the weights that ours stand for, all in `dtype`."""

    def make(workload: Workload, budget: int) -> Candidate:
        layer = dense_layer(workload, dtype)
        return _candidate(
            TORCH.format(dtype),
            layer,
            workload.a.to(layer.weight.dtype),
            budget,
            lambda out: workload.check_within(out, LIMITS[dtype]),
            dtype,
            exact=True,
        )

    return make


def dense_layer(workload: Workload, dtype: str) -> torch.nn.Linear:
    """What a workload computes but for the rounding of activations, as a layer of torch."""
    config = workload.config
    layer = torch.nn.utils.skip_init(torch.nn.Linear, config.K, config.N, config.with_bias, dtype=getattr(torch, dtype))
    with torch.no_grad():
        layer.weight.copy_(workload.dense(layer.weight.dtype))
        if workload.bias is not None:
            layer.bias.copy_(workload.bias)
    return layer


# -- transformers ----------------------------------------------------------------------------------------------------------


def bitnet_layer(kind: str, workload: Workload, dtype: str) -> torch.nn.Module:
    """A layer of transformers.

    Its BitLinear holds four rows to a byte, unpacks them at each call and divides by its scale. AutoBitLinear, offline, holds a
    dense weight of -1, 0 and 1; it multiplies by its scale, the bias too.
    """
    from transformers.integrations import bitnet

    config, packed = workload.config, kind == "BitLinear"
    layer = getattr(bitnet, kind)(config.K, config.N, config.with_bias, dtype=getattr(torch, dtype))
    with torch.no_grad():
        # pack_weights adds to what it is given
        layer.weight.copy_(bitnet.pack_weights(workload.weight.clone()) if packed else workload.weight)
        layer.weight_scale.copy_(1 / workload.scale if packed else workload.scale)
        if workload.bias is not None:
            layer.bias.copy_(workload.bias if packed else workload.bias.float() / workload.scale)
    return layer


def transformers_layer(title: str, build: Callable[[Workload, str], torch.nn.Module], dtype: str) -> Peer:
    """A layer of transformers: as it comes, with its parts compiled by torch for this number of rows, or eager."""
    name, eager = title.format(dtype), title == EAGER

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        if workload.m not in COMPILED_ROWS and not eager:
            return Skipped(name, f"is compiled for each M: timed for {', '.join(map(str, COMPILED_ROWS))}")
        try:
            layer = build(workload, dtype)
        except ImportError as error:
            return Skipped(name, f"{error}: pip install 'bitblas[transformers]'", missing=True)
        candidate = _candidate(
            name,
            layer,
            workload.a.to(getattr(torch, dtype)),
            budget,
            lambda out: workload.check_within(out, LIMITS["int8"]),
            f"int8 by row in {dtype}",
            exact=False,
        )
        if eager:
            return replace(candidate, call=torch.compiler.set_stance("force_eager")(candidate.call))
        try:
            candidate.call(0)
        except RuntimeError as error:  # such as those of torch.compile without a C++ compiler
            return Skipped(name, f"cannot be compiled: {str(error).strip().splitlines()[0]}", missing=True)
        return candidate

    return make


_PACKED = partial(bitnet_layer, "BitLinear")
#: Every peer, in the order of the tables; the first is what all are compared with.
PEERS: dict[str, Peer] = {
    **{TORCH.format(dtype): torch_linear(dtype) for dtype in ("float32", "bfloat16")},
    **{
        title.format(dtype): transformers_layer(title, build, dtype)
        for title, build in ((PACKED, _PACKED), (EAGER, _PACKED), (DENSE, partial(bitnet_layer, "AutoBitLinear")))
        for dtype in ("float32", "bfloat16")
    },
}


# -- memory ----------------------------------------------------------------------------------------------------------------


def dense_bytes(shape: tuple[int, int]) -> int:
    """Of a torch.nn.Linear in float32 with a bias."""
    return 4 * (math.prod(shape) + shape[0])


@cache
def layer_bytes(shape: tuple[int, int]) -> dict[str, int]:
    """Bytes of the parameters and buffers of a layer with a bias, for N and K, by its kind; without what is not installed."""
    n, k = shape
    found = {
        f"{OURS} BitLinear {dtype}": bytes_of(
            bitblas.BitLinear.from_linear(torch.nn.Linear(k, n, dtype=getattr(torch, dtype))).deploy()
        )
        for dtype in ("float32", "bfloat16")
    }
    with torch.device("meta"):
        for dtype in ("float32", "bfloat16"):
            found[TORCH.format(dtype)] = bytes_of(torch.nn.Linear(k, n, dtype=getattr(torch, dtype)))
        try:
            from transformers.integrations import bitnet

            found[PACKED.format("bfloat16")] = bytes_of(bitnet.BitLinear(k, n, True, dtype=torch.bfloat16))
            found[DENSE.format("bfloat16")] = bytes_of(bitnet.AutoBitLinear(k, n, True, dtype=torch.bfloat16))
        except ImportError:
            pass  # the peers say so
    return found
