"""Small problems that reach every rule for cards; as a program, with the name of a rule or a case, it checks that on a card."""

from __future__ import annotations

import sys
from dataclasses import replace

import reference
from bitblas import Matmul, MatmulConfig
from bitblas.errors import UnsupportedError
from bitblas.plan import plan_matmul
from bitblas.target import Target, resolve_target

#: Buckets: one row, a few, a tile of tensor cores, and many.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
#: The rule that decodes weights for torch's product.
DENSE_RULE = "cuda_dense"


def _config(a_dtype: str, w_dtype: str, N: int, K: int, **fields: object) -> MatmulConfig:
    defaults: dict[str, object] = {"out_dtype": "float32", "accum_dtype": "float32"}
    return MatmulConfig(M=ROWS, N=N, K=K, A_dtype=a_dtype, W_dtype=w_dtype, **{**defaults, **fields})


_GROUPS = {"with_scaling": True, "group_size": 128}
_HALF = {"out_dtype": "float16"}

#: Whole tiles, tails in every dimension, a group's edge, bias; floats, integers, float8, codebooks and native dtypes.
CONFIGS = (
    _config("float16", "uint4", 256, 512, with_zeros=True, zeros_mode="quantized", **_GROUPS, **_HALF),
    _config("bfloat16", "int4", 264, 384, with_bias=True, **_GROUPS),
    _config("float16", "uint2", 256, 512, with_zeros=True, **_GROUPS, **_HALF),
    _config("float16", "int3", 200, 256, with_scaling=True, group_size=64),
    _config("float16", "nf4", 256, 512, **_GROUPS),
    _config("float16", "float8_e4m3", 256, 512, with_scaling=True),
    _config("float16", "float16", 256, 512, out_dtype="float16"),
    _config("float32", "uint4", 128, 256, **_GROUPS),
    _config("int8", "int2", 256, 512, out_dtype="int32", accum_dtype="int32"),
    _config("int8", "int4", 256, 512, accum_dtype="int32", **_GROUPS),
    _config("int8", "int8", 256, 512, out_dtype="int32", accum_dtype="int32"),
    _config("float8_e4m3", "float8_e4m3", 256, 512),
    _config("float8_e5m2", "uint4", 256, 512),
    _config("float16", "uint4", 37, 96, with_scaling=True, group_size=24, with_bias=True),
    _config("int8", "uint3", 37, 99, out_dtype="int32", accum_dtype="int32"),
    _config("float16", "uint4", 32, 16384, **_GROUPS),  # few columns and a long K, which is shared out
)

_TERNARY = {"with_scaling": True, "scale_per_tensor": True, "with_bias": True, "activation_eps": 1e-6}
_BY_ROW = {"dynamic_quantization": "row"}
#: Activations that are quantized on the way: a layer of ternary weights, every dtype, zero points, groups, tails, a long K.
QUANTIZED = {
    "ternary": _config("float16", "int2", 256, 512, **_TERNARY, **_BY_ROW, **_HALF),
    "bfloat16": _config("bfloat16", "int2", 208, 384, **_TERNARY, **_BY_ROW),
    "float32": _config("float32", "int4", 256, 512, **_GROUPS, **_BY_ROW),
    "zeros": _config("float16", "uint4", 256, 512, with_zeros=True, **_GROUPS, **_BY_ROW),
    "bytes": _config("float16", "int8", 48, 320, with_scaling=True, **_BY_ROW),
    "parts": _config("float16", "int2", 32, 16384, **_TERNARY, **_BY_ROW),
    "tails": _config("float16", "int2", 37, 99, **_TERNARY, **_BY_ROW),
    "group": _config("float16", "uint4", 256, 512, **_GROUPS, dynamic_quantization="group"),
}


def by_rule(target: Target, few_rows: bool = False) -> dict[str, tuple[MatmulConfig, int]]:
    """For each rule that a target's plans take, the first of these problems that takes it, and its most rows, or fewest."""
    found: dict[str, tuple[MatmulConfig, int]] = {}
    for config in CONFIGS:
        try:
            kernels = plan_matmul(config, target).kernels
        except UnsupportedError:
            continue
        for kernel in kernels:
            m = kernel.buckets[0 if few_rows else -1]
            found.setdefault(kernel.rule, (replace(config, M=(m,)), m))
    return found


def check(config: MatmulConfig, m: int, target: str = "cuda", device: str = "cuda") -> None:
    """Run a config for m rows, for fewer and for more, on what is exact and what is not."""
    op = Matmul(config, target=target)
    for exact in (False, True):
        problem = reference.draw(config, m + 1, exact=exact)
        problem = reference.on_tensor_cores(problem) if op.layout.is_fragments else problem
        problem = reference.by_torch(problem) if op.plan.kernels[-1].rule == DENSE_RULE else problem
        weight = op.transform_weight(problem.weights).to(device)
        extras = {name: tensor.to(device) for name, tensor in problem.extras.items()}
        for rows in {max(1, m - 1), m, m + 1}:
            part = replace(problem, A=problem.A[:rows])
            out = op(part.A.to(device), weight, **extras)
            (reference.assert_exact if exact else reference.assert_close)(out.cpu(), part)


def quantized(name: str, m: int) -> tuple[MatmulConfig, int]:
    """A problem of `QUANTIZED` for so many rows."""
    return replace(QUANTIZED[name], M=(m,)), m


if __name__ == "__main__":
    cases = {f"{name}-{m}": quantized(name, m) for name in QUANTIZED for m in ROWS}
    check(*(cases.get(sys.argv[1]) or by_rule(resolve_target("cuda"))[sys.argv[1]]))
    sys.stdout.write("right\n")
