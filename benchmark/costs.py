"""The costs around the kernels: importing, building, loading, calling and transforming."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bitblas import BitBLASError, Matmul, MatmulConfig
from bitblas.bench import draw_workload

from .goals import Goal

IMPORT_SECONDS, COLD_SECONDS, WARM_SECONDS = 0.1, 3.0, 0.01
CALL_SECONDS, TRANSFORM_SECONDS, TRANSFORM_PEAK = 5e-6, 0.3, 6.0


def at_most(name: str, unit: str, limit: float, measure: Callable[[], float], scale: float = 1.0) -> Goal:
    """A goal of seconds, or of something else, that must not be more; `scale` brings it to its unit."""
    asked = f"≤ {limit * scale:g} {unit}"
    try:
        found = measure()
    except (BitBLASError, subprocess.CalledProcessError, OSError, ValueError) as error:
        text = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Goal(name, asked, text[-1] if text else type(error).__name__, None)
    return Goal(name, asked, f"{found * scale:.3g} {unit}", found <= limit)


def fresh(script: str, cache: str | None = None) -> float:
    """The number that a script prints last, run in a fresh process."""
    env = dict(os.environ)
    if cache is not None:
        env["BITBLAS_CACHE_DIR"] = cache
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


_IMPORT = """
import time, torch
began = time.perf_counter()
import bitblas
print(time.perf_counter() - began)
"""

_BUILD = """
import time, torch, bitblas
{extra}
config = bitblas.MatmulConfig(M={M}, N=4096, K=4096, A_dtype="float16", W_dtype="uint4", with_scaling=True,
                              with_zeros=True, zeros_mode="quantized", group_size=128, accum_dtype="float32")
began = time.perf_counter()
op = bitblas.Matmul(config)
seconds = time.perf_counter() - began
assert op.origin == {origin!r}, op.origin
print(seconds)
"""

_TRANSFORM = """
import time, torch, bitblas

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

config = bitblas.MatmulConfig(M=1, N=11008, K=4096, A_dtype="float16", W_dtype="uint4", with_scaling=True, group_size=128)
op = bitblas.Matmul(config, from_database=True)
codes = torch.empty(11008, 4096, dtype=torch.uint8).random_(0, 16)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before = status("VmRSS")
began = time.perf_counter()
weight = op.transform_weight(codes)
seconds = time.perf_counter() - began
peak = status("VmHWM") - before
print(peak / codes.numel() if {memory} else seconds)
"""


def cost_goals() -> Iterator[Goal]:
    """Importing, building, loading, calling and transforming, mostly in fresh processes."""

    def median(script: str, cache: str | None = None, runs: int = 5) -> float:
        return statistics.median(fresh(script, cache) for _ in range(runs))

    yield at_most("`import bitblas` after `import torch`", "ms", IMPORT_SECONDS, lambda: median(_IMPORT), 1e3)
    for name, rows in (("M=1", 1), ("M=None, eight buckets", None)):
        with tempfile.TemporaryDirectory(prefix="bitblas-goals-") as directory:
            caches = [str(Path(directory) / str(index)) for index in range(2)]
            cold = _BUILD.format(extra="import tvm", M=rows, origin="compiled")
            warm = _BUILD.format(extra="", M=rows, origin="loaded")
            yield at_most(
                f"a cold operator after `import tvm`, {name}",
                "s",
                COLD_SECONDS,
                lambda cold=cold, caches=caches: statistics.median(fresh(cold, cache) for cache in caches),
            )
            yield at_most(
                f"a warm operator in a fresh process, {name}",
                "ms",
                WARM_SECONDS,
                lambda warm=warm, caches=caches: median(warm, caches[0]),
                1e3,
            )
    yield at_most("a call above its kernel", "µs", CALL_SECONDS, call_overhead, 1e6)
    seconds, peak = (_TRANSFORM.format(memory=memory) for memory in (False, True))
    yield at_most("transform_weight 11008 × 4096, uint4", "s", TRANSFORM_SECONDS, lambda: median(seconds, runs=3))
    yield at_most(
        "its peak memory, beyond the int8 codes it is given", "× codes", TRANSFORM_PEAK, lambda: median(peak, runs=3)
    )


def call_overhead(calls: int = 2000, rounds: int = 15) -> float:
    """Seconds that a call takes beyond the bare kernel, on a matmul that takes next to nothing."""
    config = MatmulConfig(M=1, N=16, K=32, A_dtype="float16", W_dtype="uint4", with_scaling=True, accum_dtype="float32")
    op, workload = Matmul(config), draw_workload(config, 1)
    weight, a, scale = op.transform_weight(workload.weight), workload.a, workload.scale
    kernel = op.lib[op.plan.buckets[0][1]]  # type: ignore[index]
    flat, out = weight.view(-1), torch.empty(1, 16, dtype=torch.float16)
    bare: list[float] = []
    whole: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            kernel(a, flat, scale, out)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(calls):
            op(a, weight, scale)
        whole.append(time.perf_counter() - began)
    return (statistics.median(whole) - statistics.median(bare)) / calls
