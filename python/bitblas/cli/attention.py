"""The options that say which attention is meant."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import ATTENTION_DTYPES, ATTENTION_LAYOUTS, FlashAttenConfig
from ..errors import ArgumentError
from .bench import positive

_OTHERS = ("dim_v", "dtype", "k_layout", "causal")


def add_attention_options(parser: Any) -> None:
    """Add them, in a group of their own."""
    group = parser.add_argument_group("an attention", "instead of a matmul; its kernels are for any heads and lengths")
    group.add_argument("--attention", type=positive, metavar="DIM", help="elements of a head of Q and K")
    group.add_argument("--dim-v", type=positive, metavar="DIM", help="elements of a head of V (those of Q and K)")
    group.add_argument("--dtype", choices=ATTENTION_DTYPES, help="of Q, K, V and the output (float16)")
    group.add_argument("--k-layout", choices=ATTENTION_LAYOUTS, help="how K lies (nnn)")
    group.add_argument("--causal", action="store_true", default=None, help="queries see no later keys")


def attention_of(options: argparse.Namespace) -> FlashAttenConfig | None:
    """The attention that is meant, for any number of rows; None where a matmul is."""
    if options.attention is None:
        given = [f"--{name.replace('_', '-')}" for name in _OTHERS if getattr(options, name) is not None]
        if given:
            raise ArgumentError(f"{given[0]} is of attentions: give --attention DIM as well")
        return None
    if options.M is not None:
        raise ArgumentError("--M is of matmuls: kernels of an attention are for any number of rows")
    dtype = options.dtype or "float16"
    return FlashAttenConfig(
        dim=options.attention,
        layout=options.k_layout or "nnn",
        is_causal=bool(options.causal),
        dim_v=options.dim_v,
        Q_dtype=dtype,
        K_dtype=dtype,
        V_dtype=dtype,
        Out_dtype=dtype,
    )
