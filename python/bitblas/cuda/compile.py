"""From TVM's CUDA module to the files of an artifact, by nvcc or by NVRTC."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BuildError
from .nvcc import compile_library, find_nvcc, nvcc_version
from .source import cuda_source

if TYPE_CHECKING:
    import tvm


def find_cuda_compiler() -> str:
    """The command of nvcc, else the path of the library of NVRTC.

    Raises
    ------
    BuildError
        Neither is there, or BITBLAS_NVCC names a program that is not.
    """
    found = find_nvcc()
    if found is None:
        raise BuildError(
            "compiling a CUDA operator needs nvcc or NVRTC, and there is neither. Install one, such as by: "
            "pip install nvidia-cuda-nvcc; or name an nvcc in BITBLAS_NVCC"
        )
    return found


def write_cuda(mod: tvm.runtime.Module, source: Path, library: Path, compiler: str, arch: str) -> dict[str, object]:
    """Write the text and the library of a module.

    Parameters
    ----------
    mod : tvm.runtime.Module
        Kernels, and functions of the kind ``cuda_host`` that launch them.
    source, library : Path
        Where to.
    compiler : str
        What `find_cuda_compiler` gave.
    arch : str
        The compute capability, such as ``"sm_90"``.

    Returns
    -------
    dict
        For the manifest, as JSON values: ``"library"``, the name of what was written; ``"compiler"``, what made it; and
        ``"resources"``, what each kernel takes (`cuda.resources`).

    Raises
    ------
    BuildError
        The compiler failed; with its command and its output.
    UnsupportedError
        nvcc is too new for the card.
    """
    source.write_text(cuda_source(mod))
    resources = compile_library(compiler, source, library, arch)
    return {
        "library": library.name,
        "compiler": f"nvcc {nvcc_version(compiler)} ({compiler})",
        "resources": {name: one.fields() for name, one in resources.items()},
    }
