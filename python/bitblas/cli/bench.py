"""`bitblas bench`: an operator timed beside torch's dense matmul."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import MatmulConfig
from ..errors import ArgumentError
from ..logs import tracked
from .operators import add_matmul_options, matmul_of, positive

if TYPE_CHECKING:
    from ..bench import Comparison, Machine
    from ..ops import Matmul

#: The rows that are timed where none are given.
_ROWS = (1, 16, 128)


def add_command(commands: Any) -> None:
    """Add the verb to a parser's commands."""
    bench = commands.add_parser("bench", help="time an operator beside torch's dense matmul")
    add_matmul_options(bench, " ".join(map(str, _ROWS)))
    bench.add_argument("--threads", type=positive, help="threads (torch's number)")
    bench.add_argument("--target", help="what to compile for (BITBLAS_TARGET, else this machine)")
    bench.add_argument("--seconds", type=seconds_of, default=0.5, help="time for each candidate (0.5)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=run)


def seconds_of(text: str) -> float:
    """Seconds, up to an hour."""
    value = float(text)
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be between 0 and 3600")
    return value


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 where a result is wrong."""
    config = matmul_of(options, _ROWS)
    import torch

    from .. import bench
    from ..ops import Matmul

    op = Matmul(config, target=options.target)
    if op.target.kind == "cuda":
        return _run_on_card(options, op)
    peers: list[bench.Peer] = [bench.torch_dense(torch.float32)]
    if config.A_dtype in ("float16", "bfloat16"):
        peers.append(bench.torch_dense(getattr(torch, config.A_dtype)))
    if config.A_dtype == "int8":
        peers.append(bench.torch_int_mm)
    with bench.use_threads(options.threads) as threads:
        machine = bench.measure_machine(threads)
        numbers = tracked(sorted(set(options.M)), "measuring")
        rows = [bench.compare(op, m, peers, options.seconds) for m in numbers]
    if options.json:
        print(json.dumps({"machine": machine.fields(), "results": [row.fields(machine) for row in rows]}, indent=1))
    else:
        _print_bench(config, op.origin, machine, rows)
    return _status(rows)


def _run_on_card(options: argparse.Namespace, op: Matmul) -> int:
    """The same on a card, beside torch's products there."""
    import torch

    from ..bench import card
    from ..cards import CardClock, device_of

    if options.threads is not None:
        raise ArgumentError("--threads is of CPUs; leave it out for a card")
    device = device_of(op.target)
    stopwatch = CardClock(device)
    machine = card.measure_card(stopwatch, device)
    names = [op.config.A_dtype] if op.config.A_dtype in ("bfloat16", "float32") else ["float16"]
    peers = [card.dense_on_card(getattr(torch, name), machine.l2_bytes) for name in names]
    numbers = tracked(sorted(set(options.M)), "measuring")
    rows = [card.compare_on_card(op, m, peers, stopwatch, machine, device, options.seconds) for m in numbers]
    if options.json:
        print(json.dumps({"machine": machine.fields(), "results": [row.fields() for row in rows]}, indent=1))
    else:
        _print_head(op.config, op.origin)
        print(f"{machine.name}, compute capability {machine.capability}, CUDA {machine.cuda}")
        peaks = [f"{2 * rate / 1e12:.0f} TFLOP/s of {name}" for name, rate in machine.peaks.items()]
        print(", ".join([f"measured: {(machine.bandwidth or 0) / 1e9:.0f} GB/s copied", *peaks]))
        _print_table(rows, {"of what binds": _bound}, machine.notes)
    return _status(rows)


def _bound(row: Comparison) -> float | None:
    found = row.roofline()
    return None if found is None else found[1]


def _status(rows: Sequence[Comparison]) -> int:
    """1 where a result of ours is wrong."""
    wrong = [timing for row in rows for timing in row.timings[:1] if timing.seconds is None]
    if wrong:
        print(f"bitblas: error: wrong results, off by {wrong[0].error:.3g} of their size", file=sys.stderr)
    return 1 if wrong else 0


def _print_bench(config: MatmulConfig, origin: str, machine: Machine, rows: Sequence[Comparison]) -> None:
    _print_head(config, origin)
    print(f"{machine.cpu}, {machine.isa}, {machine.threads} threads")
    if machine.bandwidth and machine.fma:
        print(f"measured: {machine.bandwidth / 1e9:.1f} GB/s read, {machine.fma / 1e9:.0f} G float32 FMA/s")
    shares = {
        "of bandwidth": lambda row: row.bandwidth_fraction(machine),
        "of FMA peak": lambda row: row.fma_fraction(machine),
    }
    _print_table(rows, shares, machine.notes)


def _print_head(config: MatmulConfig, origin: str) -> None:
    group = "" if config.group_size == -1 else f", groups of {config.group_size}"
    zeros = f", {config.zeros_mode} zeros" if config.with_zeros else ""
    print(
        f"{config.A_dtype} x {config.W_dtype} -> {config.out_dtype}, N={config.N}, K={config.K}{group}{zeros}; {origin}"
    )


def _print_table(
    rows: Sequence[Comparison], shares: Mapping[str, Callable[[Comparison], float | None]], notes: Sequence[str]
) -> None:
    """Times, parts of what the machine can do, and peers: a line for each number of rows."""
    for note in notes:
        print(f"note: {note}")
    print()
    header = ["M", "bitblas us", *shares]
    header += [text for timing in rows[0].timings[1:] for text in (f"{timing.name} us", "times ours")]
    table = [header, *(_bench_row(row, [share(row) for share in shares.values()]) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    for line in table:
        print("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)))
    for peer in rows[0].skipped:
        print(f"skipped: {peer.name}: {peer.reason}")


def _bench_row(row: Comparison, shares: Sequence[float | None]) -> list[str]:
    def microseconds(seconds: float | None) -> str:
        return "wrong" if seconds is None else f"{seconds * 1e6:.1f}"

    def share(value: float | None, sign: str = "{:.0%}") -> str:
        return "-" if value is None else sign.format(value)

    cells = [str(row.m), microseconds(row.ours.seconds), *map(share, shares)]
    for timing in row.timings[1:]:
        cells += [microseconds(timing.seconds), share(row.speedup(timing.name), "{:.2f}")]
    return cells
