"""`python -m benchmark.accuracy`: how far results of exact activations are from float64, by what multiplies, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from bitblas import Matmul, MatmulConfig
from bitblas.bench.workload import draw_workload
from bitblas.target import host_features, resolve_target

from .quantization_error import gaussian, with_outliers


def with_large_outliers(m: int, k: int) -> torch.Tensor:
    """Gaussian float32 (m, k) but for one of 1024 channels, which is a thousand times as large."""
    a = gaussian(m, k)
    a[:, ::1024] *= 1000
    return a


def lognormal(m: int, k: int) -> torch.Tensor:
    """float32 (m, k) of random sign whose logarithm is Gaussian, with a standard deviation of 2."""
    return gaussian(m, k).sign() * torch.exp(2 * gaussian(m, k + 1)[:, 1:])


#: Name of the activations -> how they are drawn.
ACTIVATIONS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "Gaussian": gaussian,
    "0.1 % of the channels × 50": with_outliers,
    "0.1 % of the channels × 1000": with_large_outliers,
    "lognormal, σ = 2": lognormal,
}

#: What multiplies -> the target whose first rule does so.
UNITS = {"float32 products": "x86-64-v4", "slices": "llvm"}


def errors(m: int, n: int, k: int) -> Iterator[tuple[str, list[float]]]:
    """(activations, errors): of each of `UNITS`, and of torch's float32 linear on the dequantized weight.

    An error is the root mean square distance from float64, over the root mean square of the result.
    """
    config = MatmulConfig(
        M=m,
        N=n,
        K=k,
        A_dtype="float32",
        W_dtype="uint4",
        out_dtype="float32",
        accum_dtype="float32",
        group_size=128,
        with_scaling=True,
        with_zeros=True,
    )
    base = draw_workload(config, m)
    dense = base.dense(torch.float32)
    for name, draw in ACTIVATIONS.items():
        work = replace(base, a=draw(m, k))
        outs = []
        for target in UNITS.values():
            op = Matmul(config, target=target)
            outs.append(op(work.a, op.transform_weight(work.weight), **work.extras))
        outs.append(functional.linear(work.a, dense))
        yield name, [float((out.double() - work.expected).norm() / work.expected.norm()) for out in outs]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 2 where this CPU has not both kinds of units."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.accuracy", description=__doc__)
    parser.add_argument("-M", type=int, default=64, help="rows of A (64)")
    parser.add_argument("-N", type=int, default=1024, help="output features (1024)")
    parser.add_argument("-K", type=int, default=4096, help="input features, a multiple of 128 (4096)")
    options = parser.parse_args(argv)
    missing = resolve_target("cascadelake").features - host_features()
    if missing:
        print(f"this CPU has no AVX-512 VNNI: it lacks {', '.join(sorted(missing))}", file=sys.stderr)
        return 2
    header = ["activations", *UNITS, "torch float32"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name, found in errors(options.M, options.N, options.K):
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in found)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
