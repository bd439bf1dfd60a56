"""What machine to compile for: the target a user names, or this one, and the facts that rules ask of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import env
from .errors import ConfigError, UnsupportedError

#: Instruction sets that rules ask for, in LLVM's names, by the name under which Linux lists them.
_LINUX_FLAGS = {
    "sse4_2": "sse4.2",
    "popcnt": "popcnt",
    "ssse3": "ssse3",
    "avx": "avx",
    "avx2": "avx2",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512vbmi": "avx512vbmi",
    "avx_vnni": "avxvnni",
    "asimd": "neon",
    "asimddp": "dotprod",
}
_V2 = frozenset({"sse4.2", "ssse3", "popcnt"})
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_ICELAKE = _V4 | {"avx512vnni", "avx512vbmi"}
_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64-v4", _V4),
    ("x86-64-v3", _V3),
    ("x86-64-v2", _V2),
    ("x86-64", frozenset()),
)

#: What the CPUs that people name have, so that a warm operator needs no compiler to know it. Others are asked of LLVM.
_CPUS: dict[str, frozenset[str]] = {
    **dict(_LEVELS),
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


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes
    ----------
    kind : str
        ``"llvm"``.
    arch : str
        Architecture as `platform.machine` names it.
    mcpu : str
        LLVM's name of the CPU.
    mattr : tuple of str
        LLVM features beyond those of `mcpu`, each with its sign.
    """

    kind: str
    arch: str
    mcpu: str
    mattr: tuple[str, ...] = ()

    @property
    def features(self) -> frozenset[str]:
        """Names of the instruction sets that kernels may use."""
        found = set(_cpu_features(self.mcpu))
        for attribute in self.mattr:
            name = attribute[1:]
            found = found | {name} if attribute.startswith("+") else found - {name}
        return frozenset(found)

    @property
    def vector_bits(self) -> int:
        """Width of a vector register."""
        if "avx512f" in self.features:
            return 512
        return 256 if "avx2" in self.features else 128

    @property
    def num_vector_registers(self) -> int:
        """How many vector registers there are."""
        return 32 if self.vector_bits == 512 or self.arch in ("aarch64", "arm64") else 16

    @property
    def isa(self) -> str:
        """The instruction set, in words."""
        names = [name for name in ("avx512vnni", "avx512bf16", "avxvnni", "dotprod") if name in self.features]
        base = {512: "AVX-512", 256: "AVX2", 128: "NEON" if "neon" in self.features else "SSE"}[self.vector_bits]
        return " + ".join([base, *names])

    def __str__(self) -> str:
        return f"{self.kind} -mcpu={self.mcpu}" + (f" -mattr={','.join(self.mattr)}" if self.mattr else "")

    def fields(self) -> dict[str, object]:
        """All that shapes the code, as JSON values."""
        return {"kind": self.kind, "arch": self.arch, "mcpu": self.mcpu, "mattr": list(self.mattr)}

    def as_tvm(self) -> dict[str, object]:
        """The dictionary from which TVM makes its own target."""
        spec: dict[str, object] = {"kind": self.kind, "mcpu": self.mcpu}
        return {**spec, "mattr": list(self.mattr)} if self.mattr else spec

    def check_runnable(self) -> None:
        """Raise where this machine lacks an instruction set of the target.

        Raises
        ------
        UnsupportedError
            With the names of what is missing.
        """
        missing = self.features - host_features()
        if self.arch != platform.machine() or missing:
            lacks = ", ".join(sorted(missing)) or self.arch
            raise UnsupportedError(f"target {self} cannot run on this machine, which lacks: {lacks}")


def resolve_target(target: object = None) -> Target:
    """Find what to compile for.

    Parameters
    ----------
    target : None, str, dict, Target, or tvm.target.Target
        ``None`` or ``"auto"``: BITBLAS_TARGET, else this CPU. Text: ``"llvm"`` (this CPU), ``"llvm -mcpu=haswell"``, a bare
        CPU name. A dict: ``{"kind": "llvm", "mcpu": ...}``.

    Raises
    ------
    ConfigError
        The text is not understood, or the CPU unknown.
    UnsupportedError
        A target of another kind, such as CUDA.
    """
    if isinstance(target, Target):
        return target
    if target is None or target == "auto":
        text = env.TARGET.get()
        return resolve_target(text) if text and text != "auto" else host_target()
    if isinstance(target, str):
        return _from_spec(_parse(target), target)
    if isinstance(target, Mapping):
        return _from_spec(dict(target), target)
    kind, attributes = getattr(target, "kind", None), getattr(target, "attrs", None)
    if kind is not None and attributes is not None:  # a tvm Target, without importing tvm to recognise it
        return _from_spec(
            {"kind": str(getattr(kind, "name", kind)), **{str(k): v for k, v in attributes.items()}}, target
        )
    raise ConfigError(
        f"target is {target!r}; allowed: None, a string such as 'llvm' or 'llvm -mcpu=haswell', a dict, a Target"
    )


