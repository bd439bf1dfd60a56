"""Two matmuls with 4-bit weights, each compared with torch: results, times, and where the kernels came from."""

import sys
import time

import torch

import bitblas

N, K = 4096, 4096
ORIGINS = {
    "compiled": "compiled, and kept for the next time",
    "loaded": "loaded from the cache, without a compiler",
    "in memory": "compiled in memory (there is no C compiler to keep it with)",
}


def build(config: bitblas.MatmulConfig) -> bitblas.Matmul:
    """Build an operator and say how that went."""
    began = time.perf_counter()
    op = bitblas.Matmul(config)
    seconds = time.perf_counter() - began
    print(f"  kernels    {ORIGINS[op.origin]}: {seconds:.3f} s")
    return op


def compare(ours, torchs) -> bool:
    """Call both in turns; print the distance of the results and the shortest times."""
    result, expected = ours(0).float(), torchs(0)
    error = float((result - expected).abs().max() / expected.square().mean().sqrt())
    times: tuple[list[float], list[float]] = [], []
    for index in range(30):
        for function, taken in zip((ours, torchs), times, strict=True):
            began = time.perf_counter()
            function(index)
            taken.append(time.perf_counter() - began)
    here, there = (min(taken) * 1e6 for taken in times)  # on a busy machine a median says more of the others
    right = error < 0.01  # float16 results: some 2^-11 of the largest
    print(f"  results    differ from torch's by at most {error:.1e} of their size: {'right' if right else 'WRONG'}")
    print(f"  best time  bitblas {here:.0f} us, torch {there:.0f} us in float32: {there / here:.1f} times as fast")
    return right


def int4() -> bool:
    """Signed 4-bit weights, float16 activations, one row: what decoding a token is made of."""
    print(f"\nfloat16 x int4, {N} x {K}, one row")
    config = bitblas.MatmulConfig(
        M=1, N=N, K=K, A_dtype="float16", W_dtype="int4", out_dtype="float16", accum_dtype="float32"
    )
    op = build(config)
    weight = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    activation = torch.randn(1, K, dtype=torch.float16)

    packed = [op.transform_weight(weight)]  # half a byte each, in the order that the kernel reads
    packed += [packed[0].clone() for _ in range(7)]  # several, so that they come from memory, as in a model
    dense, wide = weight.float(), activation.float()
    return compare(
        lambda index: op(activation, packed[index % 8]),
        lambda index: torch.nn.functional.linear(wide, dense),
    )


def grouped_uint4() -> bool:
    """Unsigned 4-bit weights, with a scale and a zero point for each 128 of them, as GPTQ and AWQ make them."""
    print(f"\nfloat16 x uint4 in groups of 128 with scales and zeros, {N} x {K}, 16 rows")
    group = 128
    config = bitblas.MatmulConfig(
        M=[1, 16],  # any number of rows is accepted; these get kernels of their own
        N=N,
        K=K,
        A_dtype="float16",
        W_dtype="uint4",
        out_dtype="float16",
        accum_dtype="float32",
        group_size=group,
        with_scaling=True,
        with_zeros=True,
        zeros_mode="original",  # (w - zero) * scale
    )
    op = build(config)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = ((0.5 + torch.rand(N, K // group)) / 256).to(torch.float16)
    zeros = torch.randint(0, 16, (N, K // group)).to(torch.float16)
    activation = torch.randn(16, K, dtype=torch.float16)

    packed = [op.transform_weight(codes)]
    packed += [packed[0].clone() for _ in range(7)]
    spread = [tensor.float().repeat_interleave(group, dim=1) for tensor in (zeros, scale)]
    dense, wide = (codes.float() - spread[0]) * spread[1], activation.float()
    return compare(
        lambda index: op(activation, packed[index % 8], scale, zeros),
        lambda index: torch.nn.functional.linear(wide, dense),
    )


def main() -> int:
    """Run both; return 1 where a result was wrong."""
    torch.manual_seed(0)
    print(f"bitblas {bitblas.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    right = [int4(), grouped_uint4()]
    print("\nRun it again: the kernels are loaded then. `bitblas info` shows where they are kept.")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
