"""Small attentions that reach every rule for cards; as a program, with a case's name, it checks one of them on a card."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace

import torch

import attention_reference
from attention_reference import Problem
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


def draw(config: FlashAttenConfig, sizes: Sizes, size: float = 1.0) -> Problem:
    """A random problem of these sizes: normal numbers, and Q times `size`."""
    return attention_reference.draw(config, **asdict(sizes), size=size)


def check_result(out: torch.Tensor, problem: Problem) -> None:
    """Compare with float64. Tensor cores take weights in the dtype of V, and cut sums off where others round."""
    attention_reference.assert_close(out, problem, problem.config.V_dtype, 2 * ROUNDOFF["float32"])


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
        problem = draw(config, sizes)
        check_result(op(*problem.to(device)), problem)


def open_case(name: str) -> FlashAttenConfig:
    """The config of a case for any number of queries."""
    return replace(CASES[name][0], seq_len=None)


if __name__ == "__main__":
    check(sys.argv[1])
    sys.stdout.write("right\n")
