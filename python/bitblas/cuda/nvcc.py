"""nvcc: where it is, what it can compile for, and how it makes a library of an operator's text."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .. import env
from ..errors import BuildError, UnsupportedError
from .resources import KernelResources, parse_ptxas

#: Said of text that TVM writes: statements without effect, functions and variables that nobody uses.
_NOISE = "174,177,550"
_DIRECTORIES = ("CUDA_HOME", "CUDA_PATH")
_USUAL = "/usr/local/cuda"
#: What nvcc adds to its arguments.
_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def find_nvcc() -> str | None:
    """The command that runs nvcc, or None.

    BITBLAS_NVCC, else the PATH, the directories that CUDA_HOME and CUDA_PATH name, /usr/local/cuda, and the packages
    nvidia-cuda-nvcc of PyPI.

    Raises
    ------
    BuildError
        BITBLAS_NVCC names a program that is not there.
    """
    if named := env.NVCC.command():
        return named
    if on_path := shutil.which("nvcc"):
        return shlex.quote(on_path)
    return next((shlex.quote(found) for place in _places() if (found := shutil.which(str(place)))), None)


def _places() -> Iterator[Path]:
    for name in _DIRECTORIES:
        if os.environ.get(name):
            yield Path(os.environ[name]) / "bin" / "nvcc"
    yield Path(_USUAL) / "bin" / "nvcc"
    yield from package_files("bin/nvcc")


def package_files(pattern: str) -> list[Path]:
    """Files of NVIDIA's packages of PyPI, such as ``"lib/libnvrtc.so.*"``, newest first: below ``nvidia/*``."""
    spec = importlib.util.find_spec("nvidia")
    roots = dict.fromkeys(spec.submodule_search_locations or ()) if spec else {}
    found = [(path.relative_to(root), path) for root in roots for path in Path(root).glob(f"*/{pattern}")]
    found.sort(key=lambda row: [int(part) for part in re.findall(r"\d+", row[0].as_posix())], reverse=True)
    return [path for _, path in found]


def has_host_compiler(nvcc: str) -> bool:
    """Whether a command of nvcc finds the C++ compiler that it needs, as far as can be told without running it."""
    named = " ".join([nvcc, *(os.environ.get(name, "") for name in _FLAGS)])
    return bool(os.environ.get("NVCC_CCBIN")) or "-ccbin" in named or shutil.which("g++") is not None


@cache
def nvcc_version(nvcc: str) -> str:
    """What nvcc says it is, such as ``"13.0.88"``; empty where it does not say."""
    done = subprocess.run([*shlex.split(nvcc), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\bV(\d+(?:\.\d+)+)", done.stdout)
    return match[1] if match else ""


@cache
def _known_archs(nvcc: str) -> tuple[int, ...]:
    done = subprocess.run([*shlex.split(nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=False)
    return tuple(sorted(int(number) for number in re.findall(r"compute_(\d+)\b", done.stdout)))


def code_option(nvcc: str, arch: str) -> str:
    """The argument of ``-gencode`` for a compute capability such as ``"sm_90"``.

    One that is newer than this nvcc gets PTX of the newest that nvcc knows, which the driver translates when it loads it.

    Raises
    ------
    UnsupportedError
        The capability is older than what this nvcc compiles for.
    """
    number = arch.removeprefix("sm_")
    plain, known = int(re.sub(r"\D", "", number)), _known_archs(nvcc)
    if not known or plain in known:
        return f"arch=compute_{number},code=sm_{number}"
    if plain < known[0]:
        raise UnsupportedError(
            f"nvcc {nvcc_version(nvcc)} compiles for compute capability {known[0] / 10} and later, and the target is {arch}; "
            "name an older nvcc in BITBLAS_NVCC"
        )
    newest = max(one for one in known if one < plain)
    return f"arch=compute_{newest},code=compute_{newest}"


def compile_library(nvcc: str, source: Path, library: Path, arch: str) -> dict[str, KernelResources]:
    """Make a shared library of an operator's text.

    Parameters
    ----------
    nvcc : str
        The command.
    source, library : Path
        What to read and to write.
    arch : str
        The compute capability, such as ``"sm_90"``.

    Returns
    -------
    dict
        What each kernel takes, by name.

    Raises
    ------
    BuildError
        nvcc failed; with the command and its output.
    UnsupportedError
        nvcc is too new for the capability.
    """
    import tvm_ffi.libinfo

    command = [
        *shlex.split(nvcc),
        "-shared",
        *("-Xcompiler", "-fPIC"),
        "-std=c++17",
        "-O3",
        *("-cudart", "static"),
        *("-gencode", code_option(nvcc, arch)),
        *("-Xptxas", "-v"),
        *("--diag-suppress", _NOISE),
        *(option for path in tvm_ffi.libinfo.include_paths() for option in ("-I", path)),
        *("-o", str(library), str(source)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BuildError("nvcc could not compile an operator", shlex.join(command), done.stdout + done.stderr)
    return parse_ptxas(done.stdout + done.stderr)