def _parse(text: str) -> dict[str, object]:
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError:
            raise ConfigError(f"target is {text!r}, which is not valid JSON") from None
    words = text.split()
    if not words:
        raise ConfigError("target is empty; allowed: 'llvm', 'llvm -mcpu=NAME', the name of a CPU")
    spec: dict[str, object] = {"kind": words[0]}
    for word in words[1:]:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not equals:
            raise ConfigError(f"target is {text!r}: {word!r} is not of the form -option=value")
        spec[name] = value.split(",") if name == "mattr" else value
    return spec


def _from_spec(spec: dict[str, object], given: object) -> Target:
    kind = str(spec.get("kind", ""))
    unknown = set(spec) - {"kind", "mcpu", "mattr", "keys", "tag", "device", "num-cores", "host"}
    if unknown and kind not in ("cuda",):
        raise ConfigError(f"target is {given!r}: {', '.join(sorted(unknown))} is not understood; allowed: mcpu, mattr")
    if kind in _CPUS:
        spec, kind = {**spec, "mcpu": kind}, "llvm"
    if kind == "cuda" or kind.startswith("nvidia/"):
        raise UnsupportedError(f"target is {given!r}: CUDA kernels are not built yet; allowed: llvm")
    if kind != "llvm":
        raise ConfigError(
            f"target is {given!r}; allowed: llvm, optionally with -mcpu and -mattr, or one of {', '.join(_CPUS)}"
        )
    mattr = _mattr(spec.get("mattr") or (), given)
    mcpu = str(spec.get("mcpu") or "")
    if mcpu in ("", "native"):
        host = host_target()
        return Target("llvm", host.arch, host.mcpu, (*host.mattr, *mattr))
    _cpu_features(mcpu)  # refuses an unknown CPU here, where LLVM would end the process
    return Target("llvm", platform.machine(), mcpu, mattr)


def _mattr(value: object, given: object) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, Iterable):
        raise ConfigError(f"target is {given!r}: mattr is {value!r}; it must be a list of features")
    found = tuple(str(name) for name in names)
    for name in found:
        if name[:1] not in ("+", "-") or len(name) < 2:
            raise ConfigError(f"target is {given!r}: the feature {name!r} must begin with + or -")
    return found


@cache
def _cpu_features(mcpu: str) -> frozenset[str]:
    if mcpu in _CPUS:
        return _CPUS[mcpu]
    if platform.machine() in ("aarch64", "arm64") and mcpu == "generic":
        return frozenset({"neon"})
    import tvm

    spec = {"kind": "llvm", "mtriple": str(tvm.get_global_func("target.llvm_get_system_triple")())}
    if mcpu not in {str(name) for name in tvm.get_global_func("target.llvm_get_cpu_archlist")(tvm.target.Target(spec))}:
        raise ConfigError(f"target: LLVM knows no CPU {mcpu!r}; allowed: {', '.join(_CPUS)} and LLVM's other names")
    known = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target({**spec, "mcpu": mcpu}))
    return frozenset(_LINUX_FLAGS.values()) & {str(name) for name in known}


@cache
def host_features() -> frozenset[str]:
    """Instruction sets of this CPU, of those that rules ask for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset({"neon"}) if platform.machine() in ("aarch64", "arm64") else frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            flags = set(value.split())
            return frozenset(feature for flag, feature in _LINUX_FLAGS.items() if flag in flags)
    return frozenset()


@cache
def host_target() -> Target:
    """This CPU: the x86-64 level it reaches, and the features beyond.

    The level, and not a model's name, because a hypervisor may hide instructions that the model has.
    """
    machine, features = platform.machine(), host_features()
    if machine in ("aarch64", "arm64"):
        return Target("llvm", machine, "generic", tuple(f"+{name}" for name in sorted(features - {"neon"})))
    for level, needed in _LEVELS:
        if needed <= features:
            return Target("llvm", machine, level, tuple(f"+{name}" for name in sorted(features - needed)))
    raise UnsupportedError(f"no CPU target for {machine!r}; name one in BITBLAS_TARGET")
