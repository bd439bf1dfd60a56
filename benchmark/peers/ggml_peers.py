"""llama.cpp's ggml, out of llama-cpp-python: matmuls that quantize activations to int8 in blocks of 32 or 256."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bitblas.bench import Candidate, Peer, Skipped, Verdict, Workload

from .operands import LIMITS, MAX_COPIES, Codes, graph_copies, integer_codes

NAME = "ggml {}"
_F32 = 0  # ggml.h, enum ggml_type
_MAX_NODES = 2 * MAX_COPIES


@dataclass(frozen=True)
class _Type:
    """A type of ggml's: its number, k in a block, why it does not serve a weight (or ""), and the bytes of its blocks."""

    number: int
    block: int
    refuse: Callable[[Codes], str]
    pack: Callable[[Codes], np.ndarray]


def _has_middle(weight: Codes) -> bool:
    return bool((weight.points == 1 << (weight.bits - 1)).all())


def _blocks(weight: Codes, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, K / size, size) codes and (N, K / size, 1) float32 scales and zero points."""
    small, rows = weight.in_groups(size), weight.codes.shape[0]
    parts = (small.codes.view(rows, -1, size), small.scale[..., None], small.points[..., None])
    return parts[0].numpy(), parts[1].numpy(), parts[2].numpy()


def _half(values: np.ndarray) -> np.ndarray:
    """The bytes of float16 numbers."""
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[..., :16] | codes[..., 16:] << 4


def _q4_0(weight: Codes) -> np.ndarray:
    """d · (q - 8)."""
    codes, scale, _ = _blocks(weight, 32)
    return np.concatenate([_half(scale), _nibbles(codes)], -1)


def _q4_1(weight: Codes) -> np.ndarray:
    """d · q + m."""
    codes, scale, points = _blocks(weight, 32)
    return np.concatenate([_half(scale), _half(-scale * points), _nibbles(codes)], -1)


def _q8_0(weight: Codes) -> np.ndarray:
    """d · q, q signed."""
    codes, scale, _ = _blocks(weight, 32)
    return np.concatenate([_half(scale), codes ^ 128], -1)


def _tq2_0(weight: Codes) -> np.ndarray:
    """d · (q - 1): with d < 0 all four values of int2, and not only the three that the type is named for."""
    codes, scale, _ = _blocks(weight, 256)
    parts = (3 - codes).reshape(*codes.shape[:2], 2, 4, 32)
    packed = parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6
    return np.concatenate([packed.reshape(*codes.shape[:2], 64), _half(-scale)], -1)


def _refuses(bits: int, middle: bool, block: int) -> Callable[[Codes], str]:
    def refuse(weight: Codes) -> str:
        if weight.bits != bits:
            return f"holds codes of {bits} bits"
        if weight.group % block:
            return f"has blocks of {block}"
        return "has no zero points" if middle and not _has_middle(weight) else ""

    return refuse


_TYPES = {
    "Q4_0": _Type(2, 32, _refuses(4, True, 32), _q4_0),
    "Q4_1": _Type(3, 32, _refuses(4, False, 32), _q4_1),
    "Q8_0": _Type(8, 32, _refuses(8, True, 32), _q8_0),
    "TQ2_0": _Type(35, 256, _refuses(2, True, 256), _tq2_0),
}


class _Params(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p))


#: Functions of libggml: result, arguments.
_P, _I, _Z, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
_BASE = {
    "ggml_init": (_P, [_Params]),
    "ggml_free": (None, [_P]),
    "ggml_log_set": (None, [_P, _P]),
    "ggml_new_tensor_2d": (_P, [_P, _I, _L, _L]),
    "ggml_nbytes": (_Z, [_P]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_new_graph_custom": (_P, [_P, _Z, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_backend_get_device": (_P, [_P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, _P]),
    "ggml_backend_dev_buffer_type": (_P, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _Z]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _Z, _Z]),
    "ggml_backend_tensor_get": (None, [_P, _P, _Z, _Z]),
    "ggml_backend_graph_compute": (_I, [_P, _P]),
    "ggml_backend_free": (None, [_P]),
}
_CPU = {"ggml_backend_cpu_init": (_P, []), "ggml_backend_cpu_set_n_threads": (None, [_P, _I])}


#: ggml's messages, one for each tensor that it repacks, go nowhere.
_QUIET = ctypes.CFUNCTYPE(None, _I, ctypes.c_char_p, _P)(lambda level, text, data: None)


class _Library:
    """The functions, by name without `ggml_`."""

    def __init__(self, folder: Path) -> None:
        for file, table in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in table.items():
                function = library[name]
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_QUIET, None)


@cache
def _library() -> _Library | str:
    """libggml, or why there is none."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        return "No module named 'llama_cpp'"
    try:
        return _Library(Path(found.submodule_search_locations[0]) / "lib")
    except (OSError, AttributeError) as error:
        return str(error)


