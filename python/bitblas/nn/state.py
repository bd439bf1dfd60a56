"""What a layer's state is made of: layouts and dtypes that change with its device, and formats that must not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..codecs.ternary import holds_ternary
from ..codecs.weight import parse_format_tensor
from ..config import MatmulConfig
from ..errors import ArgumentError
from ..layout import PackedLayout
from ..relaying import repack

#: Dtypes that a layer may be changed to.
FLOATS = ("float16", "bfloat16", "float32")
#: Other names of the same bytes.
_BYTES = {torch.int8: (torch.uint8,)}


def packed_layout(config: MatmulConfig) -> PackedLayout:
    """The canonical layout of a config's weights."""
    return PackedLayout(config.N, config.K, config.format.bits, "packed")


def relay(weight: torch.Tensor, source: PackedLayout, target: PackedLayout) -> torch.Tensor:
    """A weight from one layout to another, exactly, in its dtype; the weight itself where the layouts are equal."""
    if source == target or weight.is_meta:
        return weight
    return repack(weight.detach(), source, target).view(weight.dtype)


def followed_dtype(config: MatmulConfig) -> torch.dtype:
    """The dtype of a layer, as `.half()` and its like change it: A's where that is a float, else the output's."""
    return getattr(torch, next((name for name in (config.A_dtype, config.out_dtype) if name in FLOATS), "float32"))


def follow_dtype(config: MatmulConfig, dtype: torch.dtype) -> MatmulConfig:
    """A layer's config after its dtype was changed.

    Raises
    ------
    ArgumentError
        There are no kernels for the dtype.
    """
    if dtype is followed_dtype(config):
        return config
    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise ArgumentError(f"the layer cannot be changed to {dtype}; allowed: {', '.join(FLOATS)}")
    followers = [field for field in ("A_dtype", "out_dtype", "W_dtype") if getattr(config, field) in FLOATS]
    return replace(config, **dict.fromkeys(followers, name))  # type: ignore[arg-type]


def check_perm(perm: torch.Tensor, k: int) -> torch.Tensor:
    """Return an order of k activations, or raise ArgumentError."""
    if perm.is_meta:
        return perm
    if perm.dtype is not torch.int32 or tuple(perm.shape) != (k,):
        raise ArgumentError(f"perm is {perm.dtype} {tuple(perm.shape)}; expected torch.int32, ({k},)")
    if not torch.equal(perm.sort().values, torch.arange(k, dtype=torch.int32, device=perm.device)):
        raise ArgumentError(f"perm is no permutation of 0 to {k - 1}")
    return perm


def cast_floats(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a dtype; raises ArgumentError where a finite value is beyond it."""
    found = tensor.to(dtype)
    if found is tensor or found.is_meta:
        return found
    lost = tensor[tensor.isfinite() & ~found.isfinite()]
    if lost.numel():
        raise ArgumentError(f"{name} holds {lost[0].item():g}, which {dtype} does not")
    return found


def check_kind(name: str, tensor: torch.Tensor, buffer: torch.Tensor) -> None:
    """Raise ArgumentError unless a tensor can stand for a buffer: a float for a float that holds it, bytes for bytes."""
    both_floats = tensor.is_floating_point() and buffer.is_floating_point()
    if not both_floats and tensor.dtype not in (buffer.dtype, *_BYTES.get(buffer.dtype, ())):
        raise ArgumentError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; this layer takes {buffer.dtype}")
    if both_floats:
        cast_floats(name, tensor.detach(), buffer.dtype)


def format_conflict(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Say what is wrong where two format tensors name different things.

    Raises
    ------
    ArgumentError
        `found` is no format tensor.
    """
    if found.is_meta:
        return None
    theirs, mine = parse_format_tensor(found.cpu()), parse_format_tensor(expected.cpu())
    return None if theirs == mine else f"format is {theirs}; this layer takes {mine}"


def ternary_conflict(config: MatmulConfig, given: Mapping[str, Any], whole: bool) -> str | None:
    """Say what is wrong where `w_packed`, `w_scale` and `bias` of a state_dict are those of another layer of ternary weights.

    `whole`: none may be missing.
    """
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    packed, n, k = tensors.get("w_packed"), config.N, config.K
    if packed is None:
        return None
    shapes = {
        "w_packed": (n, -(-k // 4)),
        "w_scale": config.scale_shape,
        **({"bias": (n,)} if config.with_bias else {}),
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found.keys() - shapes.keys() or any(
        shape != found.get(name, () if whole else shape) for name, shape in shapes.items()
    ):
        return f"w_packed is that of another layer, with {_list_shapes(found)}; this one takes {_list_shapes(shapes)}"
    if not packed.is_meta and packed.dtype in (torch.int8, torch.uint8) and not holds_ternary(packed, k):
        return f"w_packed does not hold {k} of -1, 0 and 1 in each row: it is damaged, or was of other in_features"
    return None


def _list_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def fit_tensor(name: str, tensor: torch.Tensor, buffer: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """A copy of a tensor, on a device, of the shape and dtype of the buffer that it is for.

    Raises
    ------
    ArgumentError
        There is no such buffer, the shape or kind of dtype is another, or a value is beyond the buffer's dtype.
    """
    if buffer is None:
        raise ArgumentError(f"{name} was given, and this layer was built without")
    shaped = tensor.detach()
    if shaped.dim() == 1 and tuple(buffer.shape) == (tensor.shape[0], 1):
        shaped = shaped.unsqueeze(1)
    same_bytes = buffer.dtype is torch.int8 and tensor.dtype is torch.uint8
    both_floats = buffer.is_floating_point() and tensor.is_floating_point()
    if shaped.shape != buffer.shape or not (tensor.dtype is buffer.dtype or same_bytes or both_floats):
        raise ArgumentError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {buffer.dtype} {tuple(buffer.shape)}"
        )
    if same_bytes:
        shaped = shaped.contiguous().view(torch.int8)
    if both_floats:
        cast_floats(name, shaped, buffer.dtype)
    return shaped.to(device, buffer.dtype, copy=True).contiguous()


def describe(n: int, k: int, w_dtype: str, groups: int, mode: str | None) -> str:
    """A weight in words."""
    zeros = f"zero points {mode!r}" if mode else "no zero points"
    return f"({n}, {k}) {w_dtype} in groups of {k // groups} with {zeros}"
