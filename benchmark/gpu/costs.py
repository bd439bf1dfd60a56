"""The costs around the kernels on a card: building, loading, and what a call takes the host."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bitblas import Matmul, MatmulConfig

from ..costs import at_most, fresh
from ..goals import Goal

COLD_SECONDS, WARM_SECONDS, CALL_SECONDS = 15.0, 0.02, 10e-6
#: Calls that are timed together: fewer than a card takes before it makes the host wait.
CALLS, ROUNDS = 100, 30

_BUILD = """
import time, torch, bitblas
torch.zeros(1, device="cuda")
{extra}
config = bitblas.MatmulConfig(M={M}, N=4096, K=4096, A_dtype="float16", W_dtype="int4", with_scaling=True, group_size=128,
                              accum_dtype="float32")
began = time.perf_counter()
op = bitblas.Matmul(config, target="cuda")
seconds = time.perf_counter() - began
assert op.origin == {origin!r}, op.origin
print(seconds)
"""


def cost_goals() -> Iterator[Goal]:
    """The host's part of a call; a cold and a warm operator, in fresh processes."""
    yield at_most("the host's part of a call", "µs", CALL_SECONDS, host_seconds, 1e6)
    for name, rows in (("M=1", 1), ("M=None, eight buckets", None)):
        with tempfile.TemporaryDirectory(prefix="bitblas-goals-") as directory:
            cache = str(Path(directory) / "cache")
            cold = _BUILD.format(extra="", M=rows, origin="compiled")
            warm = _BUILD.format(extra="", M=rows, origin="loaded")
            yield at_most(
                f"a cold operator, {name}", "s", COLD_SECONDS, lambda cold=cold, cache=cache: fresh(cold, cache)
            )
            yield at_most(
                f"a warm operator in a fresh process, {name}",
                "ms",
                WARM_SECONDS,
                lambda warm=warm, cache=cache: statistics.median(fresh(warm, cache) for _ in range(3)),
                1e3,
            )


def host_seconds(calls: int = CALLS, rounds: int = ROUNDS) -> float:
    """Seconds that the host takes for a call, the output's allocation included; on kernels that are shorter than that."""
    config = MatmulConfig(
        M=1, N=512, K=512, A_dtype="float16", W_dtype="int4", with_scaling=True, accum_dtype="float32"
    )
    op = Matmul(config, target="cuda")
    weight = op.transform_weight(torch.randint(-8, 8, (512, 512))).cuda()
    a, scale = torch.randn(1, 512).half().cuda(), torch.ones(512, 1).half().cuda()
    op(a, weight, scale)
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            op(a, weight, scale)
        taken.append((time.perf_counter() - began) / calls)
    return statistics.median(taken)
