"""Models whose layers are replaced by quantized ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch

from ..errors import ArgumentError, BitBLASError
from ..logs import progress
from .bitlinear import BitLinear
from .linear import Linear
from .operators import build_operators

M = TypeVar("M", bound=torch.nn.Module)

#: What is left out unless something else is said: the head of a language model, by the name that transformers gives it.
EXCLUDE = ("lm_head", "*.lm_head")


def quantize_(
    model: M,
    W_dtype: str = "uint4",
    group_size: int = 128,
    symmetric: bool | None = None,
    exclude: Sequence[str] = EXCLUDE,
    build: bool = True,
    **options: Any,
) -> M:
    """Replace the `torch.nn.Linear` layers of a model by quantized ones, in place, rounding their weights to nearest.

    Each weight is freed as its layer is replaced. Operators of equal shape are built once and shared.

    Parameters
    ----------
    model : torch.nn.Module
        The model; not itself a `torch.nn.Linear` (`Linear.from_linear` takes one).
    W_dtype, group_size, symmetric, **options
        As of `Linear.from_linear`.
    exclude : sequence of str
        Patterns, with * and ?, of the qualified names of layers that are left as they are.
    build : bool
        Whether to load or build the kernels now, instead of by the first call.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    ArgumentError
        A layer cannot be quantized so: the message names it. The layers before it are replaced already, unless it is for its
        shape, which is checked ahead of all.
    """
    places = _places(model, group_size, exclude)
    made = []
    with progress("quantizing", len(places)) as step:
        while places:
            names, layer = places.popitem()
            step(names[0])
            with _named(names[0]):
                made.append(Linear.from_linear(layer, W_dtype, group_size, symmetric, **options).train(layer.training))
            _put(model, names, made[-1])
    if build:
        build_operators(layer.bitblas_matmul for layer in made)
    return model


def ternarize_(model: M, quant_type: str = "ai8pc_wpt", eps: float = 1e-6, exclude: Sequence[str] = EXCLUDE) -> M:
    """Replace the `torch.nn.Linear` layers of a model by `BitLinear` ones that hold their parameters, to be trained, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The model; not itself a `torch.nn.Linear` (`BitLinear.from_linear` takes one).
    quant_type, eps
        As of `BitLinear`.
    exclude : sequence of str
        Patterns, with * and ?, of the qualified names of layers that are left as they are.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    ArgumentError, ConfigError
        As for `BitLinear.from_linear`; the message names the layer, and no layer is replaced.
    """
    made = {}
    for names, layer in _places(model, -1, exclude).items():
        with _named(names[0]):
            made[names] = BitLinear.from_linear(layer, quant_type, eps)
    for names, bit_linear in made.items():
        _put(model, names, bit_linear)
    return model


def deploy(model: M, build: bool = True) -> M:
    """Pack the weights of all `BitLinear` layers of a model, in place; see `BitLinear.deploy`.

    Each weight is freed as it is packed. Operators of equal shape are built once and shared.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or a layer.
    build : bool
        Whether to load or build the kernels now, instead of by the first call.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    ArgumentError
        There is no such layer, or one holds a NaN or an infinity: the message names it. Those before it are deployed.
    BuildError, ArtifactError, UnsupportedError
        As the constructor of `Matmul`.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
    if not layers:
        raise ArgumentError(f"the {type(model).__name__} has no BitLinear layer: ternarize_ makes some")
    with progress("packing", len(layers)) as step:
        for name, layer in layers.items():
            step(name)
            with _named(name):
                layer.deploy()
    if build:
        build_operators(layer.bitblas_matmul for layer in layers.values())
    return model


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors that name a layer of a model."""
    try:
        yield
    except BitBLASError as error:
        raise type(error)(f"{name}: {error}" if name else str(error)) from error


def _put(model: torch.nn.Module, names: Sequence[str], layer: torch.nn.Module) -> None:
    """Put a layer into the place of another, under all its names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _places(model: torch.nn.Module, group_size: int, exclude: Sequence[str]) -> dict[tuple[str, ...], torch.nn.Linear]:
    """The layers that are to be replaced, from the last to the first, each with all names that it has in the model."""
    if isinstance(exclude, str):
        raise ArgumentError(f"exclude is {exclude!r}; it must be a sequence of patterns")
    if isinstance(model, torch.nn.Linear):
        raise ArgumentError(
            "model is a torch.nn.Linear itself; call bitblas.Linear.from_linear or BitLinear.from_linear, which return a layer"
        )
    names: dict[torch.nn.Linear, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if type(layer) is torch.nn.Linear and not any(fnmatchcase(name, pattern) for pattern in exclude):
            names.setdefault(layer, []).append(name)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ArgumentError(f"group_size is {group_size!r}; allowed: -1 and integers of at least 1")
    for layer, found in names.items():
        if group_size != -1 and layer.in_features % group_size:
            raise ArgumentError(
                f"{found[0]} has {layer.in_features} in_features, which group_size {group_size} does not divide; leave it out "
                f"by exclude, or choose another"
            )
    return {tuple(found): layer for layer, found in reversed(names.items())}
