"""NVRTC, the compiler that torch's CUDA wheels bring as a library: kernels to machine code, without nvcc and a C++ compiler."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from functools import cache
from pathlib import Path

import torch

from ..errors import BuildError
from ..sources import source_dir
from .nvcc import package_files

_LIBRARY, _HEADER = "libnvrtc.so.*", "cuda_fp16.h"
#: The places of a CUDA toolkit.
_TOOLKITS = ("CUDA_HOME", "CUDA_PATH")
_USUAL = "/usr/local/cuda"


def find_nvrtc() -> str | None:
    """The path of NVRTC's library, of PyPI's packages or of a toolkit, that of torch's CUDA first; or None."""
    found = package_files(f"lib/{_LIBRARY}")
    for root in _toolkits():
        found += [path for folder in ("lib64", "lib") for path in sorted((root / folder).glob(_LIBRARY), reverse=True)]
    # drivers load code of the CUDA that they, and with them torch, are for
    major = (torch.version.cuda or "").partition(".")[0]
    found.sort(key=lambda path: f".so.{major}" not in path.name)
    return str(found[0]) if found else ctypes.util.find_library("nvrtc")


def _toolkits() -> list[Path]:
    return [Path(root) for root in (*(os.environ.get(name) for name in _TOOLKITS), _USUAL) if root]


def find_headers(library: str) -> Path:
    """The directory of CUDA's headers, that beside the library first.

    Raises
    ------
    BuildError
        There are none.
    """
    beside = Path(library).parent.parent / "include" / _HEADER
    places = [beside, *package_files(f"include/{_HEADER}"), *(root / "include" / _HEADER for root in _toolkits())]
    found = next((path.parent for path in places if path.is_file()), None)
    if found is None:
        raise BuildError(
            f"NVRTC ({library}) needs CUDA's headers, and there are none; install them, such as by: "
            "pip install nvidia-cuda-runtime"
        )
    return found


@cache
def _load(library: str) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(library)
    except OSError as error:
        raise BuildError(f"NVRTC cannot be loaded: {error}") from error
    found.nvrtcGetErrorString.restype = ctypes.c_char_p
    return found


def nvrtc_version(library: str) -> str:
    """The version of NVRTC, such as ``"13.0"``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _load(library).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _known_archs(nvrtc: ctypes.CDLL) -> list[int]:
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(found)
    return sorted(found)


def compile_cubin(library: str, text: str, arch: str) -> bytes:
    """Machine code of kernels; PTX, of the newest capability that NVRTC knows, for one that is newer.

    Parameters
    ----------
    library : str
        What `find_nvrtc` gave.
    text : str
        CUDA C++ that runs on the card.
    arch : str
        The compute capability, such as ``"sm_90"``.

    Raises
    ------
    BuildError
        NVRTC cannot be loaded, has no headers, or failed; with its options and its log.
    """
    nvrtc = _load(library)
    stand_ins, newest = source_dir() / "cuda" / "rtc", max(_known_archs(nvrtc))
    is_newer = int("".join(filter(str.isdigit, arch))) > newest
    options = [
        f"--gpu-architecture={f'compute_{newest}' if is_newer else arch}",
        "-std=c++17",
        f"--include-path={stand_ins}",
        f"--include-path={find_headers(library)}",
        "--diag-suppress=174,177,550",
    ]
    program = ctypes.c_void_p()
    failed = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    if not failed:
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
            if not failed:
                return _read(nvrtc, program, "PTX" if is_newer else "CUBIN")
            log = _read(nvrtc, program, "ProgramLog").decode(errors="replace").rstrip("\0")
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    else:
        log = ""
    reason = nvrtc.nvrtcGetErrorString(failed).decode()
    raise BuildError(f"NVRTC could not compile an operator: {reason}", f"{library} {' '.join(options)}", log)


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
        return b""
    held = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, held)
    return held.raw
