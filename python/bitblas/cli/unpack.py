"""`bitblas unpack`: one of our folders back to a dense one."""

from __future__ import annotations

import argparse
from typing import Any

from .repack import add_folders, print_summary


def add_command(commands: Any) -> None:
    """Add the verb to a parser's commands."""
    unpack = commands.add_parser(
        "unpack",
        help="make a dense folder of one of ours",
        description="SRC is a folder that `bitblas repack` made. Only "
        "weights are kept: where activations were quantized, as in BitNet, those of the dense model are not.",
    )
    add_folders(unpack)
    unpack.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the weights (float16)"
    )
    unpack.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Unpack and print what was done."""
    from ..checkpoints import unpack

    print_summary(unpack(options.src, options.dst, dtype=options.dtype, verify=not options.no_verify), options)
    return 0
