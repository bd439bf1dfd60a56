"""`python -m benchmark.overhead`: what a call of a layer takes beyond its kernel, on shapes that take next to nothing."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

import bitblas

#: Seconds that a call of a layer may take beyond the launch of its kernel.
ALLOWED = 5e-6
#: in_features, out_features.
K, N = 32, 16


def layer_of(dtype: str, bias: bool) -> bitblas.Linear:
    """A small uint4 layer, filled."""
    layer = bitblas.Linear(
        K, N, bias, dtype, "uint4", "float32", dtype, 16, True, True, "quantized", [1], enable_tuning=False
    )
    layer.load_and_transform_weight(torch.randint(0, 16, (N, K)), torch.ones(N, K // 16))
    return layer


def candidates(dtype: str, bias: bool) -> dict[str, Callable[[], object]]:
    """Calls with one row, by name; the launch of the kernel alone is the first."""
    layer, linear = layer_of(dtype, bias), torch.nn.Linear(K, N, bias, dtype=getattr(torch, dtype))
    linear.requires_grad_(False)
    op, a = layer.bitblas_matmul, torch.randn(1, K).to(getattr(torch, dtype))
    op.build()
    layer(a)
    kernel = op.lib[op.plan.buckets[0][1]]  # type: ignore[index]
    weight = layer.qweight
    rest = [t for t in (layer.scales, layer.zeros, layer.bias) if t is not None]
    operands, out = (a, weight.view(-1), *rest), torch.empty(1, N, dtype=a.dtype)
    return {
        "kernel": lambda: kernel(*operands, out),
        "operator": lambda: op(a, weight, *rest),
        "bitblas.Linear": lambda: layer(a),
        "torch.nn.Linear": lambda: linear(a),
    }


def measure(calls: dict[str, Callable[[], object]], count: int = 1000, rounds: int = 25) -> dict[str, float]:
    """Median seconds of each call, in turns A B A B."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - began) / count)
    return {name: statistics.median(found) for name, found in seconds.items()}


def rows(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """Lines of Markdown: a row for each case, in microseconds."""
    names = list(next(iter(found.values())))
    yield "| µs a call, M = 1, " + f"{N} x {K} uint4 | " + " | ".join(names) + " | layer - kernel |"
    yield "|---|" + "---|" * (len(names) + 1)
    for case, seconds in found.items():
        cells = [*(seconds[name] for name in names), overhead(seconds)]
        yield f"| {case} | " + " | ".join(f"{1e6 * value:.2f}" for value in cells) + " |"


def overhead(seconds: dict[str, float]) -> float:
    """What the layer takes beyond its kernel."""
    return seconds["bitblas.Linear"] - seconds["kernel"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmark.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="turns of each call (25)")
    options = parser.parse_args(argv)
    found = {}
    for dtype, bias in (("float16", False), ("float16", True), ("float32", True)):
        for grad in (False, True):
            case = f"{dtype}{', bias' if bias else ''}, {'with' if grad else 'without'} grad mode"
            with torch.set_grad_enabled(grad):
                found[case] = measure(candidates(dtype, bias), rounds=options.rounds)
    print("\n".join(rows(found)))
    worst = max(overhead(seconds) for seconds in found.values())
    print(f"\nworst: {1e6 * worst:.2f} µs; the goal is at most {1e6 * ALLOWED:g} µs")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
