"""`bitblas tune`: the tilings of an operator raced, here or on another machine, and the record kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DEFAULT_BUCKETS, Config, MatmulConfig
from ..errors import ArgumentError
from .bench import seconds_of
from .operators import add_attention_options, add_matmul_options, operator_of, positive

if TYPE_CHECKING:
    from ..schedule import Tiling
    from ..target import Target
    from ..tuner.search import Tuned


def add_command(commands: Any) -> None:
    """Add the verb to a parser's commands."""
    tune = commands.add_parser("tune", help="choose the fastest tilings of an operator, and remember them")
    add_matmul_options(tune, " ".join(map(str, DEFAULT_BUCKETS)))
    tune.add_argument("--topk", type=positive, default=20, help="tilings of a bucket to try at most (20)")
    tune.add_argument("--seconds", type=_some_seconds, default=None, help="time to take, about (25)")
    tune.add_argument("--serial", action="store_true", help="build one candidate at a time")
    tune.add_argument("--threads", type=positive, help="threads (torch's number)")
    tune.add_argument("--target", help="what to compile for (BITBLAS_TARGET, else this machine)")
    tune.add_argument("--rpc", metavar="HOST:PORT", help="measure on a machine of this TVM tracker")
    tune.add_argument("--key", help="the key that the machine serves there")
    tune.add_argument("--out", type=Path, metavar="FILE", help="write the record to a file, in JSON")
    add_attention_options(tune)
    tune.set_defaults(run=run)


def _some_seconds(text: str) -> float:
    value = seconds_of(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be above 0")
    return value


def run(options: argparse.Namespace) -> int:
    """Tune and print; 130 where Ctrl-C ended it early and something was found."""
    config = operator_of(options)
    from ..target import resolve_target

    target = resolve_target(options.target)
    if (options.rpc is None) != (options.key is None):
        raise ArgumentError("--rpc and --key go together: a tracker, and the key of the machine to measure on")
    if options.rpc is not None and options.threads is not None:
        raise ArgumentError("--threads is of this machine; set OMP_NUM_THREADS for the server that serves --key")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ArgumentError(f"--out is {options.out}: {options.out.absolute().parent} is no directory")
    tuned, record = _tune(options, config, target)
    if options.out is not None:
        try:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ArgumentError(f"--out is {options.out}, which cannot be written: {error}") from error
    _print_tuned(config, target, tuned, record)
    return 130 if tuned.interrupted else 0


def _tune(options: argparse.Namespace, config: Config, target: Target) -> tuple[Tuned, dict[str, Any]]:
    from ..bench import use_threads
    from ..tuner import SECONDS
    from ..tuner.runs import tune_here, tune_there

    seconds = SECONDS if options.seconds is None else options.seconds
    if options.rpc is not None:
        return tune_there(config, target, options.rpc, options.key, options.topk, seconds)
    with use_threads(options.threads):
        return tune_here(config, target, options.topk, seconds, not options.serial)


def _print_tuned(config: Config, target: Target, tuned: Tuned, record: dict[str, Any]) -> None:
    from ..tuner.record import record_path

    machine = record["machine"]
    where = "" if machine["name"] == "here" else f", measured on {machine['name']}"
    print(f"{config.describe()}; {target}")
    print(f"{machine.get('card', {}).get('name') or machine['cpu']}{where}; {tuned.seconds:.1f} s")
    print()
    rows = "M" if isinstance(config, MatmulConfig) else "rows"
    table = [[rows, "default us", "tuned us", "times as fast", "tried", "lost", "tiling"]]
    for m in config.buckets:
        row = tuned.buckets.get(m)
        if row is None:
            table.append([str(m), *["-"] * 5, "not reached"])
            continue
        times = [row.time_of(row.default), row.time_of(row.tiling)]
        shown = ["-" if seconds is None else f"{seconds * 1e6:.1f}" for seconds in times]
        tiling = "default" if row.tiling == row.default else _difference(row.tiling, row.default)
        table.append([str(m), *shown, f"{row.gain:.2f}", str(len(row.seconds)), str(len(row.lost)), tiling])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]) - 1)]
    for *cells, last in table:
        print("  ".join([*(f"{text:>{width}}" for text, width in zip(cells, widths, strict=True)), last]))
    print()
    print(f"kept in {record_path(config, target)}")
    for m, row in tuned.buckets.items():
        for lost, error in row.lost:
            print(f"lost for {rows}={m}: {_difference(lost, row.default) or 'the default'}: {error.splitlines()[0]}")


def _difference(tiling: Tiling, default: Tiling | None) -> str:
    """The fields of a tiling that are not those of the default."""
    other = {} if default is None else default.fields()
    return " ".join(f"{name}={value}" for name, value in tiling.fields().items() if other.get(name) != value)
