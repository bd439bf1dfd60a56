"""Other libraries' kernels on a card; one that is missing or cannot says so."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from bitblas import BitBLASError, Matmul
from bitblas.bench import Candidate, Skipped, Workload, rotate
from bitblas.bench.card import dense_on_card, ours_on_card
from bitblas.bench.matmul import Peer

from ..peers.operands import LIMITS, integer_codes
from .cases import BF16, DENSE_CACHE, FP16, GEMLITE, INT4PACK, INT_MM, SCALED_MM

_INNER_TILES = 8
_GROUPS = (32, 64, 128, 256)
#: Rows from which it is worth while to look at what a decoded copy gains.
_MANY_ROWS = 1024
_INSTALL = "pip install gemlite, or bring its wheel"


def card_peers(cache: int, op_of: Callable[[Workload], Matmul] | None = None) -> dict[str, Peer]:
    """Every peer, in the order of the tables.

    Parameters
    ----------
    cache : int
        Bytes of the card's cache, past which weights are rotated.
    op_of : callable, optional
        Makes our operator that keeps the decoded weight.
    """
    return {
        FP16: dense_on_card(torch.float16, cache),
        BF16: dense_on_card(torch.bfloat16, cache),
        INT4PACK: int4pack(cache),
        GEMLITE: gemlite(cache),
        INT_MM: int_mm(cache),
        SCALED_MM: scaled_mm(cache),
        DENSE_CACHE: dense_cache(cache, op_of),
    }


def int4pack(cache: int) -> Peer:
    """torch's own 4-bit kernel ("tinygemm"), which multiplies bfloat16 with (q - 8)·s + z."""

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        config, weight = workload.config, integer_codes(workload)
        served = weight is not None and weight.bits == 4 and config.group in _GROUPS and not config.with_bias
        if weight is None or not served or config.A_dtype == "int8" or config.N % 8 or config.K % (16 * _INNER_TILES):
            return Skipped(INT4PACK, "serves 4-bit integers in groups of 32, 64, 128 or 256, K a multiple of 128")
        a, codes = workload.a.to(torch.bfloat16), weight.codes
        try:
            packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], _INNER_TILES)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            return Skipped(INT4PACK, f"this torch cannot: {str(error).splitlines()[0]}")
        pairs = torch.stack([weight.scale, (8 - weight.points) * weight.scale], dim=-1)
        pairs = pairs.transpose(0, 1).contiguous().to(a.dtype)
        weights = rotate(packed, budget, cache)
        return Candidate(
            INT4PACK,
            lambda index: torch.ops.aten._weight_int4pack_mm(a, weights[index % len(weights)], config.group, pairs),
            lambda out: workload.check_within(out, LIMITS["bfloat16"]),
            "bfloat16 in, float32 sums",
            copies=len(weights),
        )

    return make


def gemlite(cache: int) -> Peer:
    """gemlite's Triton kernels for float16 and 1, 2, 4 or 8 bits."""

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        config, weight = workload.config, integer_codes(workload)
        if config.A_dtype != "float16" or weight is None or weight.bits not in (1, 2, 4, 8) or config.with_bias:
            return Skipped(GEMLITE, "serves float16 and integers of 1, 2, 4 and 8 bits")
        try:
            module = importlib.import_module("gemlite.core")
        except ImportError as error:
            return Skipped(GEMLITE, f"cannot be imported ({error}): {_INSTALL}", missing=True)
        kind = getattr(module, "GemLiteLinear", None) or module.GemLiteLinearTriton
        half = module.DType.FP16
        scale, points = (tensor.to(torch.float16) for tensor in (weight.scale, weight.points))
        size = config.N * config.K * weight.bits // 8
        count = max(1, min(len(rotate(torch.empty(size, dtype=torch.uint8, device="meta"), budget, cache)), 64))

        def layer() -> Callable[[torch.Tensor], torch.Tensor]:
            made = kind(weight.bits, config.group, config.K, config.N, input_dtype=half, output_dtype=half)
            made.pack(weight.codes.clone(), scale.clone(), points.clone(), None)
            return made

        try:
            layers = [layer() for _ in range(count)]
        except (RuntimeError, NotImplementedError, TypeError, AssertionError, ValueError, AttributeError) as error:
            return Skipped(GEMLITE, f"this version cannot: {str(error).splitlines()[0]}")
        return Candidate(
            GEMLITE,
            lambda index: layers[index % len(layers)](workload.a),
            lambda out: workload.check_within(out, LIMITS["float16"]),
            "float16",
            copies=len(layers),
        )

    return make


def int_mm(cache: int) -> Peer:
    """torch's int8 product on the values of the weight."""

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        config = workload.config
        plain = workload.scale is None and workload.zero_points is None and workload.bias is None
        if config.A_dtype != "int8" or not config.format.is_integer or not plain or workload.m <= 16:
            return Skipped(INT_MM, "multiplies more than 16 rows of int8 by int8, without scales")
        weights = rotate(workload.dense(torch.float32).to(torch.int8), budget, cache)
        return Candidate(
            INT_MM,
            lambda index: torch._int_mm(workload.a, weights[index % len(weights)].T),
            lambda out: workload.check_within(out, 0.0),
            "int32",
            copies=len(weights),
        )

    return make


def scaled_mm(cache: int) -> Peer:
    """torch's float8 product, where weights are of float8, too."""

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        config = workload.config
        if config.A_dtype != "float8_e4m3" or config.W_dtype != "float8_e4m3" or config.with_scaling:
            return Skipped(SCALED_MM, "multiplies float8 by float8, without scales in groups")
        one = torch.ones((), device=workload.a.device)
        weights = rotate(workload.weight.view(torch.float8_e4m3fn), budget, cache)
        return Candidate(
            SCALED_MM,
            lambda index: torch._scaled_mm(
                workload.a, weights[index % len(weights)].T, one, one, out_dtype=torch.bfloat16
            ),
            lambda out: workload.check_within(out, LIMITS["bfloat16"]),
            "float8 in, float32 sums",
            copies=len(weights),
        )

    return make


def dense_cache(cache: int, op_of: Callable[[Workload], Matmul] | None) -> Peer:
    """Our operator where it keeps the decoded weight and multiplies with torch."""

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        if op_of is None or workload.m < _MANY_ROWS:
            return Skipped(DENSE_CACHE, f"is timed from {_MANY_ROWS} rows on")
        try:
            op = op_of(workload)
        except (BitBLASError, TypeError) as error:
            return Skipped(DENSE_CACHE, f"this bitblas cannot: {str(error).splitlines()[0]}")
        found = ours_on_card(op, workload, budget, cache)
        # in a graph the weights would be decoded each time
        return Candidate(DENSE_CACHE, found.call, found.check, "float16", copies=found.copies, captured=False)

    return make
