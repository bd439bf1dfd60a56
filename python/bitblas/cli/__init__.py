"""The `bitblas` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import BitBLASError
from . import bench, cache, info, repack, tune, unpack


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 where it was asked for something impossible, 130 when interrupted."""
    options = _parser().parse_args(argv)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BitBLASError as error:
        print(f"bitblas: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `bitblas info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bitblas", description="Mixed-precision matrix multiplication for PyTorch.")
    parser.add_argument("--version", action="version", version=f"bitblas {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    info.add_command(commands)
    bench.add_command(commands)
    tune.add_command(commands)
    cache.add_command(commands)
    repack.add_command(commands)
    unpack.add_command(commands)
    return parser
