"""What a layer with a quantized weight does when it is moved, changed, saved, loaded or copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..codecs.weight import format_tensor
from ..config import MatmulConfig
from ..errors import ArgumentError
from ..ops import Matmul
from ..ops.bound import BoundMatmul
from .operators import shared_operator, target_of
from .state import (
    cast_floats,
    check_kind,
    check_perm,
    follow_dtype,
    followed_dtype,
    format_conflict,
    packed_layout,
    relay,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class Portable(torch.nn.Module):
    """A module around one operator, whose weight is native in memory, and packed wherever it leaves the machine.

    Its buffers are the weight, `scales`, `zeros`, `bias`, `perm` and, for quantized weights, `format`. Whatever is done to it,
    the weight lies as the operator for its device reads it.
    """

    _operator: Matmul
    #: `enable_tuning` and `dense_cache`
    _options: tuple[bool, bool]
    #: the operator with the buffers, where they have been checked
    _bound: BoundMatmul | None
    perm: torch.Tensor | None
    #: what the scales are called
    _scale_name: ClassVar[str] = "scales"

    @property
    def _floating(self) -> tuple[str, str, str]:
        """Names of the tensors that are floats, but for packed zero points, in the operator's order."""
        return self._scale_name, "zeros", "bias"

    def _choose(self, config: MatmulConfig, device: torch.device) -> None:
        self._operator = shared_operator(config, target_of(device), *self._options)
        self._bound = None

    @property
    def config(self) -> MatmulConfig:
        """The operator's config."""
        return self._operator.config

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._weight.device

    @staticmethod
    def _name_weight(config: MatmulConfig) -> str:
        """What the weight of a config is called."""
        return "weight" if config.format.is_native or config.W_dtype == config.A_dtype == "int8" else "qweight"

    @property
    def _weight_name(self) -> str:
        return self._name_weight(self.config)

    @property
    def _weight(self) -> torch.Tensor:
        return self._tensor(self._weight_name)  # type: ignore[return-value]

    def _tensor(self, name: str) -> torch.Tensor | None:
        """A buffer, or what a user has put into its place: a parameter, a parametrization."""
        return self._buffers[name] if name in self._buffers else getattr(self, name, None)

    def _put(self, name: str, tensor: torch.Tensor | None) -> None:
        """Replace what `_tensor` returns."""
        if isinstance(parameter := self._parameters.get(name), torch.nn.Parameter) and tensor is not None:
            parameter.data = tensor
        else:
            self._buffers[name] = tensor

    def _expected_format(self) -> torch.Tensor:
        config = self.config
        group = -1 if config.num_groups == 1 else config.group
        return format_tensor(config.W_dtype, group, config.zeros_mode if config.with_zeros else None)

    def _set_perm(self, perm: torch.Tensor | None) -> None:
        self._put("perm", None if perm is None else check_perm(perm, self.config.K))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.half()` and their like do: the weight is packed, moved, and laid out for where it then is."""
        old, device = self._operator, self.device
        probe = fn(torch.empty(0, dtype=followed_dtype(self.config), device=device))
        if fn(torch.empty(0, dtype=torch.int8, device=device)).dtype is not torch.int8:
            raise ArgumentError(f"all of the layer cannot be changed to {probe.dtype}: its weight is packed in bytes")
        config = follow_dtype(self.config, probe.dtype)
        moved = probe.device != device
        new = (
            shared_operator(config, target_of(probe.device), *self._options) if moved or config != self.config else old
        )
        before = {name: self._tensor(name) for name in self._floating}
        weight, buffers = self._weight.detach(), dict(self._buffers)
        try:
            if new.layout != old.layout:
                self._put(self._weight_name, relay(weight, old.layout, packed_layout(old.config)))
            super()._apply(fn, recurse)
            if new.layout != old.layout:
                self._put(self._weight_name, relay(self._weight, packed_layout(config), new.layout))
        except BaseException:  # such as a lack of memory
            self._buffers.update(buffers)
            self._put(self._weight_name, weight)
            raise
        self._operator, self._bound = new, None
        self._fit_dtypes(before)
        self._mend_format()
        return self

    def _mend_format(self) -> None:
        """Write `format` again where it is lost, as by `to_empty`."""
        found, expected = self._tensor("format"), self._expected_format()
        if found is not None and not found.is_meta and not torch.equal(found.cpu(), expected):
            self._put("format", expected.to(found.device))

    def _fit_dtypes(self, before: Mapping[str, torch.Tensor | None] | None = None, *, exact: bool = False) -> None:
        """Bring scales, zero points and bias to the dtypes that the kernels take: from `before`, where they had them.

        `exact`: ArgumentError where a value becomes infinite.
        """
        wanted = (self.config.scale_dtype, self.config.scale_dtype, self.config.bias_dtype)
        for name, dtype in zip(self._floating, (getattr(torch, name) for name in wanted), strict=True):
            tensor = self._tensor(name)
            if tensor is None or not tensor.is_floating_point() or tensor.dtype is dtype:
                continue
            had = (before or {}).get(name)
            source = had if had is not None and had.dtype is dtype and not had.is_meta else tensor
            if exact:
                cast_floats(name, source.detach(), dtype)
            self._put(name, source.detach().to(tensor.device, dtype))

    def load_packed_(self) -> Self:
        """Lay the weight out for the kernels, after something has put the packed form of it into the buffers.

        Raises
        ------
        ArgumentError
            `format` names another format, `perm` is no permutation, or the layer's dtype cannot hold a value.
        """
        found = self._tensor("format")
        conflict = format_conflict(found, self._expected_format()) if found is not None else None
        if conflict:
            raise ArgumentError(conflict)
        self._choose(self.config, self.device)
        self._fit_dtypes(exact=True)
        self._set_perm(self.perm)
        self._put(self._weight_name, relay(self._weight, packed_layout(self.config), self._operator.layout))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = prefix + self._weight_name
        destination[name] = relay(destination[name], self._operator.layout, packed_layout(self.config))

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
        given, errors = dict(state_dict), len(error_msgs)
        weight, form, perm = (given.get(prefix + name) for name in (self._weight_name, "format", "perm"))
        others = (*self._floating, "perm", "format")
        conflicts = self._conflicts({name: given.get(prefix + name) for name in (self._weight_name, *others)})
        if conflicts:
            error_msgs.extend(prefix + conflict for conflict in conflicts)
            return
        if form is None and "format" in self._buffers:  # written by another library: there is nothing to compare
            given[prefix + "format"] = self._expected_format()
        new_perm = isinstance(perm, torch.Tensor) and self.perm is None
        if isinstance(perm, torch.Tensor) and new_perm:
            self._buffers["perm"] = torch.empty_like(perm, device=self.device)
        if isinstance(weight, torch.Tensor) and weight.shape == self._weight.shape:
            assigned = local_metadata.get("assign_to_params_buffers", False)
            if assigned and weight.device != self.device:
                self._choose(self.config, weight.device)
            value = weight.detach()
            value = value.view(torch.int8) if value.dtype is torch.uint8 else value.to(self._weight.dtype)
            given[prefix + self._weight_name] = relay(value, packed_layout(self.config), self._operator.layout)
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if len(error_msgs) == errors:
            self._fit_dtypes()
            if not self._weight.is_meta:
                self._set_perm(self.perm)
        elif new_perm:
            self._set_perm(None)

    def _conflicts(self, given: Mapping[str, Any]) -> list[str]:
        """What of a state_dict would be read as something else than it is; torch compares the shapes of the rest."""
        found: list[str] = []
        for name, tensor in given.items():
            mine = self._tensor(name)
            if not isinstance(tensor, torch.Tensor):
                continue
            try:
                if name == "format" and mine is not None:
                    found += filter(None, [format_conflict(tensor, self._expected_format())])
                elif name == "perm":
                    check_perm(tensor, self.config.K)
                elif mine is not None:
                    check_kind(name, tensor, mine)
            except ArgumentError as error:
                found.append(str(error))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Packed, for other machines; without the operator."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_operator", "_bound")}
        home = "_parameters" if self._weight_name in self._parameters else "_buffers"
        packed = relay(self._weight, self._operator.layout, packed_layout(self.config))
        if home == "_parameters":
            packed = torch.nn.Parameter(packed, requires_grad=False)
        state[home] = {**state[home], self._weight_name: packed}
        state["_config"] = self.config
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        config = state.pop("_config")
        super().__setstate__(state)
        tensor = self._tensor(self._name_weight(config))
        assert tensor is not None
        self._choose(config, tensor.device)
        self._put(self._weight_name, relay(tensor, packed_layout(config), self._operator.layout))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        shared = {"_operator": self._operator, "_bound": None}
        copied.__dict__.update({k: shared[k] if k in shared else deepcopy(v, memo) for k, v in self.__dict__.items()})
        return copied
