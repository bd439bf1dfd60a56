"""What machine to compile for: the target a user names, or this one, and the facts that rules ask of it."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from . import env
from .errors import ConfigError, UnsupportedError
from .logs import get_logger
from .machines import ARM_CPUS, CARDS, LEVELS, LINUX_FLAGS, NEON, X86_CPUS, Card, typical_card, with_needs

#: Instruction sets that this CPU is compiled for beyond its level: those that rules ask for.
_ASKED_FOR = frozenset({"f16c", "fma", "avx", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512vnni"}) | {
    *("avx512bf16", "avx512vbmi", "avxvnni", "dotprod", "i8mm")
}
_ARM = ("aarch64", "arm64")
_ARCHITECTURES = ("x86_64", *_ARM)

#: Options of TVM's targets that say nothing that a rule asks for.
_IGNORED = frozenset(
    {"keys", "tag", "device", "host", "libs", "model", "num-cores", "link-params", "system-lib", "runtime", "opt-level"}
    | {"max_num_threads", "max_threads_per_block", "max_shared_memory_per_block", "thread_warp_size"}
    | {"registers_per_block", "l2_cache_size_bytes", "jit", "vector-width", "mabi", "mfloat-abi"}
)


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes
    ----------
    kind : str
        ``"llvm"`` or ``"cuda"``.
    arch : str
        Architecture as `platform.machine` names it; for CUDA the compute capability, such as ``"sm_90"``.
    mcpu : str
        LLVM's name of the CPU; empty for CUDA.
    mattr : tuple of str
        LLVM features beyond those of `mcpu`, each with its sign.
    card : Card or None
        Numbers of the graphics card, of a typical one where none is given; None for CPUs.
    """

    kind: str
    arch: str
    mcpu: str = ""
    mattr: tuple[str, ...] = ()
    card: Card | None = None

    def __post_init__(self) -> None:
        if self.kind == "cuda" and self.card is None:
            object.__setattr__(self, "card", typical_card(self.arch))

    @property
    def features(self) -> frozenset[str]:
        """Names of the instruction sets that kernels may use."""
        if self.kind != "llvm":
            return frozenset()
        found = set(_cpu_features(self.mcpu, self.arch))
        for attribute in self.mattr:
            name = attribute[1:]
            if attribute.startswith("+"):
                found |= with_needs(name)
            else:
                found = {other for other in found if name not in with_needs(other)}
        return frozenset(found)

    @property
    def capability(self) -> int:
        """Compute capability as a number, 90 for sm_90; 0 for CPUs."""
        return int(re.sub(r"\D", "", self.arch)) if self.kind == "cuda" else 0

    @property
    def vector_bits(self) -> int:
        """Width of a vector register."""
        if "avx512f" in self.features:
            return 512
        return 256 if "avx2" in self.features else 128

    @property
    def num_vector_registers(self) -> int:
        """How many vector registers there are."""
        return 32 if self.vector_bits == 512 or self.arch in _ARM else 16

    @property
    def isa(self) -> str:
        """The instruction set, in words."""
        if self.kind != "llvm":
            return self.arch
        names = [name for name in ("avx512vnni", "avx512bf16", "avxvnni", "dotprod", "i8mm") if name in self.features]
        base = {512: "AVX-512", 256: "AVX2", 128: "NEON" if "neon" in self.features else "SSE"}[self.vector_bits]
        return " + ".join([base, *names])

    @property
    def is_foreign(self) -> bool:
        """Whether this machine is of another architecture."""
        return self.kind == "llvm" and self.arch != platform.machine()

    @property
    def triple(self) -> str:
        """LLVM's name of the architecture and the system."""
        return f"{self.arch}-linux-gnu"

    def __str__(self) -> str:
        if self.kind != "llvm":
            return f"{self.kind} -arch={self.arch}"
        triple = f" -mtriple={self.triple}" if self.is_foreign else ""
        return f"{self.kind}{triple} -mcpu={self.mcpu}" + (f" -mattr={','.join(self.mattr)}" if self.mattr else "")

    def fields(self) -> dict[str, object]:
        """All that shapes the code of a given tiling, as JSON values: of a card its capability, not its size.

        So cards of one capability share what was built for the same tilings.
        """
        return {"kind": self.kind, "arch": self.arch, "mcpu": self.mcpu, "mattr": list(self.mattr)}

    def facts(self) -> dict[str, object]:
        """`fields`, and the numbers of the card: all that decides which tiling is the fastest, as JSON values."""
        return {**self.fields(), **({"card": asdict(self.card)} if self.card else {})}

    def as_tvm(self) -> dict[str, object]:
        """The dictionary from which TVM makes its own target."""
        if self.card is not None:
            return {
                "kind": self.kind,
                "arch": self.arch,
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": self.card.shared_bytes,
                "thread_warp_size": 32,
                "host": {"kind": "cuda_host"},
            }
        spec: dict[str, object] = {"kind": self.kind, "mcpu": self.mcpu}
        if self.is_foreign:
            spec["mtriple"] = self.triple
        return {**spec, "mattr": list(self.mattr)} if self.mattr else spec

    def check_runnable(self) -> None:
        """Raise where this CPU lacks an instruction set of the target; devices are looked at when a call names one.

        Raises
        ------
        UnsupportedError
            With the names of what is missing.
        """
        if self.kind != "llvm":
            return
        missing = self.features - host_features()
        if self.arch != platform.machine() or missing:
            lacks = ", ".join(sorted(missing)) or self.arch
            raise UnsupportedError(f"target {self} cannot run on this machine, which lacks: {lacks}")


