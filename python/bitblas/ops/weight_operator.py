"""What the small operators on weights share: their constructor, the checks of a call and of a config, and a timer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch

from ..errors import ArgumentError, ConfigError, UnsupportedError
from ..formats import parse_format
from ..target import resolve_target
from .arguments import check_dense
from .operator import BACKENDS

ConfigT = TypeVar("ConfigT")

INTEGERS = (
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
)  # fmt: skip
_TIMED_CALLS = 5


class WeightOperator(Generic[ConfigT]):
    """An operator that rearranges a weight, with torch, on the device on which the weight lies.

    Parameters
    ----------
    config : object
        What is asked, of the operator's own config class.
    name : str, optional
        A name for messages.
    target : None, str, dict, Target, or tvm.target.Target
        Checked as that of `bitblas.Matmul`, without effect: nothing is compiled.
    enable_tuning, from_database : bool
        Accepted: there is nothing to tune or to load.
    backend : str
        ``"tl"`` or ``"tir"``: accepted for compatibility, both mean the same.

    Raises
    ------
    ConfigError
        The config is of another class, or the backend or target unknown.
    """

    #: The class of `config`, and the default of `name`.
    config_class: ClassVar[type]
    default_name: ClassVar[str] = "permutate"

    def __init__(
        self,
        config: ConfigT,
        name: str | None = None,
        target: object = "llvm",
        enable_tuning: bool = False,
        from_database: bool = False,
        backend: str = "tir",
    ) -> None:
        if not isinstance(config, self.config_class):
            raise ConfigError(f"config is {config!r}; it must be a {self.config_class.__name__}")
        check_choice("backend", backend, BACKENDS)
        self.config: ConfigT = config
        self.name = self.default_name if name is None else name
        self.backend = backend
        try:
            self.target: object = resolve_target(target)
        except UnsupportedError:  # a machine that kernels are not built for; torch may run there all the same
            self.target = target

    def forward(self, inp: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rearrange a weight.

        Parameters
        ----------
        inp : torch.Tensor
            Any strides, on any device; the class says which shape and dtype.
        out : torch.Tensor, optional
            As many bytes as the result, contiguous, on the device of `inp`; filled.

        Returns
        -------
        torch.Tensor
            `out`, or a view of it in the result's shape and dtype; else a new tensor on the device of `inp`.

        Raises
        ------
        ArgumentError
            A tensor of the wrong kind, shape, dtype, device or value.
        """
        check_dense("inp", inp)
        _check_dtype("inp", inp, self._input_dtypes())
        self._check_shape(inp)
        result = self._compute(inp.detach().resolve_neg())
        return result if out is None else self._fill(out, result)

    __call__ = forward

    def profile_latency(self, dynamic_symbolic_constraints: dict[str, int] | None = None) -> float:
        """Median milliseconds of a call on the CPU; there are no dynamic shapes to constrain."""
        inp = torch.zeros(self._input_shape(), dtype=self._input_dtypes()[0], device="cpu")
        seconds = []
        for _ in range(_TIMED_CALLS):
            began = time.perf_counter()
            self.forward(inp)
            seconds.append(time.perf_counter() - began)
        return float(np.median(seconds)) * 1e3

    def _input_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _input_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes in which an input may come, the usual one first."""
        raise NotImplementedError

    def _output_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that an output which is given may have."""
        raise NotImplementedError

    def _check_shape(self, inp: torch.Tensor) -> None:
        shape = self._input_shape()
        if inp.shape != shape:
            raise ArgumentError(f"inp has shape {tuple(inp.shape)}; expected {shape}")

    def _compute(self, inp: torch.Tensor) -> torch.Tensor:
        """The result, contiguous and with memory of its own."""
        raise NotImplementedError

    def _fill(self, out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        check_dense("out", out)
        _check_dtype("out", out, self._output_dtypes())
        if out.nbytes != result.nbytes:
            raise ArgumentError(
                f"out has shape {tuple(out.shape)} and {out.nbytes} bytes; expected {tuple(result.shape)}, "
                f"{result.nbytes} bytes"
            )
        if not out.is_contiguous():
            raise ArgumentError(f"out has strides {out.stride()}; it must be contiguous")
        if out.device != result.device:
            raise ArgumentError(f"out is on device {out.device}; inp is on {result.device}")
        as_bytes(out.detach()).copy_(as_bytes(result))
        same = out.shape == result.shape and out.dtype is result.dtype
        return out if same else as_bytes(out).view(result.dtype).view(result.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, flat, as uint8."""
    return tensor.view(-1).view(torch.uint8)


def alike(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """`dtype` and, for an integer, the other one of its size: tensors of both hold the same bytes."""
    if dtype not in INTEGERS:
        return (dtype,)
    return dtype, *(other for other in INTEGERS if other.itemsize == dtype.itemsize and other is not dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name that a config's check let through."""
    return getattr(torch, name) if hasattr(torch, name) else getattr(torch, parse_format(name).torch_name)


def check_choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ConfigError unless `value` is one of a few."""
    if isinstance(value, bool) or value not in allowed:
        raise ConfigError(f"{argument} is {value!r}; allowed: {', '.join(str(a) for a in allowed)}")


def _check_dtype(argument: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise ArgumentError(f"{argument} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")
