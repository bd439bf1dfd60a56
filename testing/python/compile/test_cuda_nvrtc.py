"""Every kind of text that our rules write for cards is one that NVRTC takes, and its launches are understood."""

from dataclasses import replace

import pytest

from bitblas import MatmulConfig
from bitblas.build import compile_cuda
from bitblas.cuda.launches import read_launches
from bitblas.cuda.nvrtc import compile_cubin, find_nvrtc
from bitblas.cuda.source import kernel_source
from bitblas.machines import Card
from bitblas.plan import plan_matmul
from bitblas.schedule.cuda import CUDA_RULES
from bitblas.target import resolve_target
from bitblas.transform import described_func

needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="there is no NVRTC: pip install nvidia-cuda-nvrtc")

GROUPED = {"with_scaling": True, "with_zeros": True, "group_size": 64}
CONFIGS = {
    "uint4 packed zeros": {"W_dtype": "uint4", "zeros_mode": "quantized", **GROUPED},
    "int8 int2": {"A_dtype": "int8", "W_dtype": "int2", "out_dtype": "int32", "accum_dtype": "int32"},
    "bfloat16 uint3": {"A_dtype": "bfloat16", "W_dtype": "uint3", "out_dtype": "bfloat16", **GROUPED},
    "float8": {"W_dtype": "float8_e4m3", "with_scaling": True},
    "nf4 odd": {"W_dtype": "nf4", "N": 80, "K": 84, "with_bias": True},
    "float32 row": {"A_dtype": "float32", "W_dtype": "uint4", "out_dtype": "float32", "dynamic_quantization": "row"},
    "float16 row": {"W_dtype": "int2", "with_scaling": True, "scale_per_tensor": True, "dynamic_quantization": "row"},
    "float16 group": {"W_dtype": "int2", "dynamic_quantization": "group", **GROUPED},
    "float16": {"W_dtype": "float16"},
    "bfloat16": {"A_dtype": "bfloat16", "W_dtype": "bfloat16", "out_dtype": "bfloat16"},
}


def plan(name, arch):
    base = {"N": 256, "K": 256, "M": [1, 16, 64, 1024], "out_dtype": "float16", "accum_dtype": "float32"}
    return plan_matmul(MatmulConfig(**{**base, **CONFIGS[name]}), resolve_target(f"cuda -arch={arch}"))


def test_every_rule_is_among_these():
    found = {kernel.rule for name in CONFIGS for kernel in plan(name, "sm_90").kernels}
    assert found == {rule.name for rule in CUDA_RULES}


@pytest.mark.parametrize("name", CONFIGS)
def test_code_depends_on_a_card_by_its_tilings_only(name):
    """Why the key of an artifact holds no numbers of a card."""
    wanted = plan(name, "sm_90")
    other = replace(wanted.target, card=Card(7, 1 << 16, 1 << 20, 100))
    rules = {rule.name: rule for rule in CUDA_RULES}
    for kernel in wanted.kernels:
        texts = set()
        for target in (wanted.target, other):
            problem = replace(wanted.problem(kernel), target=target)
            func = described_func(problem, kernel.rule, kernel.tiling, kernel.name)
            texts.add(rules[kernel.rule].apply(func, problem, kernel.tiling).script())
        assert len(texts) == 1


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nvrtc_takes_the_text(name, arch):
    wanted = plan(name, arch)
    compiled, _ = compile_cuda(wanted)
    launches = read_launches(compiled.host)
    assert sorted(launches) == sorted(kernel.name for kernel in wanted.kernels)
    assert all(launches.values())
    code = compile_cubin(find_nvrtc(), kernel_source(compiled.mod), arch)
    assert code.startswith(b"\x7fELF")
    for found in launches.values():
        for launch in found:
            assert launch.kernel.encode() in code