def resolve_target(target: object = None) -> Target:
    """Find what to compile for.

    Parameters
    ----------
    target : None, str, dict, Target, or tvm.target.Target
        ``None`` or ``"auto"``: BITBLAS_TARGET, else torch's current CUDA device, else this CPU. Text: ``"llvm"`` (this CPU),
        ``"llvm -mcpu=haswell"``, ``"llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1"``, a bare CPU name; ``"cuda"`` (the
        current device), ``"cuda -arch=sm_90"`` (a device of that capability, the current one first, else a typical card), a
        card such as ``"nvidia/nvidia-a100"``; or a target in JSON. A dict: ``{"kind": "llvm", "mcpu": ...}``.

    Raises
    ------
    ConfigError
        The text is not understood, or the CPU or card unknown.
    UnsupportedError
        ``"cuda"``, where there is no device.
    """
    if isinstance(target, Target):
        return target
    if target is None or target == "auto":
        text = env.TARGET.get()
        return resolve_target(text) if text and text != "auto" else device_target() or host_target()
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
        raise ConfigError("target is empty; allowed: 'llvm', 'llvm -mcpu=NAME', the name of a CPU, 'cuda -arch=sm_NN'")
    spec: dict[str, object] = {"kind": words[0]}
    for word in words[1:]:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not (equals or name in _IGNORED):
            raise ConfigError(f"target is {text!r}: {word!r} is not of the form -option=value")
        spec[name] = value.split(",") if name == "mattr" else value
    return spec


def _from_spec(spec: dict[str, object], given: object) -> Target:
    kind = str(spec.get("kind", ""))
    if kind in X86_CPUS or kind in ARM_CPUS:
        spec, kind = {**spec, "mcpu": kind}, "llvm"
    if kind.startswith("nvidia/"):
        spec, kind = {**spec, "arch": _card(kind.removeprefix("nvidia/"), given)}, "cuda"
    allowed = {"cuda": {"arch"}, "llvm": {"mcpu", "mattr", "mtriple"}}.get(kind)
    if allowed is None:
        raise ConfigError(
            f"target is {given!r}; allowed: llvm, optionally with -mcpu and -mattr, cuda with -arch, nvidia/CARD, or one of "
            f"{', '.join((*X86_CPUS, *ARM_CPUS))}"
        )
    unknown = {str(name) for name in spec} - {"kind"} - allowed - _IGNORED
    if unknown:
        raise ConfigError(
            f"target is {given!r}: {', '.join(sorted(unknown))} is not understood; allowed: {', '.join(sorted(allowed))}"
        )
    return _cuda(spec, given) if kind == "cuda" else _llvm(spec, given)


def _llvm(spec: dict[str, object], given: object) -> Target:
    mattr = _mattr(spec.get("mattr") or (), given)
    mcpu = str(spec.get("mcpu") or "")
    arch = str(spec.get("mtriple") or "").partition("-")[0]
    if arch not in ("", *_ARCHITECTURES):
        raise ConfigError(f"target is {given!r}: its triple must begin with one of {', '.join(_ARCHITECTURES)}")
    if mcpu in ("", "native"):
        if arch in ("", platform.machine()):
            host = host_target()
            return Target("llvm", host.arch, host.mcpu, (*host.mattr, *mattr))
        mcpu = "generic" if arch in _ARM else arch.replace("_", "-")
    if not arch:
        named_arm = mcpu in ARM_CPUS and (mcpu != "generic" or platform.machine() in _ARM)
        arch = platform.machine() if not named_arm or platform.machine() in _ARM else "aarch64"
    if mcpu in (X86_CPUS if arch in _ARM else ARM_CPUS) and mcpu != "generic":
        raise ConfigError(f"target is {given!r}: {mcpu} is no CPU of {arch}")
    _cpu_features(mcpu, arch)  # refuses an unknown CPU here, where LLVM would end the process
    return Target("llvm", arch, mcpu, mattr)


def _cuda(spec: dict[str, object], given: object) -> Target:
    arch = str(spec.get("arch") or "")
    if arch and not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise ConfigError(f"target is {given!r}: arch is {arch!r}; it must be of the form sm_90")
    if arch:
        return Target("cuda", arch, card=_card_of(arch))
    found = device_target()
    if found is None:
        raise UnsupportedError(
            f"target is {given!r}, and there is no CUDA device to ask for its compute capability; name it, as in "
            "'cuda -arch=sm_90'"
        )
    return found


