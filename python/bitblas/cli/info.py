"""`bitblas info`: what an installation is, what it can do, and what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import env
from .._version import __version__
from ..artifacts import ArtifactStore
from ..build import find_compiler
from ..config import Config, FlashAttenConfig, MatmulConfig
from ..cuda.compile import GET_CUDA_COMPILER
from ..cuda.nvcc import find_nvcc, nvcc_version
from ..cuda.nvrtc import find_nvrtc, nvrtc_version
from ..errors import BitBLASError, ConfigError, UnsupportedError
from ..machines import Card
from ..plan import OLDEST_CAPABILITY, make_plan
from ..target import device_arch, device_card, host_features, resolve_target

#: What an installation consists of, with the command that gets it; only the versions of the ffi matter to the letter.
_PACKAGES = {
    "torch": "pip install torch",
    "apache-tvm": "pip install 'apache-tvm>=0.27,<0.28'; needed to compile operators, not to load compiled ones",
    "apache-tvm-ffi": "pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'",
    "numpy": "pip install numpy",
}
_VERSIONS = {"apache-tvm": "0.27.", "apache-tvm-ffi": "0.1.14."}
_GET_COMPILER = (
    "install one, such as Debian's gcc (apt install gcc), or name one in BITBLAS_CC; without it operators are compiled "
    "in memory by every process, and nothing is cached"
)
#: Kinds of operator that rules tell apart, by a config of each.
_KINDS: dict[str, Config] = {
    "rules, float A": MatmulConfig(N=64, K=64, A_dtype="float16", W_dtype="uint4"),
    "rules, int A, W to 7 bits": MatmulConfig(N=64, K=64, A_dtype="int8", W_dtype="uint4"),
    "rules, int A, W of 8 bits": MatmulConfig(N=64, K=64, A_dtype="int8", W_dtype="int8"),
    "rules, attention": FlashAttenConfig(dim=64),
}
_PROBE = "#include <omp.h>\nint bitblas_probe(void) { return omp_get_max_threads(); }\n"


def add_command(commands: Any) -> None:
    """Add the verb to a parser's commands."""
    info = commands.add_parser("info", help="what this installation is, what it can do, and what is missing")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run)


@dataclass(frozen=True)
class Fact:
    """A line of `bitblas info`.

    Attributes
    ----------
    section, name, value : str
        What it is about, and what there is.
    hint : str
        What is wrong and how to mend it; empty where nothing is.
    """

    section: str
    name: str
    value: str
    hint: str = ""


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    facts = [
        fact
        for part in (_versions, _target, _toolchain, _devices, _cuda_compilers, _cache, _settings)
        for fact in _guarded(part)
    ]
    if options.json:
        print(json.dumps([asdict(fact) for fact in facts], indent=1))
        return 0
    width = max(len(fact.name) for fact in facts)
    section = None
    for fact in facts:
        if fact.section != section:
            print(f"{'' if section is None else chr(10)}{fact.section}")
            section = fact.section
        print(f"  {fact.name:{width}}  {fact.value}")
        if fact.hint:
            print(f"  {'':{width}}  -> {fact.hint}")
    return 0


