"""Small attentions that reach every rule for cards, and what they must give; as a program, with a case's name, it checks that
on a card.

The float64 reference shares no code with the product: a ``config`` is read for its plain fields only.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import torch

from bitblas import FlashAtten, FlashAttenConfig
from reference import ROUNDOFF


@dataclass(frozen=True)
class Sizes:
    """Of one call."""

    batch: int
    seq_len: int
    seq_len_kv: int
    heads: int
    heads_kv: int


@dataclass(frozen=True)
class Operands:
    """Q, K and V of one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def to(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q.to(device), self.k.to(device), self.v.to(device)


def draw(config: FlashAttenConfig, sizes: Sizes, scale: float = 1.0) -> Operands:
    """Normal numbers; those of Q and K times a scale."""
    batch, seq_len, keys, heads, heads_kv = sizes.batch, sizes.seq_len, sizes.seq_len_kv, sizes.heads, sizes.heads_kv
    k_shape = (batch, config.dim, heads_kv, keys) if config.layout == "ntn" else (batch, keys, heads_kv, config.dim)
    return Operands(
        (scale * torch.randn(batch, seq_len, heads, config.dim)).to(getattr(torch, config.Q_dtype)),
        (scale * torch.randn(k_shape)).to(getattr(torch, config.K_dtype)),
        torch.randn(batch, keys, heads_kv, config.dim_v).to(getattr(torch, config.V_dtype)),
    )


def expected(config: FlashAttenConfig, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far from it each element may be: half the bits are those of weights, which tensor cores
    take in the dtype of V, and of the result; the others those of scores, summed in float32 and made powers of 2."""
    q, k, v = (tensor.double().cpu() for tensor in (operands.q, operands.k, operands.v))
    k = k.permute(0, 3, 2, 1) if config.layout == "ntn" else k
    group = q.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(group, dim=2) for tensor in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * config.softmax_scale
    sizes = torch.einsum("bihd,bjhd->bhij", q.abs(), k.abs()) * abs(config.softmax_scale)
    if config.is_causal:
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None, :]
        hidden = j > i + k.shape[1] - q.shape[1]
        scores, sizes = scores.masked_fill(hidden, -math.inf), sizes.masked_fill(hidden, 0.0)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(largest == -math.inf, 0.0, largest))
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total == 0, 0.0, weights / total)
    result = torch.einsum("bhij,bjhd->bihd", weights, v)
    moved = torch.expm1(2 * (2 * math.sqrt(config.dim) + 4) * ROUNDOFF["float32"] * sizes.amax(-1))  # of weights
    moved = moved + 2 * ROUNDOFF[config.V_dtype] + 4 * math.sqrt(k.shape[1]) * ROUNDOFF["float32"]
    allowed = moved.permute(0, 2, 1)[..., None] * torch.einsum("bhij,bjhd->bihd", weights, v.abs())
    allowed = allowed + 2.0**-24 * v.abs().sum(1, keepdim=True)  # weights may be subnormal
    return result, allowed + 2 * ROUNDOFF[config.Out_dtype] * result.abs() + 2.0**-24


def check_result(config: FlashAttenConfig, operands: Operands, out: torch.Tensor) -> None:
    """Compare: NaN where, and only where, it is expected; no other element farther off than it may be."""
    result, allowed = expected(config, operands)
    assert out.shape == result.shape
    out = out.double().cpu()
    assert torch.equal(out.isnan(), result.isnan())
    difference = (out - result).abs()
    wrong = difference > allowed
    worst = float((difference / allowed).nan_to_num().max()) if out.numel() else 0.0
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements are off, by up to {worst} of what is allowed"
    )


def _floats(dtype: str) -> dict[str, str]:
    return {"Q_dtype": dtype, "K_dtype": dtype, "V_dtype": dtype, "Out_dtype": dtype}


def _asked(**fields: object) -> FlashAttenConfig:
    """For any number of keys."""
    return FlashAttenConfig(seq_len_kv=None, **fields)


_BF16, _F32 = _floats("bfloat16"), _floats("float32")
_EVEN, _GROUPED = Sizes(1, 70, 150, 2, 2), Sizes(2, 33, 97, 6, 2)
#: By name: what is asked, and the sizes of calls: few rows and many, more keys than queries and fewer, one of each, grouped
#: heads.
CASES: dict[str, tuple[FlashAttenConfig, tuple[Sizes, ...]]] = {
    "half": (_asked(dim=64, seq_len=70), (_EVEN, Sizes(2, 70, 1, 2, 1))),
    "causal": (_asked(dim=128, seq_len=70, is_causal=True), (_EVEN, Sizes(1, 70, 33, 2, 1), Sizes(1, 70, 70, 1, 1))),
    "long": (_asked(dim=64, seq_len=300, is_causal=True), (Sizes(1, 300, 300, 1, 1),)),
    "grouped": (_asked(dim=128, seq_len=33, **_BF16, is_causal=True), (_GROUPED, Sizes(1, 33, 20, 4, 2))),
    "few": (_asked(dim=128, seq_len=1, is_causal=True), (Sizes(2, 1, 150, 8, 1), Sizes(1, 1, 1, 2, 2))),
    "transposed": (_asked(dim=64, seq_len=20, layout="ntn", is_causal=True), (Sizes(2, 20, 67, 2, 1),)),
    "transposed-long": (_asked(dim=80, seq_len=130, layout="ntn"), (Sizes(1, 130, 104, 1, 1),)),
    "tails": (_asked(dim=40, dim_v=72, seq_len=50, Out_dtype="bfloat16"), (Sizes(1, 50, 90, 3, 1),)),
    "wide": (_asked(dim=256, seq_len=130, is_causal=True, **_BF16), (Sizes(1, 130, 70, 1, 1),)),
    "float-out": (_asked(dim=96, seq_len=70, Out_dtype="float32"), (Sizes(1, 70, 40, 1, 1),)),
    "negative": (_asked(dim=64, seq_len=20, softmax_scale=-0.2, is_causal=True), (Sizes(1, 20, 40, 2, 1),)),
    "flat": (_asked(dim=64, seq_len=20, softmax_scale=0.0, is_causal=True), (Sizes(1, 20, 40, 2, 1),)),
    "float": (_asked(dim=64, seq_len=70, is_causal=True, **_F32), (_EVEN, Sizes(1, 70, 33, 2, 1))),
    "float-few": (_asked(dim=128, seq_len=1, **_F32), (Sizes(2, 1, 150, 8, 1),)),
    "odd": (_asked(dim=37, dim_v=5, seq_len=33, layout="ntn", is_causal=True), (_GROUPED,)),
    "mixed": (
        _asked(dim=200, dim_v=130, seq_len=17, K_dtype="bfloat16", Out_dtype="float32"),
        (Sizes(1, 17, 40, 2, 1),),
    ),
    "widest": (_asked(dim=1024, seq_len=3, **_F32), (Sizes(1, 3, 20, 1, 1),)),
}


def check(name: str, target: str = "cuda", device: str = "cuda") -> None:
    """Run a case."""
    config, calls = CASES[name]
    op = FlashAtten(config, target=target)
    for sizes in calls:
        operands = draw(config, sizes)
        check_result(config, operands, op(*operands.to(device)))


def open_case(name: str) -> FlashAttenConfig:
    """The config of a case for any number of queries."""
    return replace(CASES[name][0], seq_len=None)


if __name__ == "__main__":
    check(sys.argv[1])
    sys.stdout.write("right\n")
