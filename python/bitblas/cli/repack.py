"""`bitblas repack`: a folder of a model into ours."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..checkpoints import Summary


def add_command(commands: Any) -> None:
    """Add the verb to a parser's commands."""
    repack = commands.add_parser(
        "repack",
        help="make one of our folders of a quantized or a dense model",
        description="SRC is a Hugging Face folder with safetensors files: quantized by GPTQ, AWQ or compressed-tensors "
        "(pack-quantized), of BitNet-b1.58 (packed by transformers, or with the float weights of its training, which are "
        "rounded to -1, 0 and 1), or dense, whose linear layers are then rounded to --format.",
    )
    add_folders(repack)
    repack.add_argument("--format", dest="W_dtype", metavar="FORMAT", help="dense SRC: what to round to, such as uint4")
    repack.add_argument(
        "--group-size", type=int, metavar="G", help="dense SRC: columns that share a scale; -1: all (128)"
    )
    kind = repack.add_mutually_exclusive_group()
    kind.add_argument("--symmetric", action="store_true", default=None, help="dense SRC: without zero points")
    kind.add_argument("--asymmetric", dest="symmetric", action="store_false", help="dense SRC: with zero points")
    repack.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="dense SRC: layers that stay dense, as *.mlp.*",
    )
    repack.set_defaults(run=run)


def add_folders(parser: Any) -> None:
    """Add what `repack` and `unpack` share."""
    parser.add_argument("src", type=Path, metavar="SRC", help="the folder of the model")
    parser.add_argument("dst", type=Path, metavar="DST", help="a new or empty folder, or an unfinished one to continue")
    parser.add_argument("--no-verify", action="store_true", help="do not compare each layer with its source")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Repack and print what was done."""
    from ..checkpoints import repack

    if options.W_dtype is None and (options.group_size is not None or options.symmetric is not None):
        raise ArgumentError("--group-size and --symmetric are for a dense SRC: name a --format")
    summary = repack(
        options.src,
        options.dst,
        W_dtype=options.W_dtype,
        group_size=128 if options.group_size is None else options.group_size,
        symmetric=options.symmetric,
        exclude=options.exclude,
        verify=not options.no_verify,
    )
    print_summary(summary, options)
    return 0


def print_summary(summary: Summary, options: argparse.Namespace) -> None:
    """What was done, as a line or in JSON."""
    if options.json:
        more = {"mb_per_second": summary.mb_per_second, "peak_memory_bytes": _peak_memory()}
        print(json.dumps({**asdict(summary), **more}, indent=1))
        return
    formats = ", ".join(f"{count} {name}" for name, count in summary.formats.items())
    checked = "verified" if summary.verified else "not verified"
    print(
        f"{options.dst}: {summary.layers} layers ({formats}), {summary.bytes_in / 1e6:.1f} MB -> "
        f"{summary.bytes_out / 1e6:.1f} MB in {summary.seconds:.1f} s, {summary.mb_per_second:.0f} MB/s, {checked}"
    )


def _peak_memory() -> int:
    """The most memory that this process had, pages of mapped files included, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
