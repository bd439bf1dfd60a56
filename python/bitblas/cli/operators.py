"""The options that say which operator is meant, and the config that they give."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..config import (
    A_DTYPES,
    ATTENTION_DTYPES,
    ATTENTION_LAYOUTS,
    OUT_DTYPES,
    ZEROS_MODES,
    Config,
    FlashAttenConfig,
    MatmulConfig,
)
from ..errors import ArgumentError
from ..formats import FORMATS, parse_format

#: What only one kind of operator has; --out-dtype is of both.
_OF_MATMULS = ("M", "N", "K", "A_dtype", "W_dtype", "group_size", "zeros", "no_scale")
_DTYPES, _SIZES = ("dtype", "Q_dtype", "K_dtype", "V_dtype"), ("dim_v", "seq_len", "heads", "heads_kv")
_OF_ATTENTIONS = (*_DTYPES, *_SIZES, "k_layout", "causal", "softmax_scale")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    with suppress(ValueError):
        value = int(text)
        if value >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be a whole number of at least 1")


def _finite(text: str) -> float:
    with suppress(ValueError):
        value = float(text)
        if math.isfinite(value):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be a finite number")


def add_matmul_options(parser: Any, rows: str, size: str = " (4096)") -> None:
    """Add what says which matmul is meant; `rows` and `size` are what its help says of those that are not given."""
    parser.add_argument("--M", type=positive, nargs="+", metavar="M", help=f"rows ({rows})")
    parser.add_argument("--N", type=positive, help=f"output features{size}")
    parser.add_argument("--K", type=positive, help=f"input features{size}")
    parser.add_argument("--A-dtype", help=f"{', '.join(A_DTYPES)} (float16)")
    parser.add_argument("--W-dtype", help=f"{', '.join(FORMATS)} (uint4)")
    parser.add_argument(
        "--out-dtype",
        help=f"{', '.join(OUT_DTYPES)} (A's; for an A of 8 bits and less int32 without scales, else float32)",
    )
    parser.add_argument("--group-size", type=int, help="k that share a scale (128 where it divides K, else -1: all)")
    parser.add_argument("--zeros", choices=("none", *ZEROS_MODES), help="kind of zero points (none)")
    parser.add_argument("--no-scale", action="store_true", default=None, help="without scales")


def add_attention_options(parser: Any) -> None:
    """Add what says which attention is meant, in a group of its own, beside the options of matmuls."""
    group = parser.add_argument_group(
        "an attention", "instead of a matmul; --out-dtype is of both, and here one of --dtype's (--dtype)"
    )
    group.add_argument("--attention", type=positive, metavar="DIM", help="elements of a head of Q and K")
    group.add_argument("--dim-v", type=positive, metavar="DIM", help="elements of a head of V (those of Q and K)")
    group.add_argument("--dtype", choices=ATTENTION_DTYPES, help="of Q, K, V and the output (float16)")
    for name in "QKV":
        group.add_argument(f"--{name}-dtype", choices=ATTENTION_DTYPES, help=f"of {name} (--dtype)")
    group.add_argument("--k-layout", choices=ATTENTION_LAYOUTS, help="how K lies (nnn)")
    group.add_argument("--causal", action="store_true", default=None, help="queries see no later keys")
    group.add_argument("--seq-len", type=positive, metavar="L", help="queries of a head (any)")
    group.add_argument("--heads", type=positive, metavar="H", help="heads of Q (any)")
    group.add_argument("--heads-kv", type=positive, metavar="H", help="heads of K and V (those of Q)")
    group.add_argument("--softmax-scale", type=_finite, metavar="S", help="what scores are multiplied by (1/√DIM)")


def matmul_of(options: argparse.Namespace, rows: Sequence[int] | None = None) -> MatmulConfig:
    """The matmul that is meant, for `rows` where none are given: None leaves them open."""
    N, K = options.N or 4096, options.K or 4096
    a_dtype, fmt = options.A_dtype or "float16", parse_format(options.W_dtype or "uint4")
    scaling = not options.no_scale and not fmt.is_native
    zeros = options.zeros or "none"
    out_dtype = options.out_dtype
    if out_dtype is None:
        integers = a_dtype in ("int8", "int4") and fmt.is_integer and not scaling
        out_dtype = a_dtype if a_dtype in OUT_DTYPES[:3] else "int32" if integers else "float32"
    group = options.group_size
    if group is None:
        group = 128 if K % 128 == 0 and (scaling or zeros != "none") else -1
    rows = options.M or rows
    return MatmulConfig(
        M=None if rows is None else tuple(rows),
        N=N,
        K=K,
        A_dtype=a_dtype,
        W_dtype=options.W_dtype or "uint4",
        out_dtype=out_dtype,
        accum_dtype="int32" if out_dtype == "int32" else "float32",
        group_size=group,
        with_scaling=scaling,
        with_zeros=zeros != "none",
        zeros_mode="original" if zeros == "none" else zeros,
    )


def attention_of(options: argparse.Namespace) -> FlashAttenConfig | None:
    """The attention that is meant; None where none is.

    Raises
    ------
    ArgumentError
        There are options of attentions without --attention, or those of matmuls with it.
    ConfigError
        There is no such attention.
    """
    if options.attention is None:
        if given := _given(options, _OF_ATTENTIONS):
            raise ArgumentError(f"{given} is of attentions: give --attention DIM as well")
        return None
    if given := _given(options, _OF_MATMULS):
        raise ArgumentError(f"{given} is of matmuls, --attention of attentions: give one of them")
    dtype = options.dtype or "float16"
    return FlashAttenConfig(
        heads=options.heads,
        seq_len=options.seq_len,
        dim=options.attention,
        Q_dtype=options.Q_dtype or dtype,
        K_dtype=options.K_dtype or dtype,
        V_dtype=options.V_dtype or dtype,
        Out_dtype=options.out_dtype or dtype,
        layout=options.k_layout or "nnn",
        is_causal=bool(options.causal),
        heads_kv=options.heads_kv,
        seq_len_kv=None,
        dim_v=options.dim_v,
        softmax_scale=options.softmax_scale,
    )


def operator_of(options: argparse.Namespace) -> Config:
    """The operator that is meant: `attention_of`, else `matmul_of`."""
    return attention_of(options) or matmul_of(options)


def check_no_matmul(options: argparse.Namespace, but: Sequence[str], what: str) -> None:
    """Raise an ArgumentError where an option of matmuls, or of what they give, stands beside `what`, `but` for some."""
    if given := _given(options, [name for name in (*_OF_MATMULS, "out_dtype") if name not in but]):
        raise ArgumentError(f"{given} is of one operator, which {what} does not take")


def _given(options: argparse.Namespace, names: Sequence[str]) -> str | None:
    """The first of these options that is given, as it is written."""
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None), None)
