"""`python -m benchmark.codecs`: how fast checkpoints are repacked and weights are quantized, on one thread, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch

from bitblas.codecs import QuantizedWeight, from_awq, from_bitnet, from_compressed, from_gptq, quantize
from bitblas.codecs.bitnet import ternary

from .cases import parse_shapes

GROUP = 128
#: Rows and columns of the weights, and how often each is repacked; the median counts.
SHAPES, REPEATS = "4096x4096,11008x4096", 5
#: Megabytes of source a second that every way of repacking has to reach on one core.
GOAL = 200.0


def words(rows: int, columns: int) -> torch.Tensor:
    """Random int32 (rows, columns), every bit of them."""
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)


def order(k: int) -> torch.Tensor:
    """The group of each column, as act-order leaves it."""
    return (torch.arange(k, dtype=torch.int32) // GROUP)[torch.randperm(k)]


def gptq(n: int, k: int, bits: int, act_order: bool = False, sym: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of a GPTQ layer; `sym`: whose zero points are all in the middle, in version 1."""
    tensors = {"qweight": words(k * bits // 32, n), "qzeros": words(k // GROUP, n * bits // 32)}
    if sym:
        tensors["qzeros"].fill_(0x77777777)
    return {**tensors, "scales": torch.rand(k // GROUP, n).half(), **({"g_idx": order(k)} if act_order else {})}


def awq(n: int, k: int) -> dict[str, torch.Tensor]:
    """Tensors of an AWQ layer."""
    return {
        "qweight": words(k, n // 8),
        "qzeros": words(k // GROUP, n // 8),
        "scales": torch.rand(k // GROUP, n).half(),
    }


def compressed(n: int, k: int, bits: int, act_order: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of a "pack-quantized" layer with zero points."""
    tensors = {
        "weight_packed": words(n, k * bits // 32),
        "weight_scale": torch.rand(n, k // GROUP).bfloat16(),
        "weight_zero_point": words(n * bits // 32, k // GROUP),
        "weight_shape": torch.tensor([n, k]),
    }
    return {**tensors, **({"weight_g_idx": order(k)} if act_order else {})}


def bitnet(n: int, k: int) -> dict[str, torch.Tensor]:
    """Tensors of a BitNet layer, whose codes are 0, 1 and 2."""
    codes = torch.randint(0, 3, (4, n // 4, k), dtype=torch.uint8)
    weight = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    return {"weight": weight, "weight_scale": torch.ones(1, dtype=torch.bfloat16)}


def dense(n: int, k: int) -> dict[str, torch.Tensor]:
    """A weight in float16."""
    return {"weight": (torch.randn(n, k) * 0.02).half()}


@dataclass(frozen=True)
class Case:
    """One way to get a `QuantizedWeight`.

    Attributes
    ----------
    draw : callable
        (N, K) -> the arguments that are tensors.
    repack : callable
        What takes them, by name.
    has_goal : bool
        Whether it has to reach `GOAL`.
    """

    draw: Callable[[int, int], Mapping[str, torch.Tensor]]
    repack: Callable[..., QuantizedWeight]
    has_goal: bool = True


CASES = {
    **{f"gptq v1 {b} bits": Case(partial(gptq, bits=b), partial(from_gptq, bits=b)) for b in (2, 3, 4, 8)},
    "gptq v1 4 bits sym": Case(partial(gptq, bits=4, sym=True), from_gptq),
    "gptq v2 4 bits": Case(partial(gptq, bits=4), partial(from_gptq, version=2)),
    **{
        f"gptq v1 {b} bits act-order": Case(partial(gptq, bits=b, act_order=True), partial(from_gptq, bits=b))
        for b in (2, 3, 4, 8)
    },
    "awq 4 bits": Case(awq, from_awq),
    **{
        f"compressed-tensors {b} bits": Case(partial(compressed, bits=b), partial(from_compressed, bits=b))
        for b in (4, 8)
    },
    "compressed-tensors 4 bits act-order": Case(partial(compressed, bits=4, act_order=True), from_compressed),
    "bitnet": Case(bitnet, from_bitnet),
    "round to ternary": Case(dense, ternary),
    **{
        f"quantize to {name}": Case(dense, partial(quantize, W_dtype=name, group_size=GROUP), has_goal=False)
        for name in ("uint4", "int4", "uint3", "int8", "nf4", "float8_e4m3")
    },
}


def speed(case: Case, n: int, k: int) -> float:
    """Megabytes of source that are repacked in a second: the median of `REPEATS` runs, after one that does not count."""
    tensors, seconds = case.draw(n, k), []
    for _ in range(REPEATS + 1):
        begin = perf_counter()
        case.repack(**tensors)
        seconds.append(perf_counter() - begin)
    return sum(part.numel() * part.element_size() for part in tensors.values()) / 1e6 / median(seconds[1:])


def speeds(match: str, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, list[float]]]:
    """(case, megabytes a second for each shape) of the cases with `match` in their name."""
    for name, case in CASES.items():
        if match in name:
            yield name, [speed(case, n, k) for n, k in shapes]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.codecs", description=__doc__)
    parser.add_argument("--shapes", type=parse_shapes, default=SHAPES, help=f"NxK, multiples of {GROUP} ({SHAPES})")
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    options = parser.parse_args(argv)
    shapes = options.shapes
    threads, missed = torch.get_num_threads(), False
    torch.set_num_threads(1)
    try:
        print(
            f"| MB of source a second | {' | '.join(f'{n} x {k}' for n, k in shapes)} |\n|{'---|' * (len(shapes) + 1)}"
        )
        for name, found in speeds(options.match, shapes):
            missed |= CASES[name].has_goal and min(found) < GOAL
            print(f"| {name} | {' | '.join(f'{value:.0f}' for value in found)} |", flush=True)
    finally:
        torch.set_num_threads(threads)
    print(f"\nGoal, for what is repacked: {GOAL:.0f} MB a second. {'MISSED' if missed else 'Reached'}.")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
