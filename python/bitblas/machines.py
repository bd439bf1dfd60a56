"""CPUs and graphics cards by name: instruction sets and compute capabilities."""

from __future__ import annotations

_V2 = frozenset({"sse4.2", "ssse3", "popcnt"})
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_ICELAKE = _V4 | {"avx512vnni", "avx512vbmi"}
LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64-v4", _V4),
    ("x86-64-v3", _V3),
    ("x86-64-v2", _V2),
    ("x86-64", frozenset()),
)

NEON = frozenset({"neon"})
_DOTPROD = NEON | {"dotprod"}

#: What the CPUs that people name have, so that a warm operator needs no compiler to know it. Others are asked of LLVM.
X86_CPUS: dict[str, frozenset[str]] = {
    **dict(LEVELS),
    "nehalem": _V2,
    "haswell": _V3,
    "broadwell": _V3,
    "skylake": _V3,
    "alderlake": _V3 | {"avxvnni"},
    "raptorlake": _V3 | {"avxvnni"},
    "znver1": _V3,
    "znver2": _V3,
    "znver3": _V3,
    "skylake-avx512": _V4,
    "cascadelake": _V4 | {"avx512vnni"},
    "cooperlake": _V4 | {"avx512vnni", "avx512bf16"},
    "icelake-client": _ICELAKE,
    "icelake-server": _ICELAKE,
    "rocketlake": _ICELAKE,
    "tigerlake": _ICELAKE,
    "sapphirerapids": _ICELAKE | {"avx512bf16", "avxvnni"},
    "znver4": _ICELAKE | {"avx512bf16"},
    "znver5": _ICELAKE | {"avx512bf16", "avxvnni"},
}
ARM_CPUS: dict[str, frozenset[str]] = {
    "generic": NEON,
    "cortex-a53": NEON,
    "cortex-a72": NEON,
    "cortex-a76": _DOTPROD,
    "cortex-a78": _DOTPROD,
    "cortex-x2": _DOTPROD | {"i8mm"},
    "neoverse-n1": _DOTPROD,
    "neoverse-n2": _DOTPROD | {"i8mm"},
    "neoverse-v1": _DOTPROD | {"i8mm"},
    "neoverse-v2": _DOTPROD | {"i8mm"},
    "apple-m1": _DOTPROD,
    "apple-m2": _DOTPROD | {"i8mm"},
}

#: Compute capabilities by the name of the card. Source: https://developer.nvidia.com/cuda-gpus
CARDS = {
    "tesla-v100": "sm_70",
    "nvidia-t4": "sm_75",
    "geforce-rtx-2080-ti": "sm_75",
    "nvidia-a100": "sm_80",
    "nvidia-a30": "sm_80",
    "nvidia-a10": "sm_86",
    "nvidia-a10g": "sm_86",
    "nvidia-a40": "sm_86",
    "nvidia-rtx-a6000": "sm_86",
    "geforce-rtx-3060": "sm_86",
    "geforce-rtx-3070": "sm_86",
    "geforce-rtx-3080": "sm_86",
    "geforce-rtx-3090": "sm_86",
    "geforce-rtx-3090-ti": "sm_86",
    "jetson-agx-orin": "sm_87",
    "nvidia-l4": "sm_89",
    "nvidia-l40": "sm_89",
    "nvidia-l40s": "sm_89",
    "nvidia-rtx-6000-ada": "sm_89",
    "geforce-rtx-4070": "sm_89",
    "geforce-rtx-4080": "sm_89",
    "geforce-rtx-4090": "sm_89",
    "nvidia-h100": "sm_90",
    "nvidia-h200": "sm_90",
    "nvidia-gh200": "sm_90",
    "nvidia-b200": "sm_100",
    "geforce-rtx-5090": "sm_120",
}
