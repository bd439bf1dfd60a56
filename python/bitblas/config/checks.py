"""What a field of a config may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from ..errors import ConfigError
from ..formats import ALIASES

#: Magnitude that stands in for smaller ones where activations are quantized: it, and a 127th of it, are normal float32 numbers.
LEAST_EPS = 2.0**-119


def check_dtype_name(argument: str, value: object, allowed: Sequence[str]) -> str:
    """Return the canonical name of a dtype that is one of `allowed`, or raise ConfigError."""
    text = str(value).removeprefix("torch.")
    text = ALIASES.get(text, text)
    if text not in allowed:
        raise ConfigError(f"{argument} is {value!r}; allowed: {', '.join(allowed)}")
    return text


def check_size(argument: str, value: object) -> int:
    """Return an integer of at least 1, or raise ConfigError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ConfigError(f"{argument} is {value!r}; it must be an integer of at least 1")
    return int(value)


def check_flag(argument: str, value: object) -> bool:
    """Return a bool, False for None, or raise ConfigError."""
    if value is None:
        return False
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise ConfigError(f"{argument} is {value!r}; it must be True or False")
    return bool(value)


def check_eps(argument: str, value: object) -> float:
    """Return a number that may stand in for smaller magnitudes of activations, or raise ConfigError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not LEAST_EPS <= float(value) < 2.0**127:
        raise ConfigError(f"{argument} is {value!r}; it must be a number from 2^-119 to 2^127")
    return float(value)


def json_fields(config: Any) -> dict[str, object]:
    """The fields of a config that are compared, as JSON values.

    An option that is None, and is so by default, is left out: a new one leaves the keys of those who do not use it alone.
    """
    return {
        f.name: list(v) if isinstance(v, tuple) else v
        for f in fields(config)
        if f.compare
        for v in (getattr(config, f.name),)
        if v is not None or f.default is not None
    }