class _Matmuls:
    """A graph of matmuls of the same activations with copies of a weight, on ggml's CPU backend."""

    def __init__(self, ggml: _Library, kind: _Type, packed: np.ndarray, a: torch.Tensor, copies: int) -> None:
        self._ggml = g = ggml
        (m, K), N = a.shape, packed.shape[0]
        self._shape = (m, N)
        self._contexts = [g.init(_Params(1 << 20, None, True)) for _ in range(2)]
        self._backend = g.backend_cpu_init()
        g.backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        weights = [g.new_tensor_2d(self._contexts[0], kind.number, K, N) for _ in range(copies)]
        rows = g.new_tensor_2d(self._contexts[1], _F32, K, m)
        self._graph = g.new_graph_custom(self._contexts[1], _MAX_NODES, False)
        self._results = [g.mul_mat(self._contexts[1], weight, rows) for weight in weights]
        for result in self._results:
            g.build_forward_expand(self._graph, result)
        device = g.backend_get_device(self._backend)
        kind_of_buffer = self._buffer_type(device, weights[0], self._results[0])
        self.buffer = g.backend_buft_name(kind_of_buffer).decode()
        self._buffers = [
            g.backend_alloc_ctx_tensors_from_buft(self._contexts[0], kind_of_buffer),
            g.backend_alloc_ctx_tensors_from_buft(self._contexts[1], g.backend_dev_buffer_type(device)),
        ]
        flat = np.ascontiguousarray(packed)
        if flat.nbytes != g.nbytes(weights[0]):
            raise ValueError(f"a weight has {flat.nbytes} bytes where ggml has {g.nbytes(weights[0])}")
        for weight in weights:
            g.backend_tensor_set(weight, flat.ctypes.data, 0, flat.nbytes)
        values = a.float().contiguous()
        g.backend_tensor_set(rows, values.data_ptr(), 0, values.numel() * 4)

    def _buffer_type(self, device: int, weight: int, result: int) -> int:
        """Where the weight lies: in the first special kind of buffer whose matmul takes it, as llama.cpp chooses."""
        g, default = self._ggml, self._ggml.backend_dev_buffer_type(device)
        address = g.backend_reg_get_proc_address(g.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return default
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
        head = _TensorHead.from_address(weight)
        for index in range(64):
            if not listed[index]:
                break
            head.buffer = g.backend_buft_alloc_buffer(listed[index], 0)
            takes = g.backend_dev_supports_op(device, result)
            g.backend_buffer_free(head.buffer)
            head.buffer = None
            if takes:
                return listed[index]
        return default

    def __call__(self, index: int) -> object:
        status = self._ggml.backend_graph_compute(self._backend, self._graph)
        if status:
            raise RuntimeError(f"ggml failed with status {status}")
        return self

    def outputs(self) -> list[torch.Tensor]:
        """(m, N) results, one for each copy of the weight."""
        found = []
        for result in self._results:
            out = torch.empty(self._shape)
            self._ggml.backend_tensor_get(result, out.data_ptr(), 0, out.numel() * 4)
            found.append(out)
        return found

    def __del__(self) -> None:
        for buffer in self._buffers:
            self._ggml.backend_buffer_free(buffer)
        self._ggml.backend_free(self._backend)
        for context in self._contexts:
            self._ggml.free(context)


def ggml(kind: str) -> Peer:
    """A matmul with weights of a type of ggml's: "Q4_0", "Q4_1", "Q8_0" or "TQ2_0", the scales in float16."""
    name, found = NAME.format(kind), _TYPES[kind]

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        weight = integer_codes(workload)
        if weight is None or workload.config.with_bias:
            return Skipped(name, "serves integers")
        reason = found.refuse(weight)
        if reason:
            return Skipped(name, reason)
        library = _library()
        if isinstance(library, str):
            return Skipped(name, f"{library}: pip install 'bitblas[bench-ggml]'", missing=True)
        copies = graph_copies(weight, workload.m, budget)
        matmuls = _Matmuls(library, found, found.pack(weight).reshape(workload.config.N, -1), workload.a, copies)

        def check(result: object) -> Verdict:
            verdicts = [workload.check_within(out, LIMITS["int8"]) for out in matmuls.outputs()]
            return max(verdicts, key=lambda verdict: verdict.error)

        return Candidate(name, matmuls, check, f"int8 in blocks of {found.block}", exact=False, repeats=copies)

    return make