def _card_of(arch: str) -> Card | None:
    """The numbers of a device with this capability, the current one first; None where there is none that can be asked."""
    try:
        import torch

        devices = range(torch.cuda.device_count()) if device_arch() else ()
        order = sorted(devices, key=lambda index: index != torch.cuda.current_device())
        return next((device_card(index) for index in order if device_arch(index) == arch.rstrip("af")), None)
    except RuntimeError as error:  # such as that of a child that was forked from a process which uses CUDA
        get_logger().info("CUDA devices do not tell what they are: %s", error)
        return None


def _card(name: str, given: object) -> str:
    if name in CARDS:
        return CARDS[name]
    from thefuzz import process  # only here: nobody who spells well pays for it

    found = process.extractOne(name, list(CARDS))
    raise ConfigError(
        f"target is {given!r}: {name!r} is no card that is known here. Did you mean 'nvidia/{found[0]}'? Or give the compute "
        "capability, as in 'cuda -arch=sm_90'"
    )


def runs_on(built: str, arch: str) -> bool:
    """Whether code for one compute capability runs on a device of another, as ``runs_on("sm_80", "sm_86")`` does.

    Machine code runs within a major version, upwards; that of features of one architecture ("sm_90a") only there, that of a
    family ("sm_100f") within the major version. Source: CUDA C++ Programming Guide, "Binary Compatibility".
    """
    if built == arch:
        return True
    had, wanted = (int(re.sub(r"\D", "", name)) for name in (arch, built))
    return had >= wanted and had // 10 == wanted // 10 and (not built.endswith("a") or had == wanted)


def device_arch(index: int = 0) -> str:
    """The compute capability of a CUDA device, such as ``"sm_90"``; empty where torch sees none."""
    import torch

    # devices of ROCm answer to torch.cuda, too
    if torch.version.cuda is None or not torch.cuda.is_available() or not 0 <= index < torch.cuda.device_count():
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def device_card(index: int) -> Card:
    """The numbers of a CUDA device; those that this torch or this driver does not tell are a typical card's."""
    import torch

    tells = torch.cuda.get_device_properties(index)
    typical = typical_card(device_arch(index))
    # clock in kHz, of memory that transfers twice a cycle; width in bits
    rate = 2 * getattr(tells, "memory_clock_rate", 0) * getattr(tells, "memory_bus_width", 0) // 8_000_000
    return Card(
        num_sms=tells.multi_processor_count,
        shared_bytes=getattr(tells, "shared_memory_per_block_optin", 0) or typical.shared_bytes,
        l2_bytes=getattr(tells, "L2_cache_size", 0) or typical.l2_bytes,
        memory_gbs=rate or typical.memory_gbs,
    )


def device_target(index: int | None = None) -> Target | None:
    """A CUDA device as a target, torch's current one where none is named; None where torch sees none."""
    if not device_arch(0):
        return None
    import torch

    index = torch.cuda.current_device() if index is None else index
    arch = device_arch(index)
    return Target("cuda", arch, card=device_card(index)) if arch else None


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
def _cpu_features(mcpu: str, arch: str) -> frozenset[str]:
    table = ARM_CPUS if arch in _ARM else X86_CPUS
    if mcpu in table:
        return table[mcpu]
    import tvm

    spec = {"kind": "llvm", "mtriple": f"{arch}-linux-gnu"}
    if mcpu not in {str(name) for name in tvm.get_global_func("target.llvm_get_cpu_archlist")(tvm.target.Target(spec))}:
        raise ConfigError(
            f"target: LLVM knows no CPU {mcpu!r} of {arch}; allowed: {', '.join(table)} and LLVM's other names"
        )
    known = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target({**spec, "mcpu": mcpu}))
    return frozenset(LINUX_FLAGS.values()) & {str(name) for name in known}


@cache
def host_features() -> frozenset[str]:
    """Instruction sets of this CPU, of those that rules ask for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return NEON if platform.machine() in _ARM else frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            flags = set(value.split())
            return frozenset(feature for flag, feature in LINUX_FLAGS.items() if flag in flags)
    return frozenset()


@cache
def host_target() -> Target:
    """This CPU: the x86-64 level it reaches, and the features beyond.

    The level, and not a model's name, because a hypervisor may hide instructions that the model has.
    """
    machine, features = platform.machine(), host_features()
    if machine in _ARM:
        return Target("llvm", machine, "generic", tuple(f"+{name}" for name in sorted(features & _ASKED_FOR)))
    for level, needed in LEVELS:
        if needed <= features:
            return Target(
                "llvm", machine, level, tuple(f"+{name}" for name in sorted((features - needed) & _ASKED_FOR))
            )
    raise UnsupportedError(f"no CPU target for {machine!r}; name one in BITBLAS_TARGET")
