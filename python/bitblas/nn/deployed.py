"""What has parameters in training, and packed buffers and an operator when it is deployed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from typing import TYPE_CHECKING, Any

import torch

from ..config import MatmulConfig
from ..errors import ArgumentError
from .layer import QuantizedLayer
from .portable import Portable
from .state import ternary_conflict

if TYPE_CHECKING:
    from typing_extensions import Self


class DeployedLayer(QuantizedLayer):
    """A layer that is moved, saved and loaded as any module in training, and as a quantized one when it is deployed."""

    #: what the kernels are asked, with the dtype that the layer was made with
    _asked: MatmulConfig

    @property
    def deployed(self) -> bool:
        """Whether the weights are packed, and there is nothing to be trained any more."""
        return self._operator is not None

    def _begin_training(self) -> None:
        """Become a layer without an operator."""
        self._operator = None  # type: ignore[assignment]  # there is one from `deploy` on
        self._bound = None
        self.register_forward_pre_hook(_call_forward)

    def _end_training(self) -> None:
        """Leave out what only a layer in training has."""
        for name in ("weight", "bias"):
            self._parameters.pop(name, None)
        for key in [key for key, hook in self._forward_pre_hooks.items() if hook is _call_forward]:
            del self._forward_pre_hooks[key]

    def _allocate(self, device: torch.device) -> None:
        """Become a deployed layer, with buffers of zeros."""
        raise NotImplementedError

    @contextmanager
    def _or_as_it_was(self) -> Iterator[None]:
        """Where something fails, the layer is what it was."""
        parameters, buffers = dict(self._parameters), dict(self._buffers)
        operator, bound, hooks = self._operator, self._bound, dict(self._forward_pre_hooks)
        try:
            yield
        except BaseException:  # such as a lack of memory
            self._parameters.clear()
            self._parameters.update(parameters)
            self._buffers.clear()
            self._buffers.update(buffers)
            self._operator, self._bound = operator, bound
            self._forward_pre_hooks.update(hooks)
            raise

    def load_packed_(self) -> Self:
        """See `Linear.load_packed_`; ArgumentError of a layer in training."""
        self._check_deployed()
        return super().load_packed_()

    def warmup(self, topk: int = 20) -> None:
        """See `Linear.warmup`; ArgumentError of a layer in training."""
        self._check_deployed()
        super().warmup(topk)

    def _check_deployed(self) -> None:
        if not self.deployed:
            raise ArgumentError("the layer is in training; deploy() packs its weight")

    # -- moved, saved, loaded: as any module in training -------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self.deployed:
            return super()._apply(fn, recurse)
        return torch.nn.Module._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        save = super()._save_to_state_dict if self.deployed else super(Portable, self)._save_to_state_dict
        save(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.deployed and prefix + "weight" in state_dict and prefix + "w_packed" not in state_dict:
            error_msgs.append(
                f"{prefix}weight is that of a layer in training, and this layer is deployed: load it into a new BitLinear, and "
                f"deploy that"
            )
            return
        given = {name: state_dict.get(prefix + name) for name in ("w_packed", "w_scale", "bias")}
        conflict = ternary_conflict(self._asked, given, whole=not self.deployed)
        if conflict:
            error_msgs.append(f"{prefix}{conflict}")
            return
        if self.deployed or given["w_packed"] is None:
            load = super()._load_from_state_dict if self.deployed else super(Portable, self)._load_from_state_dict
            load(state_dict, prefix, *rest)
            return
        errors = len(error_msgs)
        with suppress(_RefusedError), self._or_as_it_was():
            self._allocate(self.device)
            super()._load_from_state_dict(state_dict, prefix, *rest)
            if len(error_msgs) > errors:
                raise _RefusedError

    def __getstate__(self) -> dict[str, Any]:
        if self.deployed:
            return super().__getstate__()
        # a shallow copy has dicts of its own, so that it can be deployed
        own = ("_parameters", "_buffers", "_forward_pre_hooks")
        return {name: copy(value) if name in own else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_config" in state:
            super().__setstate__(state)
        else:
            torch.nn.Module.__setstate__(self, state)


class _RefusedError(Exception):
    """What was to be loaded does not fit; the messages say why."""


def _call_forward(layer: torch.nn.Module, inputs: object) -> None:
    """A hook of layers in training: torch's transformer layers do not call those without, but read their weights."""
