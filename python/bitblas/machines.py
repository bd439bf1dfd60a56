"""Instruction sets and what they build upon; CPUs and graphics cards by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Instruction sets that rules ask for, or that LLVM uses where it finds a place, in its names, by those of Linux.
LINUX_FLAGS = {
    **{name: name for name in ("popcnt", "ssse3", "avx", "avx2", "bmi2", "f16c", "fma", "movbe", "gfni")},
    **{name: name for name in ("sse4a", "xop", "fma4", "tbm", "i8mm")},
    **{name: name for name in ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512ifma", "avx512vbmi")},
    "sse4_2": "sse4.2",
    "bmi1": "bmi",
    "abm": "lzcnt",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx_vnni": "avxvnni",
    "avx_vnni_int8": "avxvnniint8",
    "avx_vnni_int16": "avxvnniint16",
    "avx_ifma": "avxifma",
    "avx_ne_convert": "avxneconvert",
    "asimd": "neon",
    "asimddp": "dotprod",
}

#: What an instruction set is built upon: one comes with the other, and goes with it.
NEEDS: dict[str, tuple[str, ...]] = {
    "sse4.2": ("ssse3",),
    "avx": ("sse4.2",),
    "f16c": ("avx",),
    "fma": ("avx",),
    "xop": ("fma4",),
    "fma4": ("avx", "sse4a"),
    "avx2": ("avx",),
    **dict.fromkeys(("avxvnni", "avxvnniint8", "avxvnniint16", "avxifma", "avxneconvert"), ("avx2",)),
    "avx512f": ("avx2", "f16c", "fma"),
    **dict.fromkeys(("avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512ifma", "avx512vnni"), ("avx512f",)),
    "avx512vpopcntdq": ("avx512f",),
    **dict.fromkeys(("avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512bf16"), ("avx512bw",)),
    "avx512fp16": ("avx512bw",),
    "dotprod": ("neon",),
    "i8mm": ("neon",),
}

_V2 = frozenset({"sse4.2", "ssse3", "popcnt"})
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_ICELAKE = _V4 | {"avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512ifma", "avx512vpopcntdq", "gfni"}
_ZEN = _V3 | {"sse4a"}
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
    "alderlake": _V3 | {"avxvnni", "gfni"},
    "raptorlake": _V3 | {"avxvnni", "gfni"},
    "znver1": _ZEN,
    "znver2": _ZEN,
    "znver3": _ZEN,
    "skylake-avx512": _V4,
    "cascadelake": _V4 | {"avx512vnni"},
    "cooperlake": _V4 | {"avx512vnni", "avx512bf16"},
    "icelake-client": _ICELAKE,
    "icelake-server": _ICELAKE,
    "rocketlake": _ICELAKE,
    "tigerlake": _ICELAKE,
    "sapphirerapids": _ICELAKE | {"avx512bf16", "avx512fp16", "avxvnni"},
    "znver4": _ICELAKE | {"avx512bf16", "sse4a"},
    "znver5": _ICELAKE | {"avx512bf16", "avxvnni", "sse4a"},
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


@dataclass(frozen=True)
class Card:
    """What a kernel's tiles are chosen from: numbers of a graphics card.

    Attributes
    ----------
    num_sms : int
        Streaming multiprocessors.
    shared_bytes : int
        Shared memory that one block may have at most, of a multiprocessor's.
    l2_bytes : int
        Size of the second-level cache.
    memory_gbs : int
        Bandwidth of the memory, in GB/s; 0 where it is not known.
    """

    num_sms: int
    shared_bytes: int
    l2_bytes: int
    memory_gbs: int = 0


_KB, _MB = 1 << 10, 1 << 20

#: A card of each compute capability, for targets that name no card that is there. Source of shared memory: CUDA C++ Programming
#: Guide, "Technical Specifications per Compute Capability"; of the rest: NVIDIA's architecture white papers.
TYPICAL_CARDS = {
    "sm_75": Card(40, 64 * _KB, 4 * _MB, 320),  # T4
    "sm_80": Card(108, 163 * _KB, 40 * _MB, 1555),  # A100
    "sm_86": Card(84, 99 * _KB, 6 * _MB, 768),  # A6000
    "sm_87": Card(16, 163 * _KB, 4 * _MB, 204),  # Orin
    "sm_89": Card(128, 99 * _KB, 72 * _MB, 1008),  # RTX 4090
    "sm_90": Card(132, 227 * _KB, 50 * _MB, 3352),  # H100
    "sm_100": Card(148, 227 * _KB, 126 * _MB, 8000),  # B200
    "sm_103": Card(148, 227 * _KB, 126 * _MB, 8000),  # B300
    "sm_120": Card(170, 99 * _KB, 96 * _MB, 1792),  # RTX 5090
}


def typical_card(arch: str) -> Card:
    """A card of a compute capability such as ``"sm_90a"``: that of the next lower one where it is not in the table."""
    number = int(re.sub(r"\D", "", arch))
    known = [name for name in TYPICAL_CARDS if int(name[3:]) <= number]
    return TYPICAL_CARDS[known[-1] if known else "sm_75"]


def with_needs(name: str) -> frozenset[str]:
    """An instruction set, and all that it is built upon."""
    return frozenset({name}).union(*(with_needs(needed) for needed in NEEDS.get(name, ())))