def _guarded(part: Callable[[], Iterator[Fact]]) -> Iterator[Fact]:
    """Run a part of the report to its first error, which becomes a line: a report on a broken installation must not fail."""
    try:
        yield from part()
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what the user wants to know
        yield Fact(
            part.__name__.strip("_"), "error", f"{type(error).__name__}: {error}", "this part could not be examined"
        )


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "bitblas", f"{__version__} ({Path(__file__).parents[1]})")
    yield Fact("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for name, command in _PACKAGES.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Fact("versions", name, "missing", command)
            continue
        wanted = _VERSIONS.get(name, "")
        hint = "" if version.startswith(wanted) else f"bitblas works with {wanted}*: {command}"
        yield Fact("versions", name, version, hint)


@contextmanager
def _without_tvm() -> Iterator[None]:
    """Let `import tvm` fail inside of a `with` block, unless that has happened already: it takes seconds."""
    name = "tvm"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _target() -> Iterator[Fact]:
    import torch

    try:
        with _without_tvm():
            target = resolve_target(None)
            features = target.features
        yield Fact("target", "target", str(target))
        yield Fact("target", "instruction sets", target.isa)
        missing = features - host_features() if target.kind == "llvm" else frozenset()
        lacks = f"this machine cannot run it: it lacks {', '.join(sorted(missing))}" if missing else ""
        if target.card is not None:
            yield Fact("target", "card", _describe_card(target.card))
        else:
            yield Fact("target", "features", ", ".join(sorted(features)) or "none", lacks)
        for what, config in _KINDS.items():
            try:
                names = ", ".join(dict.fromkeys(kernel.rule for kernel in make_plan(config, target).kernels))
            except UnsupportedError:
                names = "none: there are no kernels for this target"
            yield Fact("target", what, names)
    except BitBLASError as error:
        hint = "set BITBLAS_TARGET to one that is allowed, or unset it" if env.TARGET.text() else ""
        yield Fact("target", "target", f"none: {error}", hint)
    except ImportError:
        yield Fact("target", "target", f"{env.TARGET.text()}, a CPU that only LLVM knows: looked up when TVM is loaded")
    yield Fact("target", "threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs (torch.set_num_threads)")


def _devices() -> Iterator[Fact]:
    import torch

    if not torch.version.cuda:
        yield Fact("cuda", "devices", "none: torch is built without CUDA")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Fact("cuda", "devices", f"none: torch is built for CUDA {torch.version.cuda}, and sees no device")
    for index in range(count):
        arch = device_arch(index)
        old = int(arch[3:]) < OLDEST_CAPABILITY
        hint = f"supported from compute capability {OLDEST_CAPABILITY / 10} on" if old else ""
        name = torch.cuda.get_device_name(index)
        yield Fact("cuda", f"cuda:{index}", f"{name}: {arch}, {_describe_card(device_card(index))}", hint)


def _describe_card(card: Card) -> str:
    speed = f", {card.memory_gbs} GB/s" if card.memory_gbs else ""
    return (
        f"{card.num_sms} multiprocessors, {card.shared_bytes >> 10} KB of shared memory a block, "
        f"{card.l2_bytes / (1 << 20):.0f} MB of L2{speed}"
    )


def _cuda_compilers() -> Iterator[Fact]:
    try:
        nvcc, nvrtc = find_nvcc(), find_nvrtc()
    except BitBLASError as error:
        yield Fact("cuda", "nvcc", f"none: {error}", "correct BITBLAS_NVCC, or unset it")
        return
    yield Fact("cuda", "nvcc", f"{nvcc_version(nvcc)} ({nvcc})" if nvcc else "none")
    hint = "" if nvcc or nvrtc else f"to build operators for cards: {GET_CUDA_COMPILER}"
    yield Fact("cuda", "NVRTC", f"{nvrtc_version(nvrtc)} ({nvrtc})" if nvrtc else "none", hint)


def _toolchain() -> Iterator[Fact]:
    try:
        compiler = find_compiler()
    except BitBLASError as error:
        yield Fact("toolchain", "C compiler", f"none: {error}", "correct BITBLAS_CC, or unset it")
        return
    if compiler is None:
        yield Fact("toolchain", "C compiler", "none", _GET_COMPILER)
        return
    yield Fact("toolchain", "C compiler", compiler)
    problem = _try_link(compiler)
    if problem:
        hint = "operators cannot be linked: install its libraries, such as Debian's gcc and libc6-dev with libgomp"
        yield Fact("toolchain", "links OpenMP", f"no: {problem}", hint)
    else:
        yield Fact("toolchain", "links OpenMP", "yes")


def _try_link(compiler: str) -> str:
    """Link a small library as an operator is linked; return what went wrong, in one line, or nothing."""
    with tempfile.TemporaryDirectory(prefix="bitblas-info-") as name:
        source, library = Path(name) / "probe.c", Path(name) / "probe.so"
        source.write_text(_PROBE)
        command = [compiler, "-shared", "-fPIC", "-fopenmp", "-o", str(library), str(source)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0:
            return ""
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return next(
            (line for line in lines if "error" in line.lower()), lines[0] if lines else f"exit {done.returncode}"
        )


def _cache() -> Iterator[Fact]:
    try:
        root = env.CACHE_DIR.get()
    except ConfigError as error:
        yield Fact("cache", "directory", f"none: {error}", "set BITBLAS_CACHE_DIR to a directory of your own")
        return
    store = ArtifactStore(root)
    yield Fact("cache", "directory", str(root))
    other = "or set BITBLAS_CACHE_DIR to a directory of your own"
    try:
        entries = len(store.entries())
        yield Fact("cache", "operators", f"{entries}, {store.size() / 1e6:.1f} MB")
    except (BitBLASError, OSError) as error:
        yield Fact("cache", "usable", f"no: {error}", "mend that, " + other)
        return
    problem = _unwritable(root)
    hint = f"operators are compiled again by every process: mend that, {other}" if problem else ""
    yield Fact("cache", "usable", f"only to read: {problem}" if problem else "yes", hint)


def _unwritable(root: Path) -> str:
    """Why nothing can be kept in a directory, which need not exist yet; empty where it can."""
    place = root
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is no directory"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written"
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if status.f_flag & getattr(os, "ST_NOEXEC", 0):
        return f"{place} is mounted noexec: no library can be loaded from it"
    return f"{free / 1e6:.1f} MB are free in {place}" if free < 16 << 20 else ""


def _settings() -> Iterator[Fact]:
    by_name = {variable.name: variable for variable in env.VARIABLES}
    for row in env.settings():
        hint = ""
        try:
            by_name[row.name].get()
        except ConfigError as error:
            hint = str(error)
        default = " (default)" if row.is_default else ""
        yield Fact("environment", row.name, f"{row.value or 'unset'}{default if row.value else ''}: {row.doc}", hint)
