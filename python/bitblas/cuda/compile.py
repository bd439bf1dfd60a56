"""From TVM's CUDA module to the files of an artifact, by nvcc or by NVRTC."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BuildError
from .driver import CubinModule
from .launches import Launch, read_launches
from .nvcc import compile_library, find_nvcc, has_host_compiler, nvcc_version
from .nvrtc import compile_cubin, find_nvrtc, nvrtc_version
from .source import cuda_source, kernel_source

if TYPE_CHECKING:
    import tvm

#: What to run where there is neither nvcc nor NVRTC.
GET_CUDA_COMPILER = "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"


def find_cuda_compiler() -> str:
    """The command of nvcc, else the path of NVRTC's library; this also where nvcc has no C++ compiler to work with.

    Raises
    ------
    BuildError
        Neither is there, or BITBLAS_NVCC names a program that is not.
    """
    found = find_nvcc()
    if found is None or not has_host_compiler(found):
        found = find_nvrtc() or found
    if found is None:
        raise BuildError(
            "compiling an operator for a card needs nvcc or NVRTC, and there is neither; install one, such as by: "
            f"{GET_CUDA_COMPILER}; or name an nvcc in BITBLAS_NVCC"
        )
    return found


def is_nvrtc(compiler: str) -> bool:
    """Whether what `find_cuda_compiler` gave is NVRTC's library."""
    return "nvrtc.so" in Path(compiler).name


@dataclass(frozen=True)
class Compiled:
    """What TVM made of kernels for a card.

    Attributes
    ----------
    mod : tvm.runtime.Module
        Kernels, and functions of the kind ``cuda_host`` that launch them.
    host : tvm.IRModule
        Those functions, as they are before their built-ins are lowered.
    arch : str
        The compute capability, such as ``"sm_90"``.
    """

    mod: tvm.runtime.Module
    host: tvm.IRModule
    arch: str


def write_cuda(compiled: Compiled, source: Path, library: Path, compiler: str) -> dict[str, object]:
    """Write the text and the library of kernels.

    Parameters
    ----------
    compiled : Compiled
        The kernels.
    source, library : Path
        Where to. NVRTC writes a ``.cubin`` beside, in the place of the library, and a ``.json`` that says how to launch it.
    compiler : str
        What `find_cuda_compiler` gave.

    Returns
    -------
    dict
        For the manifest, as JSON values: ``"library"``, the name of what was written; ``"compiler"``, what made it; and
        ``"resources"``, what each kernel takes (`cuda.resources`), where that is told.

    Raises
    ------
    BuildError
        The compiler failed; with its command and its output.
    UnsupportedError
        nvcc is too new for the card.
    """
    source.write_text(cuda_source(compiled.mod))
    if is_nvrtc(compiler):
        return _write_cubin(compiled, library.with_suffix(".cubin"), compiler)
    resources = compile_library(compiler, source, library, compiled.arch)
    return {
        "library": library.name,
        "compiler": f"nvcc {nvcc_version(compiler)} ({compiler})",
        "resources": {name: one.fields() for name, one in resources.items()},
    }


def _write_cubin(compiled: Compiled, cubin: Path, compiler: str) -> dict[str, object]:
    launches = read_launches(compiled.host)
    cubin.write_bytes(compile_cubin(compiler, kernel_source(compiled.mod), compiled.arch))
    cubin.with_suffix(".json").write_text(
        json.dumps({name: [one.fields() for one in found] for name, found in launches.items()}, indent=1)
    )
    return {"library": cubin.name, "compiler": f"nvrtc {nvrtc_version(compiler)} ({compiler})"}


def load_cubin(cubin: Path) -> CubinModule:
    """The kernels in a file that NVRTC has made, on any device that is used."""
    found = json.loads(cubin.with_suffix(".json").read_text())
    launches: dict[str, Sequence[Launch]] = {name: [Launch.parse(one) for one in rows] for name, rows in found.items()}
    return CubinModule(cubin.read_bytes(), launches)
