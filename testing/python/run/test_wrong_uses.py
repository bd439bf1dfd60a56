"""Wrong uses: each raises its own exception, which names the argument, the value and what is allowed; none crashes."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from bitblas import Matmul, MatmulConfig
from bitblas.errors import ArgumentError, ConfigError, UnsupportedError

N, K, M = 32, 48, 4
BASE = {"M": [1, 16], "N": N, "K": K, "A_dtype": "float16", "W_dtype": "uint4", "out_dtype": "float16"}

# -- configurations: (fields that differ from BASE, exception, match) ------------------------------------------------------

SIZES = r"it must be an integer of at least 1"
CONFIGS = [
    ({"N": 0}, ConfigError, rf"^N is 0; {SIZES}"),
    ({"N": -16}, ConfigError, rf"^N is -16; {SIZES}"),
    ({"N": None}, ConfigError, rf"^N is None; {SIZES}"),
    ({"N": 32.0}, ConfigError, rf"^N is 32\.0; {SIZES}"),
    ({"N": "32"}, ConfigError, rf"^N is '32'; {SIZES}"),
    ({"N": True}, ConfigError, rf"^N is True; {SIZES}"),
    ({"K": 0}, ConfigError, rf"^K is 0; {SIZES}"),
    ({"K": -1}, ConfigError, rf"^K is -1; {SIZES}"),
    ({"K": None}, ConfigError, rf"^K is None; {SIZES}"),
    ({"K": [48]}, ConfigError, rf"^K is \[48\]; {SIZES}"),
    ({"M": 0}, ConfigError, rf"^M is 0; {SIZES}"),
    ({"M": -1}, ConfigError, rf"^M is -1; {SIZES}"),
    ({"M": 1.5}, ConfigError, rf"^M is 1\.5; {SIZES}"),
    ({"M": "16"}, ConfigError, rf"^M is '16'; {SIZES}"),
    ({"M": []}, ConfigError, r"^M is empty; give an int, a list of ints, or None"),
    ({"M": ()}, ConfigError, r"^M is empty"),
    ({"M": [1, 0]}, ConfigError, rf"^M is 0; {SIZES}"),
    ({"M": [1, None]}, ConfigError, rf"^M is None; {SIZES}"),
    ({"M": [[1]]}, ConfigError, rf"^M is \[1\]; {SIZES}"),
    ({"M": {1, 2}}, ConfigError, rf"^M is \{{1, 2\}}; {SIZES}"),
    ({"A_dtype": "float8"}, ConfigError, r"^A_dtype is 'float8'; allowed: float16, bfloat16, float32, int8, int4, "),
    ({"A_dtype": "float64"}, ConfigError, r"^A_dtype is 'float64'; allowed: "),
    ({"A_dtype": "int32"}, ConfigError, r"^A_dtype is 'int32'; allowed: "),
    ({"A_dtype": "uint4"}, ConfigError, r"^A_dtype is 'uint4'; allowed: "),
    ({"A_dtype": None}, ConfigError, r"^A_dtype is None; allowed: "),
    ({"A_dtype": torch.float64}, ConfigError, r"^A_dtype is torch\.float64; allowed: "),
    ({"W_dtype": "uint9"}, ConfigError, r"^W_dtype is 'uint9', which is no format; allowed: uint1, uint2, "),
    ({"W_dtype": "int0"}, ConfigError, r"^W_dtype is 'int0', which is no format; allowed: "),
    ({"W_dtype": "nf8"}, ConfigError, r"^W_dtype is 'nf8', which is no format; allowed: .*nf4"),
    ({"W_dtype": ""}, ConfigError, r"^W_dtype is '', which is no format; allowed: "),
    ({"W_dtype": 4}, ConfigError, r"^W_dtype is 4, which is no format; allowed: "),
    ({"W_dtype": "int32"}, ConfigError, r"^W_dtype is 'int32', which is no format; allowed: "),
    (
        {"W_dtype": torch.float8_e4m3fnuz},
        ConfigError,
        r"^W_dtype is torch\.float8_e4m3fnuz, which is no format; allowed: ",
    ),
    ({"out_dtype": "uint8"}, ConfigError, r"^out_dtype is 'uint8'; allowed: float16, bfloat16, float32, int32, int8$"),
    ({"out_dtype": None}, ConfigError, r"^out_dtype is None; allowed: "),
    (
        {"out_dtype": "int32"},
        ConfigError,
        r"^out_dtype int32 needs A_dtype int8 or int4 and an integer W_dtype, not float16 and uint4$",
    ),
    (
        {"out_dtype": "int8", "A_dtype": "int8", "W_dtype": "nf4"},
        ConfigError,
        r"^out_dtype int8 needs .* not int8 and nf4$",
    ),
    (
        {"accum_dtype": "float64"},
        ConfigError,
        r"^accum_dtype is 'float64'; allowed: float16, bfloat16, float32, int32$",
    ),
    ({"accum_dtype": "int8"}, ConfigError, r"^accum_dtype is 'int8'; allowed: "),
    (
        {"accum_dtype": "int32"},
        ConfigError,
        r"^accum_dtype int32 needs A_dtype int8 or int4 and an integer W_dtype, not float16 and",
    ),
    (
        {"accum_dtype": "int32", "A_dtype": "int8", "W_dtype": "nf4"},
        ConfigError,
        r"^accum_dtype int32 needs .* not int8 and nf4$",
    ),
    ({"layout": "NT"}, ConfigError, r"^layout is 'NT'; allowed: nt, nn, tn, tt$"),
    ({"layout": ""}, ConfigError, r"^layout is ''; allowed: nt, nn, tn, tt$"),
    ({"layout": "ntn"}, ConfigError, r"^layout is 'ntn'; allowed: "),
    ({"layout": None}, ConfigError, r"^layout is None; allowed: "),
    ({"layout": 2}, ConfigError, r"^layout is 2; allowed: nt, nn, tn, tt$"),
    ({"A_dtype": "float8_e4m3", "out_dtype": "float8_e4m3"}, ConfigError, r"^out_dtype is 'float8_e4m3'; allowed: "),
    (
        {"A_dtype": "float8_e4m3", "out_dtype": "int32"},
        ConfigError,
        r"^out_dtype int32 needs .* not float8_e4m3 and uint4$",
    ),
    ({"A_dtype": "int4", "W_dtype": "fp4", "out_dtype": "int8"}, ConfigError, r"not int4 and fp4_e2m1$"),
    ({"A_dtype": "int4", "W_dtype": "float16", "accum_dtype": "int32"}, ConfigError, r"not int4 and float16$"),
    ({"A_dtype": "int2"}, ConfigError, r"^A_dtype is 'int2'; allowed: "),
    (
        {"A_dtype": "float8_e4m3", "W_dtype": None, "with_zeros": True},
        ConfigError,
        r"^with_zeros: the format float8_e4m3",
    ),
    ({"group_size": 7}, ConfigError, r"^group_size is 7; it must be -1 or a divisor of K = 48$"),
    ({"group_size": 96}, ConfigError, r"^group_size is 96; it must be -1 or a divisor of K = 48$"),
    ({"group_size": 0}, ConfigError, r"^group_size is 0; it must be -1 or a divisor of K = 48$"),
    ({"group_size": -2}, ConfigError, r"^group_size is -2; it must be -1 or a divisor of K = 48$"),
    ({"group_size": 16.0}, ConfigError, r"^group_size is 16\.0; it must be -1 or a divisor of K = 48$"),
    ({"group_size": "16"}, ConfigError, r"^group_size is '16'; it must be -1 or a divisor of K = 48$"),
    ({"group_size": True}, ConfigError, r"^group_size is True; it must be -1 or a divisor of K = 48$"),
    ({"with_bias": 2}, ConfigError, r"^with_bias is 2; it must be True or False$"),
    ({"with_scaling": "yes"}, ConfigError, r"^with_scaling is 'yes'; it must be True or False$"),
    ({"with_zeros": "quantized"}, ConfigError, r"^with_zeros is 'quantized'; it must be True or False$"),
    ({"bias": torch.zeros(N)}, ConfigError, r"(?s)^bias is tensor.*; it must be True or False$"),
    ({"zeros_mode": "symmetric"}, ConfigError, r"^zeros_mode is 'symmetric'; allowed: original, rescale, quantized$"),
    ({"zeros_mode": ""}, ConfigError, r"^zeros_mode is ''; allowed: original, rescale, quantized$"),
    ({"zeros_mode": 1, "with_zeros": True}, ConfigError, r"^zeros_mode is 1; allowed: original, rescale, quantized$"),
    (
        {"W_dtype": "int4", "with_zeros": True, "zeros_mode": "quantized"},
        ConfigError,
        r"^zeros_mode 'quantized' needs an unsigned W_dtype, not int4$",
    ),
    (
        {"W_dtype": "nf4", "with_zeros": True},
        ConfigError,
        r"^with_zeros: the format nf4 has no zero points; only uint and int",
    ),
    ({"W_dtype": "fp4_e2m1", "with_zeros": True}, ConfigError, r"^with_zeros: the format fp4_e2m1 has no zero points"),
    (
        {"W_dtype": "float8_e4m3", "with_zeros": True},
        ConfigError,
        r"^with_zeros: the format float8_e4m3 has no zero points",
    ),
    ({"W_dtype": "float16", "with_zeros": True}, ConfigError, r"^with_zeros: the format float16 has no zero points"),
]


@pytest.mark.parametrize(
    ("fields", "error", "match"), CONFIGS, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_wrong_config(fields, error, match):
    with pytest.raises(error, match=match):
        MatmulConfig(**{**BASE, **fields})


def test_unknown_field():
    with pytest.raises(TypeError, match="group_sise"):
        MatmulConfig(**BASE, group_sise=16)


# -- operators: (arguments, exception, match) ------------------------------------------------------------------------------

OPERATORS = [
    (lambda: Matmul(None), ConfigError, r"^config is None; it must be a MatmulConfig$"),
    (lambda: Matmul(BASE), ConfigError, r"^config is \{.*; it must be a MatmulConfig$"),
    (lambda: Matmul(MatmulConfig(**BASE), backend="cutlass"), ConfigError, r"^backend is 'cutlass'; allowed: tl, tir$"),
    (lambda: Matmul(MatmulConfig(**BASE), target="quantum"), ConfigError, r"^target is 'quantum'; allowed: "),
    (lambda: Matmul(MatmulConfig(**BASE), target="cuda -arch=90"), ConfigError, r"it must be of the form sm_90$"),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="cuda -mcpu=haswell"),
        ConfigError,
        r"mcpu is not understood; allowed: arch$",
    ),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="llvm -arch=sm_90"),
        ConfigError,
        r"arch is not understood; allowed: ",
    ),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="nvidia/nvidia-a1000"),
        ConfigError,
        r"no card .* Did you mean 'nvidia/nvidia-a100'",
    ),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="llvm -mtriple=aarch64-linux-gnu -mcpu=haswell"),
        ConfigError,
        r"haswell is no CPU of aarch64$",
    ),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="nvidia/tesla-v100"),
        UnsupportedError,
        r"^target cuda -arch=sm_70: cards of compute capability 7\.5 and later are supported",
    ),
    (
        lambda: Matmul(MatmulConfig(**BASE), target={"kind": "opencl"}),
        ConfigError,
        r"^target is \{'kind': 'opencl'\}; allowed: ",
    ),
    (lambda: Matmul(MatmulConfig(**BASE), target=""), ConfigError, r"^target is empty; allowed: "),
    (lambda: Matmul(MatmulConfig(**BASE), target=7), ConfigError, r"^target is 7; allowed: "),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="llvm -mcpu"),
        ConfigError,
        r"'-mcpu' is not of the form -option=value$",
    ),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="llvm -mcpu=nonesuch"),
        ConfigError,
        r"knows no CPU 'nonesuch' of x86_64; allowed: ",
    ),
    (lambda: Matmul(MatmulConfig(**BASE), target="llvm -mattr=avx2"), ConfigError, r"'avx2' must begin with \+ or -$"),
    (
        lambda: Matmul(MatmulConfig(**BASE), target="{kind"),
        ConfigError,
        r"^target is '\{kind', which is not valid JSON$",
    ),
    (
        lambda: Matmul(MatmulConfig(**BASE), target={"mcpu": "haswell"}),
        ConfigError,
        r"^target is \{'mcpu': 'haswell'\}; allowed: ",
    ),
    (lambda: Matmul(MatmulConfig(**BASE), target="{}"), ConfigError, r"^target is '\{\}'; allowed: "),
    (lambda: Matmul(MatmulConfig(**BASE), target='["llvm"]'), ConfigError, r"^target is '\[\"llvm\"\]'; allowed: "),
]


@pytest.mark.parametrize(("make", "error", "match"), OPERATORS)
def test_wrong_operator(make, error, match):
    with pytest.raises(error, match=match):
        make()


# -- calls: (operator, what changes in a right call, match) ----------------------------------------------------------------

FIELDS = {
    "plain": {},
    "full": {"with_scaling": True, "with_zeros": True, "with_bias": True, "group_size": 16},
    "packed zeros": {"with_scaling": True, "with_zeros": True, "zeros_mode": "quantized", "group_size": 16},
    "one group": {"with_scaling": True},
    "static": {"M": M},
    "integers": {"A_dtype": "int8", "W_dtype": "int2", "out_dtype": "int32", "accum_dtype": "int32", "with_bias": True},
    "native": {"W_dtype": "float16"},
    "float8": {"W_dtype": "float8_e4m3"},
    "columns": {"layout": "tn", "with_scaling": True},
    "static columns": {"layout": "tt", "M": M},
    "int4": {"A_dtype": "int4", "W_dtype": "int4", "out_dtype": "float32", "with_scaling": True},
    "float8 A": {"A_dtype": "float8_e4m3", "W_dtype": "float8_e4m3", "with_bias": True},
}


@pytest.fixture(scope="module")
def right_calls(build):
    """By the name of a row of FIELDS: an operator, and the arguments of a right call."""

    @functools.cache
    def make(name):
        op = build(MatmulConfig(**{**BASE, **FIELDS[name]}))
        problem = reference.draw(op.config, M, exact=True)
        first, second = op.config.layout
        W = op.transform_weight(problem.weights.mT if second == "n" else problem.weights)
        return op, {"A": problem.A.mT if first == "t" else problem.A, "W": W, **problem.extras}

    return make


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


def byte(*shape):
    return torch.zeros(shape, dtype=torch.int8)


MISSING = r" is missing; this operator was built with "
CALLS = [
    # A
    ("plain", {"A": None}, r"^A is a NoneType; it must be a torch\.Tensor$"),
    ("plain", {"A": np.zeros((M, K), np.float16)}, r"^A is a ndarray; it must be a torch\.Tensor$"),
    ("plain", {"A": [[0.0] * K]}, r"^A is a list; it must be a torch\.Tensor$"),
    ("plain", {"A": half(M, K + 1)}, rf"^A has shape \(4, 49\); its last dimension must be K = {K}$"),
    ("plain", {"A": half(M, K - 1)}, rf"^A has shape \(4, 47\); its last dimension must be K = {K}$"),
    ("plain", {"A": half(K, M)}, rf"^A has shape \(48, 4\); its last dimension must be K = {K}$"),
    ("plain", {"A": half(M, 0)}, rf"^A has shape \(4, 0\); its last dimension must be K = {K}$"),
    ("plain", {"A": half()}, rf"^A has shape \(\); its last dimension must be K = {K}$"),
    ("plain", {"A": half(M, K, 1)}, rf"^A has shape \(4, 48, 1\); its last dimension must be K = {K}$"),
    ("plain", {"A": half(M, K).float()}, r"^A has dtype torch\.float32; this operator takes torch\.float16$"),
    ("plain", {"A": half(M, K).bfloat16()}, r"^A has dtype torch\.bfloat16; this operator takes torch\.float16$"),
    ("plain", {"A": byte(M, K)}, r"^A has dtype torch\.int8; this operator takes torch\.float16$"),
    ("plain", {"A": half(M, K).to(torch.complex64)}, r"^A has dtype torch\.complex64; this operator takes "),
    ("plain", {"A": half(M, K).to("meta")}, r"^A is on device meta; this operator runs on cpu$"),
    ("plain", {"A": half(M, K).to_sparse()}, r"^A has layout torch\.sparse_coo; it must be a dense tensor$"),
    ("integers", {"A": byte(M, K).to(torch.uint8)}, r"^A has dtype torch\.uint8; this operator takes torch\.int8$"),
    ("integers", {"A": byte(M, K).to(torch.int32)}, r"^A has dtype torch\.int32; this operator takes torch\.int8$"),
    ("static", {"A": half(M + 1, K)}, r"^A has shape \(5, 48\), 5 rows; this operator was built for M = 4$"),
    ("static", {"A": half(M - 1, K)}, r"^A has shape \(3, 48\), 3 rows; this operator was built for M = 4$"),
    ("static", {"A": half(K)}, r"^A has shape \(48,\), 1 rows; this operator was built for M = 4$"),
    ("static", {"A": half(2, M, K)}, r"^A has shape \(2, 4, 48\), 8 rows; this operator was built for M = 4$"),
    # A by columns, of 4 and of 8 bits
    (
        "columns",
        {"A": half(M, K)},
        r"^A has shape \(4, 48\); its dimension before the last \(layout t\*\) must be K = 48$",
    ),
    ("columns", {"A": half(K, M, 1)}, r"^A has shape \(48, 4, 1\); its dimension before the last .* must be K = 48$"),
    ("columns", {"A": half(M)}, r"^A has shape \(4,\); its dimension before the last "),
    ("columns", {"output": half(N, M)}, r"^output has shape \(32, 4\); expected \(4, 32\)$"),
    ("columns", {"A": half(K, M).float()}, r"^A has dtype torch\.float32; this operator takes torch\.float16$"),
    ("static columns", {"A": half(K, M + 1)}, r"^A has shape \(48, 5\), 5 rows; this operator was built for M = 4$"),
    ("static columns", {"A": half(2, K, M)}, r"^A has shape \(2, 48, 4\), 8 rows; this operator was built for M = 4$"),
    ("int4", {"A": byte(M, K // 2 + 1)}, r"its last dimension must be K = 48, or 24 where two values share a byte$"),
    ("int4", {"A": byte(M, K).to(torch.uint8)}, r"^A has dtype torch\.uint8; this operator takes torch\.int8$"),
    (
        "int4",
        {"scale": half(N, 1).double()},
        r"^scale has dtype torch\.float64; allowed: torch\.float32, torch\.float16, ",
    ),
    ("float8 A", {"A": half(M, K)}, r"^A has dtype torch\.float16; this operator takes torch\.float8_e4m3fn$"),
    ("float8 A", {"A": half(M, K).to(torch.float8_e5m2)}, r"^A has dtype torch\.float8_e5m2; this operator takes "),
    ("float8 A", {"A": byte(M, K)}, r"^A has dtype torch\.int8; this operator takes torch\.float8_e4m3fn$"),
    (
        "float8 A",
        {"bias": half(N).float()},
        r"^bias has dtype torch\.float32; allowed: torch\.float8_e4m3fn, torch\.float16$",
    ),
    (
        "float8 A",
        {"W": half(N, K)},
        r"^W has dtype torch\.float16; allowed: torch\.int8, torch\.uint8, torch\.float8_e4m3fn$",
    ),
    # W
    ("plain", {"W": None}, r"^W is (a NoneType; it must be a torch\.Tensor|missing; every call needs it)$"),
    ("plain", {"W": np.zeros((N, K // 2), np.int8)}, r"^W is a ndarray; it must be a torch\.Tensor$"),
    ("plain", {"W": byte(N, K)}, r"^W has shape \(32, 48\); expected \(32, 24\)"),
    ("plain", {"W": byte(N, K // 2 - 1)}, r"^W has shape \(32, 23\); expected \(32, 24\)"),
    ("plain", {"W": byte(N - 1, K // 2)}, r"^W has shape \(31, 24\); expected \(32, 24\)"),
    ("plain", {"W": byte(K // 2, N)}, r"^W has shape \(24, 32\); expected \(32, 24\)"),
    ("plain", {"W": byte(N * K // 2)}, r"^W has shape \(768,\); expected \(32, 24\)"),
    ("plain", {"W": byte()}, r"^W has shape \(\); expected \(32, 24\)"),
    ("plain", {"W": half(N, K)}, r"^W has dtype torch\.float16; allowed: torch\.int8, torch\.uint8$"),
    ("plain", {"W": half(N, K // 2)}, r"^W has dtype torch\.float16; allowed: torch\.int8, torch\.uint8$"),
    (
        "plain",
        {"W": byte(N, K // 2).to(torch.int32)},
        r"^W has dtype torch\.int32; allowed: torch\.int8, torch\.uint8$",
    ),
    ("plain", {"W": byte(N, K // 2).to("meta")}, r"^W is on device meta; this operator runs on cpu$"),
    ("plain", {"W": byte(N, K // 2).to_sparse()}, r"^W has layout torch\.sparse_coo; it must be a dense tensor$"),
    ("native", {"W": half(N, K).float()}, r"^W has dtype torch\.float32; allowed: torch\.float16$"),
    ("native", {"W": half(N, K).bfloat16()}, r"^W has dtype torch\.bfloat16; allowed: torch\.float16$"),
    ("native", {"W": byte(N, K)}, r"^W has (dtype torch\.int8; allowed: torch\.float16|shape)"),
    ("native", {"W": byte(N, 2 * K)}, r"^W has (dtype torch\.int8; allowed: torch\.float16|shape)"),
    ("native", {"W": half(N, K + 8)}, r"^W has shape \(32, 56\); expected \(32, 48\)"),
    (
        "float8",
        {"W": half(N, K).to(torch.float8_e5m2)},
        r"^W has dtype torch\.float8_e5m2; allowed: .*torch\.float8_e4m3fn",
    ),
    ("float8", {"W": half(N, K)}, r"^W has dtype torch\.float16; allowed: .*torch\.float8_e4m3fn"),
    # scale
    ("one group", {"scale": None}, rf"^scale{MISSING}with_scaling=True$"),
    ("full", {"scale": None}, rf"^scale{MISSING}with_scaling=True$"),
    ("plain", {"scale": half(N, 1)}, r"^scale was given, but this operator was built with with_scaling=False$"),
    ("full", {"scale": half(N, 1)}, r"^scale has shape \(32, 1\); expected \(32, 3\)$"),
    ("full", {"scale": half(3, N)}, r"^scale has shape \(3, 32\); expected \(32, 3\)$"),
    ("full", {"scale": half(N)}, r"^scale has shape \(32,\); expected \(32, 3\)$"),
    ("full", {"scale": half(N, 3, 1)}, r"^scale has shape \(32, 3, 1\); expected \(32, 3\)$"),
    ("one group", {"scale": half(N + 1)}, r"^scale has shape \(33,\); expected \(32, 1\)"),
    ("one group", {"scale": half(1)}, r"^scale has shape \(1,\); expected \(32, 1\)"),
    ("one group", {"scale": half()}, r"^scale has shape \(\); expected \(32, 1\)"),
    ("full", {"scale": half(N, 3).float()}, r"^scale has dtype torch\.float32; allowed: torch\.float16$"),
    ("full", {"scale": byte(N, 3)}, r"^scale has dtype torch\.int8; allowed: torch\.float16$"),
    ("full", {"scale": 2.0}, r"^scale is a float; it must be a torch\.Tensor$"),
    ("full", {"scale": half(N, 3).to("meta")}, r"^scale is on device meta; this operator runs on cpu$"),
    # zeros
    ("full", {"zeros": None}, rf"^zeros{MISSING}with_zeros=True$"),
    ("one group", {"zeros": half(N, 1)}, r"^zeros was given, but this operator was built with with_zeros=False$"),
    ("full", {"zeros": half(3, N)}, r"^zeros has shape \(3, 32\); expected \(32, 3\)$"),
    ("full", {"zeros": byte(3, N // 2)}, r"^zeros has dtype torch\.int8; allowed: torch\.float16$"),
    ("packed zeros", {"zeros": half(N, 3)}, r"^zeros has dtype torch\.float16; allowed: torch\.int8, torch\.uint8$"),
    ("packed zeros", {"zeros": byte(N, 3)}, r"^zeros has shape \(32, 3\); expected \(3, 16\)$"),
    ("packed zeros", {"zeros": byte(3, N)}, r"^zeros has shape \(3, 32\); expected \(3, 16\)$"),
    ("packed zeros", {"zeros": byte(48)}, r"^zeros has shape \(48,\); expected \(3, 16\)$"),
    ("packed zeros", {"zeros": byte(3, 16).to(torch.int32)}, r"^zeros has dtype torch\.int32; allowed: torch\.int8"),
    ("packed zeros", {"zeros": 8}, r"^zeros is a int; it must be a torch\.Tensor$"),
    # bias
    ("full", {"bias": None}, rf"^bias{MISSING}with_bias=True$"),
    ("plain", {"bias": half(N)}, r"^bias was given, but this operator was built with with_bias=False$"),
    ("full", {"bias": half(N + 1)}, r"^bias has shape \(33,\); expected \(32,\)$"),
    ("full", {"bias": half(1, N)}, r"^bias has shape \(1, 32\); expected \(32,\)$"),
    ("full", {"bias": half(M, N)}, r"^bias has shape \(4, 32\); expected \(32,\)$"),
    ("full", {"bias": half()}, r"^bias has shape \(\); expected \(32,\)$"),
    ("full", {"bias": half(N).double()}, r"^bias has dtype torch\.float64; allowed: torch\.float16$"),
    ("integers", {"bias": half(N)}, r"^bias has dtype torch\.float16; allowed: torch\.int8, torch\.int32$"),
    ("full", {"bias": half(N).to("meta")}, r"^bias is on device meta; this operator runs on cpu$"),
    # output
    ("plain", {"output": np.zeros((M, N), np.float16)}, r"^output is a ndarray; it must be a torch\.Tensor$"),
    ("plain", {"output": half(M, N).float()}, r"^output has dtype torch\.float32; this operator gives torch\.float16$"),
    ("integers", {"output": byte(M, N)}, r"^output has dtype torch\.int8; this operator gives torch\.int32$"),
    ("plain", {"output": half(M, N + 1)}, r"^output has shape \(4, 33\); expected \(4, 32\)$"),
    ("plain", {"output": half(M + 1, N)}, r"^output has shape \(5, 32\); expected \(4, 32\)$"),
    ("plain", {"output": half(N)}, r"^output has shape \(32,\); expected \(4, 32\)$"),
    ("plain", {"output": half(1, M, N)}, r"^output has shape \(1, 4, 32\); expected \(4, 32\)$"),
    ("plain", {"output": half(N, M).T}, r"^output has strides \(1, 4\); it must be contiguous$"),
    ("plain", {"output": half(M, 2 * N)[:, ::2]}, r"^output has strides \(64, 2\); it must be contiguous$"),
    ("plain", {"output": half(1, N).expand(M, N)}, r"^output has strides \(0, 1\); it must be contiguous$"),
    ("plain", {"output": half(M, N).to("meta")}, r"^output is on device meta; this operator runs on cpu$"),
    ("plain", {"output": half(M, N).requires_grad_()}, r"^output requires a gradient; "),
]


@pytest.mark.parametrize(
    ("name", "change", "match"), CALLS, ids=[f"{i}-{row[0]}-{next(iter(row[1]))}" for i, row in enumerate(CALLS)]
)
def test_wrong_call(right_calls, name, change, match):
    op, arguments = right_calls(name)
    with pytest.raises(ArgumentError, match=match):
        op(**{**arguments, **change})


@pytest.mark.parametrize("name", FIELDS)
def test_the_calls_are_right_but_for_the_change(right_calls, name):
    op, arguments = right_calls(name)
    assert op(**arguments).shape == (M, N)


def test_superfluous_positions(right_calls):
    op, right = right_calls("plain")
    for extras in (
        (half(N, 1),),
        (half(M, N), half(M, N)),
        (half(M, N), half(N), half(N)),
        (1,),
        (half(N, 3), None, half(N)),
    ):
        with pytest.raises(
            ArgumentError, match=r"superfluous.* this operator takes no scale, zeros or bias; give an output by name"
        ):
            op(right["A"], right["W"], *extras)
    op, right = right_calls("full")
    extras = [right[name] for name in ("scale", "zeros", "bias")]
    with pytest.raises(
        ArgumentError, match=r"^5 arguments were given by position after W; allowed: scale, zeros, bias, output$"
    ):
        op(right["A"], right["W"], *extras, half(M, N), half(M, N))
    with pytest.raises(ArgumentError, match="output was given twice, by position and by name"):
        op(right["A"], right["W"], *extras, half(M, N), output=half(M, N))
    with pytest.raises(ArgumentError, match="zeros is missing"):
        op(right["A"], right["W"], right["scale"])


def test_a_bias_is_not_taken_for_the_output(right_calls):
    """For one row without a batch dimension a bias has the shape and dtype of the output, and must not be overwritten."""
    op, right = right_calls("plain")
    bias = half(N)
    try:
        op(right["A"][0], right["W"], bias)
    except ArgumentError as error:
        assert "superfluous" in str(error)  # noqa: PT017 - either outcome is right
    assert (bias == 0).all()


def test_output_shares_memory(right_calls):
    op, _ = right_calls("plain")
    room = torch.zeros(4096, dtype=torch.float16)
    A = room[: M * K].view(M, K)
    W = room[1024 : 1024 + N * K // 4].view(torch.int8).view(N, K // 2)
    for first in (0, M * K - 1, 1023, 1024 + N * K // 4 - 1):
        with pytest.raises(ArgumentError, match=r"^output shares memory with an input"):
            op(A, W, output=room[first : first + M * N].view(M, N))
    op(A, W, output=room[M * K : M * K + M * N].view(M, N))


# -- weights: (operator, method, argument, match) --------------------------------------------------------------------------


def codes(value, shape=(N, K), dtype=torch.int64):
    return torch.ones(shape, dtype=dtype).index_put_(
        (torch.tensor(1), torch.tensor(2)), torch.tensor(value, dtype=dtype)
    )


WEIGHTS = [
    ("plain", "transform_weight", None, r"^weight is a NoneType; it must be a torch\.Tensor$"),
    ("plain", "transform_weight", np.zeros((N, K)), r"^weight is a ndarray; it must be a torch\.Tensor$"),
    (
        "plain",
        "transform_weight",
        byte(K, N),
        r"^weight has shape \(48, 32\); expected \(N, K\) = \(32, 48\) for layout 'nt'$",
    ),
    (
        "plain",
        "transform_weight",
        byte(N, K // 2),
        r"^weight has shape \(32, 24\); expected \(N, K\) = \(32, 48\) for layout 'nt'$",
    ),
    (
        "plain",
        "transform_weight",
        byte(N * K),
        r"^weight has shape \(1536,\); expected \(N, K\) = \(32, 48\) for layout 'nt'$",
    ),
    (
        "columns",
        "transform_weight",
        byte(N, K),
        r"^weight has shape \(32, 48\); expected \(K, N\) = \(48, 32\) for layout 'tn'$",
    ),
    ("static columns", "transform_weight", byte(K, N), r"expected \(N, K\) = \(32, 48\) for layout 'tt'$"),
    ("int4", "transform_weight", codes(8), r"^weight holds 8; allowed for int4: -8 to 7$"),
    ("plain", "transform_weight", codes(16), r"^weight holds 16; allowed for uint4: 0 to 15$"),
    ("plain", "transform_weight", codes(-1), r"^weight holds -1; allowed for uint4: 0 to 15$"),
    ("plain", "transform_weight", codes(2**40), r"^weight holds 1\.09951e\+12; allowed for uint4: 0 to 15$"),
    (
        "plain",
        "transform_weight",
        codes(0.5, dtype=torch.float32),
        r"^weight holds 0\.5; allowed for uint4: whole numbers",
    ),
    (
        "plain",
        "transform_weight",
        codes(float("nan"), dtype=torch.float16),
        r"^weight holds nan; allowed for uint4: 0 to 15$",
    ),
    (
        "plain",
        "transform_weight",
        codes(float("inf"), dtype=torch.float16),
        r"^weight holds inf; allowed for uint4: 0 to 15$",
    ),
    (
        "plain",
        "transform_weight",
        codes(True, dtype=torch.bool),
        r"^weight has dtype torch\.bool; uint4 needs integers",
    ),
    (
        "plain",
        "transform_weight",
        codes(1, dtype=torch.complex64),
        r"^weight has dtype torch\.complex64; uint4 needs integers",
    ),
    ("plain", "transform_weight", byte(N, K).to("meta"), r"^weight is on device meta; "),
    ("plain", "transform_weight", byte(N, K).to_sparse(), r"^weight has layout torch\.sparse_coo; "),
    ("integers", "transform_weight", codes(2), r"^weight holds 2; allowed for int2: -2 to 1$"),
    ("integers", "transform_weight", codes(-3), r"^weight holds -3; allowed for int2: -2 to 1$"),
    ("float8", "transform_weight", half(N, K), r"^weight has dtype torch\.float16; allowed: torch\.float8_e4m3fn"),
    (
        "float8",
        "transform_weight",
        half(N, K).to(torch.float8_e5m2),
        r"^weight has dtype torch\.float8_e5m2; allowed: ",
    ),
    (
        "native",
        "transform_weight",
        byte(N, K),
        r"^weight has dtype torch\.int8; float16 weights must be floating-point$",
    ),
    ("plain", "pack", codes(16), r"^codes hold 16; allowed for uint4: 0 to 15$"),
    ("plain", "pack", codes(-1), r"^codes hold -1; allowed for uint4: 0 to 15$"),
    ("plain", "pack", codes(1.0, dtype=torch.float32), r"^codes have dtype torch\.float32; they must be integers$"),
    ("plain", "pack", byte(K, N), r"^codes have shape \(48, 32\); expected \(32, 48\)$"),
    ("plain", "pack", [[1]], r"^codes is a list; it must be a torch\.Tensor$"),
    ("plain", "pack", byte(N, K).to("meta"), r"^codes is on device meta; "),
    ("float8", "pack", codes(256), r"^codes hold 256; allowed for float8_e4m3: 0 to 255$"),
    ("plain", "unpack_weight", byte(N, K), r"^weight has shape \(32, 48\); expected \(32, 24\)"),
    (
        "plain",
        "unpack_weight",
        half(N, K // 2),
        r"^weight has dtype torch\.float16; it must be what transform_weight returned$",
    ),
    ("plain", "unpack_weight", None, r"^weight is a NoneType; it must be a torch\.Tensor$"),
]


@pytest.mark.parametrize(
    ("name", "method", "argument", "match"), WEIGHTS, ids=[f"{i}-{row[0]}-{row[1]}" for i, row in enumerate(WEIGHTS)]
)
def test_wrong_weight(right_calls, name, method, argument, match):
    with pytest.raises(ArgumentError, match=match):
        getattr(right_calls(name)[0], method)(argument)


def test_int1_has_no_zero(build):
    op = build(MatmulConfig(**{**BASE, "W_dtype": "int1"}))
    with pytest.raises(ArgumentError, match=r"^weight holds 0; allowed for int1: -1 and 1$"):
        op.transform_weight(codes(0))


def test_there_are_enough_of_them():
    assert len(CONFIGS) + len(OPERATORS) + len(CALLS) + len(WEIGHTS) >= 150


# -- nothing crashes -------------------------------------------------------------------------------------------------------

TORTURE = """
import torch
import bitblas

