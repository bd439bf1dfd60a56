"""The CUDA driver by ctypes, and what torch knows of devices and streams: neither is looked at before a call needs it."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

_STATUS_ACTIVE = 1  # of CUstreamCaptureStatus


def place(device: int) -> torch.device:
    """The device with an index."""
    return torch.device("cuda", device)


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a device: the one on which kernels are launched."""
    raw = getattr(
        torch._C, "_cuda_getCurrentRawStream", None
    )  # what compiled graphs of torch ask: no Python object is made
    return raw(device) if raw is not None else torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: int) -> bool:
    """Whether a graph is being captured on the current stream of a device."""
    if torch.cuda.current_device() == device:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def synchronize(device: int) -> None:
    """Wait for the current stream of a device."""
    torch.cuda.current_stream(device).synchronize()


@cache
def library() -> ctypes.CDLL:
    """The driver.

    Raises
    ------
    OSError
        There is none.
    """
    return ctypes.CDLL("libcuda.so.1")


def capture_id(stream: int) -> int:
    """A number that is another for each capture of a graph; 0 where none is under way, or the driver does not tell."""
    status, number = ctypes.c_int(0), ctypes.c_uint64(0)
    try:
        # the third argument is the last that is asked for; the rest may be null
        ask = library().cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return 0
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return 0 if failed or status.value != _STATUS_ACTIVE else number.value
