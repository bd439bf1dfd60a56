"""`python -m benchmark.quantization_error`: what `dynamic_quantization` costs in accuracy, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from bitblas import Matmul, MatmulConfig
from bitblas.bench.workload import draw_workload

#: Name of the weights -> what makes their config, beside scales in the groups of `WAYS`.
WEIGHTS: dict[str, dict[str, object]] = {
    "uint4 + zeros": {"W_dtype": "uint4", "with_zeros": True},
    "int8": {"W_dtype": "int8"},
    "int2": {"W_dtype": "int2"},
}
#: (`dynamic_quantization`, group size); a row of A has one scale in any case, whatever the groups of the weights.
WAYS = (("row", 128), ("group", 128), ("group", 32))
#: One channel of so many is an outlier, and how much larger than the others.
OUTLIERS, OUTLIER_SIZE = 1000, 50.0


def gaussian(m: int, k: int) -> torch.Tensor:
    """float32 (m, k), each element from the normal distribution."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1))


def with_outliers(m: int, k: int) -> torch.Tensor:
    """The same, but for a thousandth of the k, which are `OUTLIER_SIZE` times as large in all rows."""
    channels = torch.randperm(k, generator=torch.Generator().manual_seed(2))[: max(1, round(k / OUTLIERS))]
    return gaussian(m, k).index_copy(1, channels, gaussian(m, k)[:, channels] * OUTLIER_SIZE)


#: Name of the activations -> how they are drawn.
ACTIVATIONS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "Gaussian": gaussian,
    f"0.1 % of the channels × {OUTLIER_SIZE:.0f}": with_outliers,
}


def relative_error(config: MatmulConfig, a: torch.Tensor) -> float:
    """Root mean square distance of an operator's results from the float64 ones of exact activations, over the latter's size.

    Parameters
    ----------
    config : MatmulConfig
        With A and output in float32, whose rounding does not count beside that to int8.
    a : torch.Tensor
        (m, K) float32.
    """
    work = replace(draw_workload(config, len(a)), a=a)
    op = Matmul(config)
    out = op(a, op.transform_weight(work.weight), **work.extras)
    return float((out.to(torch.float64) - work.expected).norm() / work.expected.norm())


def errors(m: int, n: int, k: int) -> Iterator[tuple[str, str, list[float]]]:
    """(weights, activations, errors): the error of each of `WAYS`, and last that of activations rounded to bfloat16 instead."""
    for weights, fields in WEIGHTS.items():
        for activations, draw in ACTIVATIONS.items():
            a, found = draw(m, k), []
            for how, group in (*WAYS, (None, 128)):
                config = MatmulConfig(
                    M=m,
                    N=n,
                    K=k,
                    A_dtype="float32",
                    out_dtype="float32",
                    accum_dtype="float32",
                    group_size=group,
                    with_scaling=True,
                    dynamic_quantization=how,
                    **fields,
                )
                found.append(relative_error(config, a) if how else _bfloat16_error(config, a))
            yield weights, activations, found


def _bfloat16_error(config: MatmulConfig, a: torch.Tensor) -> float:
    work = replace(draw_workload(config, len(a)), a=a)
    rounded = replace(work, a=a.to(torch.bfloat16)).expected
    return float((rounded - work.expected).norm() / work.expected.norm())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.quantization_error", description=__doc__)
    parser.add_argument("-M", type=int, default=128, help="rows of A (128)")
    parser.add_argument("-N", type=int, default=1024, help="output features (1024)")
    parser.add_argument("-K", type=int, default=4096, help="input features, a multiple of 128 (4096)")
    options = parser.parse_args(argv)
    ways = [how if how == "row" else f"{how} of {group}" for how, group in WAYS]
    header = ["weights", "activations", *ways, "None, A in bfloat16"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for weights, activations, found in errors(options.M, options.N, options.K):
        cells = [weights, activations, *(f"{100 * error:.2f} %" for error in found)]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