N, K, M = 32, 48, 4
half, byte = torch.float16, torch.int8


def make(rows, w_dtype, **fields):
    return bitblas.Matmul(bitblas.MatmulConfig(rows, N, K, "float16", w_dtype, **fields), target="llvm")


full = dict(with_scaling=True, with_zeros=True, with_bias=True, group_size=16)
operators = [make(rows, "uint4", **fields) for rows in (M, [1, 16]) for fields in ({}, full)]
operators.append(make([1, 16], "float16"))
shapes = [(), (0,), (1,), (N,), (K,), (M, K), (M, N), (N, K // 2), (N, K), (N, 3), (3, N), (0, K), (M, 0), (5, K)]
shapes += [(1, M, K), (M, N, 1)]
dtypes = [half, torch.float32, byte, torch.uint8, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2]
pool = [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in dtypes]
pool += [
    torch.zeros(2 * M, K, dtype=half)[::2],
    torch.zeros(1, dtype=half).expand(M, K),
    torch.zeros(N, K // 2, dtype=byte).expand(2, N, K // 2)[0],
    torch.zeros(M * K + 1, dtype=half)[1:].view(M, K),
    torch.zeros(M, K, dtype=half, device="meta"),
    torch.zeros(N, K // 2, dtype=byte, device="meta"),
    torch.zeros(N, K, dtype=byte).to_sparse(),
    None, 1, "A", [1.0], object(),
]
generator = torch.Generator().manual_seed(0)
refused = answered = 0


def attempt(function, *args, **kwargs):
    global refused, answered
    try:
        function(*args, **kwargs)
        answered += 1
    except bitblas.ArgumentError:
        refused += 1


for op in operators:
    right = dict(A=torch.zeros(M, K, dtype=half), W=torch.zeros(op.retrieve_weight_shape(), dtype=byte), output=None)
    if op.config.W_dtype == "float16":
        right["W"] = right["W"].to(half)
    if op.config.with_scaling:
        scale = torch.zeros(N, 3, dtype=half)
        right.update(scale=scale, zeros=scale, bias=torch.zeros(N, dtype=half))
    for name in ("A", "W", "scale", "zeros", "bias", "output"):
        for odd in pool:
            attempt(op, **{**right, name: odd})
    for _ in range(1500):
        chosen = torch.randint(len(pool), (6,), generator=generator).tolist()
        attempt(op, *(pool[i] for i in chosen))
    for odd in pool:
        for method in (op.transform_weight, op.pack, op.unpack_weight):
            attempt(method, odd)
print("alive", refused, answered)
"""


def test_nothing_crashes_the_process():
    """Thousands of odd calls in a process of their own: each is answered or refused with an ArgumentError."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", TORTURE],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[3] / "python",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    word, refused, answered = done.stdout.split()
    assert word == "alive"
    assert int(refused) > 5000
    assert int(answered) > 10
