"""The CUDA C++ text of an operator: our device functions, TVM's kernels and, for nvcc, the functions that launch them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..sources import source_dir

if TYPE_CHECKING:
    import tvm

#: Files of `src/cuda` that others build upon: they come first.
_FIRST = ("registers.cuh",)


def device_files() -> list[Path]:
    """The files of our device functions, in the order in which they are put in front of kernels."""
    return sorted((source_dir() / "cuda").glob("*.cuh"), key=lambda path: (path.name not in _FIRST, path.name))


def device_prefix() -> str:
    """The text of our device functions; each file includes what it needs of CUDA, and none another of ours."""
    texts = (path.read_text().replace("#pragma once\n", "") for path in device_files())
    return "\n".join(texts)


def cuda_source(mod: tvm.runtime.Module) -> str:
    """The whole text of a module that was built for a CUDA target: it stands alone, and nvcc takes it.

    Parameters
    ----------
    mod : tvm.runtime.Module
        A module of the kind ``cuda_host``, whose imports are the kernels.
    """
    from tvm.backend.cuda.host import export_cuda_host

    return device_prefix() + "\n" + export_cuda_host(mod)


def kernel_source(mod: tvm.runtime.Module) -> str:
    """The part of `cuda_source` that runs on the card: NVRTC takes it."""
    texts = [imported.inspect_source("cuda") for imported in mod.imports]
    return device_prefix() + "\n" + "\n".join(texts)
