"""torch's own kernels for quantized weights."""

from __future__ import annotations

import torch

from bitblas.bench import Candidate, Skipped, Workload, rotate

from .operands import LIMITS, integer_codes

INT4PACK = "torch int4pack"
_GROUPS = (32, 64, 128, 256)


def int4pack(workload: Workload, budget: int) -> Candidate | Skipped:
    """torch's own 4-bit kernel, which multiplies (q - 8)·s + z; with bfloat16 activations, the only ones it is fast for."""
    config, weight = workload.config, integer_codes(workload)
    if (
        weight is None
        or weight.bits != 4
        or config.group not in _GROUPS
        or config.with_bias
        or config.A_dtype == "int8"
    ):
        return Skipped(INT4PACK, "serves 4-bit integers in groups of 32, 64, 128 or 256, and no int8 activations")
    a = workload.a.to(torch.bfloat16)
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 2)
    except (AttributeError, RuntimeError) as error:
        return Skipped(INT4PACK, f"this torch cannot: {str(error).splitlines()[0]}")
    pairs = torch.stack([weight.scale, (8 - weight.points) * weight.scale], dim=-1)
    pairs = pairs.transpose(0, 1).contiguous().to(a.dtype)
    weights = rotate(packed, budget)
    return Candidate(
        INT4PACK,
        lambda index: torch._weight_int4pack_mm_for_cpu(a, weights[index % len(weights)], config.group, pairs),
        lambda out: workload.check_within(out, LIMITS["bfloat16"]),
        "bfloat16 in, float32 sums",
    )
