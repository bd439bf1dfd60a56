"""``python -m benchmark.resources``: what nvcc makes of the kernels of an operator for cards, as Markdown. Needs no card."""

from __future__ import annotations

import argparse

from bitblas import Matmul, MatmulConfig
from bitblas.cuda.resources import read_resources
from bitblas.schedule.cuda.tiles import FragmentTiling

COLUMNS = (
    "rows",
    "tile (rows x columns x k)",
    "warps (columns x k)",
    "stages",
    "parts of K",
    "blocks",
    "registers",
    "spills",
    "shared bytes",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def rows(op: Matmul) -> list[str]:
    """The lines of the table of an operator that nvcc has built, a kernel each."""
    resources, lines = read_resources(op.artifact.manifest), []
    for kernel in op.plan.kernels:
        took, tiling = resources[f"{kernel.name}_kernel"], kernel.tiling
        facts: tuple[object, ...] = (kernel.rule, "", "", "", "", took.registers, took.spill_stores, took.shared)
        if isinstance(tiling, FragmentTiling):
            config, m = op.plan.config, kernel.buckets[-1]
            blocks = -(-m // tiling.block_m) * -(-config.N // tiling.block_n) * tiling.split_k
            tile = f"{tiling.block_m} x {tiling.block_n} x {tiling.block_k}"
            warps = f"{tiling.warps_n} x {tiling.warps_k}"
            numbers = (took.registers, took.spill_stores, tiling.shared_bytes(config))
            facts = (tile, warps, tiling.stages, tiling.split_k, blocks, *numbers)
        lines.append(f"| {', '.join(map(str, kernel.buckets))} | {' | '.join(map(str, facts))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.resources", description=__doc__)
    parser.add_argument("--target", default="cuda -arch=sm_90")
    parser.add_argument("--N", type=int, default=4096)
    parser.add_argument("--K", type=int, default=4096)
    parser.add_argument("--W_dtype", default="uint4")
    parser.add_argument("--A_dtype", default="float16")
    parser.add_argument(
        "--M", type=int, nargs="+", help="rows that kernels are made for; default: those of MatmulConfig"
    )
    parser.add_argument(
        "--ternary", action="store_true", help="int2 with one scale, activations quantized by row, a bias: a BitLinear"
    )
    given = parser.parse_args()
    fields = {"with_scaling": True, "with_zeros": given.W_dtype.startswith(("uint", "int")), "group_size": 128}
    if given.ternary:
        given.W_dtype = "int2"
        fields = {"with_scaling": True, "scale_per_tensor": True, "with_bias": True}
        fields |= {"dynamic_quantization": "row", "activation_eps": 1e-6}
    shape = {"M": given.M, "N": given.N, "K": given.K}
    config = MatmulConfig(**shape, A_dtype=given.A_dtype, W_dtype=given.W_dtype, out_dtype=given.A_dtype, **fields)
    op = Matmul(config, target=given.target)
    print(HEADER, *rows(op), sep="\n")
    print(f"\n{op.origin} in {op.provided.seconds:.3f} s")


if __name__ == "__main__":
    main()
