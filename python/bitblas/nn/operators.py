"""Operators that layers share: one for each config and target, found by the device that a layer's tensors are on."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch

from .. import env
from ..config import MatmulConfig
from ..errors import UnsupportedError
from ..locks import ForkLock
from ..logs import progress
from ..ops import Matmul
from ..target import Target, device_target, host_target, resolve_target

_shared: WeakValueDictionary[tuple[object, ...], Matmul] = WeakValueDictionary()
_lock = ForkLock()


def target_of(device: torch.device) -> Target:
    """What to compile for where tensors are on a device: BITBLAS_TARGET where it is of that kind, else what is there.

    The device meta has no target of its own: it gets that of an operator which names none.

    Raises
    ------
    UnsupportedError
        There are no kernels for the device.
    """
    if device.type == "meta":
        return resolve_target(None)
    kind = {"cpu": "llvm", "cuda": "cuda"}.get(device.type)
    if kind is None:
        raise UnsupportedError(f"tensors are on device {device}; there are kernels for cpu and cuda")
    if env.TARGET.get() not in ("", "auto"):
        chosen = resolve_target(None)
        if chosen.kind == kind:
            return chosen
    found = host_target() if kind == "llvm" else device_target(device.index)
    if found is None:
        raise UnsupportedError(f"tensors are on device {device}, of which torch says nothing")
    return found


def shared_operator(config: MatmulConfig, target: Target, enable_tuning: bool, dense_cache: bool) -> Matmul:
    """The operator that all layers with these share, planned and not built: the first call loads or builds its kernels."""
    key = (config, target, enable_tuning, dense_cache)
    with _lock.held():
        op = _shared.get(key)
        if op is None:
            op = _shared[key] = Matmul(
                config, target=target, enable_tuning=enable_tuning, from_database=True, dense_cache=dense_cache
            )
        return op


def build_operators(operators: Iterable[Matmul]) -> None:
    """Load or build the kernels of operators, each once, with a progress bar; those of a model take seconds when it is new.

    Raises
    ------
    BuildError, ArtifactError, UnsupportedError
        As the constructor of `Matmul`.
    """
    missing = list({id(op): op for op in operators if op.provided is None}.values())
    with progress("building operators", len(missing)) as step:
        for op in missing:
            step(f"{op.config.N} x {op.config.K} {op.config.W_dtype}")
            op.build()
