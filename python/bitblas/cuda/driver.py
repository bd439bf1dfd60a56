"""The CUDA driver by ctypes, and what torch knows of devices and streams: neither is looked at before a call needs it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch

from .launches import Launch, evaluate

_STATUS_ACTIVE = 1  # of CUstreamCaptureStatus
_MAX_DYNAMIC_SHARED = 8  # of CUfunction_attribute
#: Dynamic shared memory that a kernel may have without being allowed more.
_SHARED_BYTES = 48 << 10
_TYPES = {"pointer": ctypes.c_void_p, "int32": ctypes.c_int32, "int64": ctypes.c_int64}


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
    RuntimeError
        There is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"CUDA: there is no driver: {error}") from error


def capture_id(stream: int) -> int:
    """A number that is another for each capture of a graph; 0 where none is under way, or the driver does not tell."""
    status, number = ctypes.c_int(0), ctypes.c_uint64(0)
    try:
        # the third argument is the last that is asked for; the rest may be null
        ask = library().cuStreamGetCaptureInfo_v2
    except (RuntimeError, AttributeError):
        return 0
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return 0 if failed or status.value != _STATUS_ACTIVE else number.value


def check(failed: int, what: str) -> None:
    """Raise where a function of the driver has failed.

    Raises
    ------
    RuntimeError
        With the driver's name of the error.
    """
    if failed:
        name = ctypes.c_char_p()
        library().cuGetErrorName(failed, ctypes.byref(name))
        raise RuntimeError(f"CUDA: {what} failed: {(name.value or b'').decode() or failed}")


class CubinModule:
    """Kernels that NVRTC has compiled, as functions that take torch tensors: ``module["matmul_0"](A, W, out)``.

    Each device loads them when they are first launched there, on torch's current stream of the device that the first tensor is
    on.

    Parameters
    ----------
    code : bytes
        The machine code.
    launches : mapping of str to sequence of Launch
        How each function launches its kernels.
    """

    def __init__(self, code: bytes, launches: Mapping[str, Sequence[Launch]]) -> None:
        self._code, self._launches = code, launches
        self._devices: dict[int, _OnDevice] = {}

    def __getitem__(self, name: str) -> Callable[..., None]:
        launches = tuple(self._launches[name])

        def call(*tensors: torch.Tensor) -> None:
            device = tensors[0].get_device()
            place = self._devices.get(device) or self._devices.setdefault(device, _OnDevice(device, self._code))
            place.launch(launches, tensors)

        return call


class _OnDevice:
    """Kernels on one device, in the context that torch and the CUDA runtime use there."""

    def __init__(self, device: int, code: bytes) -> None:
        self._index, self._cuda = device, library()
        self._context, self._module = ctypes.c_void_p(), ctypes.c_void_p()
        self._functions: dict[tuple[str, int], ctypes.c_void_p] = {}
        number = ctypes.c_int()
        # torch numbers the devices of CUDA_VISIBLE_DEVICES, as the driver does
        check(self._cuda.cuInit(0), "cuInit")
        check(self._cuda.cuDeviceGet(ctypes.byref(number), device), "cuDeviceGet")
        check(self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), number), "cuDevicePrimaryCtxRetain")
        with self._current():
            check(self._cuda.cuModuleLoadData(ctypes.byref(self._module), code), "cuModuleLoadData")

    @contextmanager
    def _current(self) -> Iterator[None]:
        check(self._cuda.cuCtxPushCurrent_v2(self._context), "cuCtxPushCurrent")
        try:
            yield
        finally:
            check(self._cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())), "cuCtxPopCurrent")

    def launch(self, launches: Sequence[Launch], tensors: Sequence[torch.Tensor]) -> None:
        """Launch kernels one after the other, in the context of the device."""
        now = ctypes.c_void_p()
        check(self._cuda.cuCtxGetCurrent(ctypes.byref(now)), "cuCtxGetCurrent")
        if now.value == self._context.value:  # as it mostly is
            self._launch(launches, tensors)
            return
        with self._current():
            self._launch(launches, tensors)

    def _launch(self, launches: Sequence[Launch], tensors: Sequence[torch.Tensor]) -> None:
        stream = ctypes.c_void_p(current_stream(self._index))
        for one in launches:
            values = [_TYPES[kind](evaluate(value, tensors)) for kind, value in one.arguments]
            given = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            sizes = [max(1, evaluate(size, tensors)) for size in (*one.grid, *one.block)]
            shared = evaluate(one.shared, tensors)
            function = self._function(one.kernel, shared)
            check(self._cuda.cuLaunchKernel(function, *sizes, shared, stream, given, None), "cuLaunchKernel")

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        """The kernel, allowed so much dynamic shared memory."""
        found = self._functions.get((name, shared))
        if found is None:
            found = ctypes.c_void_p()
            check(
                self._cuda.cuModuleGetFunction(ctypes.byref(found), self._module, name.encode()), "cuModuleGetFunction"
            )
            if shared > _SHARED_BYTES:
                check(self._cuda.cuFuncSetAttribute(found, _MAX_DYNAMIC_SHARED, shared), "cuFuncSetAttribute")
            self._functions[name, shared] = found
        return found
