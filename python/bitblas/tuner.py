"""Candidates -> build -> measure -> record; what builds and what measures are handed in."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from . import env, packing
from .artifacts import artifact_key
from .build import toolchain
from .config import MatmulConfig
from .errors import BuildError
from .layout import PackedLayout
from .logs import get_logger, progress
from .plan import MatmulPlan, native_layout, plan_matmul
from .runtime import Kernels
from .schedule import RULES, Problem, Tiling, select_rule
from .target import Target

#: Seconds and calls that a measurement takes at least.
MIN_SECONDS, MIN_CALLS = 0.05, 5
#: Bytes of weights to rotate through, so that they come from memory as they do in a model.
ROTATED_BYTES = 256 << 20


@dataclass(frozen=True)
class TunedBucket:
    """The outcome for one bucket.

    Attributes
    ----------
    tiling : Tiling
        The fastest.
    seconds : tuple of (Tiling, float)
        Median seconds of a call, of every candidate that was measured, in the rule's order.
    """

    tiling: Tiling
    seconds: tuple[tuple[Tiling, float], ...]

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        measured = [{"tiling": tiling.fields(), "seconds": seconds} for tiling, seconds in self.seconds]
        return {"tiling": self.tiling.fields(), "candidates": measured}


def random_operands(config: MatmulConfig, layout: PackedLayout, m: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A (m, K), and the operands that a kernel takes after it, with random contents, for the config of kernels."""
    with torch.device("cpu"):  # whatever the default device is
        return _random_operands(config, layout, m)


def _random_operands(config: MatmulConfig, layout: PackedLayout, m: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if config.A_dtype == "int8":
        a = torch.randint(-127, 128, (m, config.K), dtype=torch.int8, generator=generator)
    else:
        a = torch.randn(m, config.K, generator=generator).to(getattr(torch, config.held_dtype))
        a = a.view(getattr(torch, config.activation_dtype))
    operands = [random_weight(config, layout, generator)]
    dtype = getattr(torch, config.scale_dtype)
    if config.with_scaling:
        operands.append((torch.rand(config.N, config.num_groups, generator=generator) * 0.01).to(dtype))
    if config.with_zeros:
        bits = config.format.bits
        size = config.num_groups * ((config.N * bits + 7) // 8)
        if config.zeros_packed:
            operands.append(torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator))
        else:
            operands.append(torch.randint(0, 1 << bits, (config.N, config.num_groups), generator=generator).to(dtype))
    if config.with_bias:
        operands.append(torch.zeros(config.N, dtype=getattr(torch, config.bias_dtype)))
    return a, operands


def random_weight(config: MatmulConfig, layout: PackedLayout, generator: torch.Generator) -> torch.Tensor:
    """A packed weight of random finite values, flat."""
    fmt = config.format
    if fmt.is_native or fmt.kind == "float8":
        values = torch.randn(layout.N, layout.K, generator=generator).to(getattr(torch, fmt.torch_name))
        return packing.pack(values.view(packing.code_dtype(fmt)), layout).view(-1)
    return torch.randint(-128, 128, (layout.num_bytes,), dtype=torch.int8, generator=generator)


def measure(kernels: Kernels, config: MatmulConfig, layout: PackedLayout, m: int) -> float:
    """Median seconds of a call with `m` rows, weights rotated through more bytes than a cache holds."""
    a, (weight, *rest) = random_operands(config.kernel, layout, m)
    copies = max(1, min(16, ROTATED_BYTES // weight.numel()))
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    out = torch.empty(m, config.N, dtype=getattr(torch, config.out_dtype), device="cpu")
    for w in weights[:2]:
        kernels.launch(m, [a, w, *rest], out)
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < MIN_SECONDS:
        operands = [a, weights[len(times) % len(weights)], *rest]
        began = time.perf_counter()
        kernels.launch(m, operands, out)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def tune(
    config: MatmulConfig,
    target: Target,
    topk: int,
    build: Callable[[MatmulPlan], Kernels],
    time_rows: Callable[[Kernels, int], float],
) -> dict[int, TunedBucket]:
    """Measure the first `topk` tilings of each bucket's rule and choose the fastest.

    Parameters
    ----------
    config, target : MatmulConfig, Target
        What to tune.
    topk : int
        Candidates a bucket, at least 1.
    build : callable
        Turns a plan into kernels; a `BuildError` loses the candidate and not the run.
    time_rows : callable
        Measures kernels with a number of rows: seconds.

    Raises
    ------
    BuildError
        Not one candidate of a bucket could be built.
    """
    config = config.kernel
    layout = native_layout(config, target)
    candidates: dict[int, list[Tiling]] = {}
    for m in config.buckets:
        problem = Problem(config, layout, target, m)
        candidates[m] = select_rule(RULES, problem).tilings(problem)[: max(1, topk)]
    found: dict[int, TunedBucket] = {}
    total, what = sum(map(len, candidates.values())), f"tuning {config.N}x{config.K} {config.W_dtype}"
    with progress(what, total) as step:
        for m, tilings in candidates.items():
            seconds = []
            for tiling in tilings:
                step(f"m={m}")
                try:
                    kernels = build(plan_matmul(replace(config, M=m), target, {m: tiling}))
                except BuildError as error:
                    get_logger().warning("tuning lost %s for m=%d: %s", tiling, m, error)
                else:
                    seconds.append((tiling, time_rows(kernels, m)))
            if not seconds:
                raise BuildError(f"tuning: none of {len(tilings)} tilings for m={m} could be built")
            found[m] = TunedBucket(min(seconds, key=lambda pair: pair[1])[0], tuple(seconds))
    return found


def _record_path(config: MatmulConfig, target: Target) -> Path:
    key = artifact_key({"config": config.kernel.fields(), "target": target.fields(), "toolchain": toolchain()})
    return env.CACHE_DIR.get() / "tuning" / f"{key}.json"


def save_record(config: MatmulConfig, target: Target, found: dict[int, TunedBucket]) -> None:
    """Keep what was measured; a store that cannot be written costs only the record."""
    path = _record_path(config, target)
    record = {
        "config": config.fields(),
        "target": str(target),
        "buckets": {m: row.fields() for m, row in found.items()},
    }
    try:
        for directory in (path.parent.parent, path.parent):  # each as private as the store asks
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_suffix(f".{uuid.uuid4().hex}")
        draft.write_text(json.dumps(record, indent=1))
        draft.replace(path)
    except OSError as error:
        get_logger().warning("the tuning record could not be kept in %s: %s", path.parent, error)


def load_record(config: MatmulConfig, target: Target) -> dict[int, Tiling] | None:
    """The stored choices by bucket, or None; a damaged record counts as none."""
    path = _record_path(config, target)
    try:
        buckets = json.loads(path.read_text())["buckets"]
        return {int(m): Tiling(**row["tiling"]) for m, row in buckets.items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        get_logger().warning("the tuning record %s is not readable and is ignored: %s", path, error)
        return None
