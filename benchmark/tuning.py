"""`python -m benchmark.tuning`: how far the default tilings are from the tuned ones, over every cell."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitblas import tuner
from bitblas.target import resolve_target

from .cases import ROWS, SHAPES, Case, case, uint4

#: How many times as long as the tuned a default may take, and in which part of the cells.
ALLOWED, PART = 1.10, 0.90


def cells() -> list[Case]:
    """The four kinds of every cell, at four shapes."""
    found = []
    for shape in SHAPES:
        found += [uint4("float16", shape, ROWS), case("float16", "uint2", shape, ROWS)]
        found += [case("int8", name, shape, ROWS) for name in ("int4", "int2")]
    return found


def key(one: Case) -> str:
    """What a case is called in the results."""
    return f"{one.name}, {one.shape[0]} x {one.shape[1]}"


def measure(one: Case, seconds: float) -> dict[str, Any]:
    """The record of a case, as JSON values."""
    _, record = tuner.tune_here(one.config, resolve_target(one.target), seconds=seconds)
    return record


def gains(record: dict[str, Any]) -> dict[int, float]:
    """How many times as long as the choice the default takes, by rows."""
    return {int(m): float(row["gain"]) for m, row in record["buckets"].items()}


def table(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: a row for each case, and what all cells say together."""
    yield "| default over tuned | " + " | ".join(f"M={m}" for m in ROWS) + " |"
    yield "|---|" + "---|" * len(ROWS)
    every: list[float] = []
    for name, record in records.items():
        found = gains(record)
        every += found.values()
        yield f"| {name} | " + " | ".join(f"{found[m]:.2f}" if m in found else "–" for m in ROWS) + " |"
    near = sum(gain <= ALLOWED for gain in every)
    yield ""
    yield f"{near} of {len(every)} cells are within {ALLOWED - 1:.0%} of the tuned; the goal is {PART:.0%} of them."


def main(argv: Sequence[str] | None = None) -> int:
    """Tune every cell that has no result yet; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmark.tuning", description=__doc__)
    parser.add_argument("--seconds", type=float, default=tuner.SECONDS, help=f"for each case ({tuner.SECONDS:g})")
    parser.add_argument("--match", default="", help="a part of the names of the cases to tune")
    parser.add_argument(
        "--most", type=int, default=1000, help="cases to tune at most, of those that have no result yet"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="where tuning.json and tuning.md go (results)"
    )
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "tuning.json"
    records: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    pending = [one for one in cells() if options.match in key(one) and key(one) not in records]
    for one in pending[: options.most]:
        records[key(one)] = measure(one, options.seconds)
        path.write_text(json.dumps(records, indent=1))
    text = "\n".join(table(records))
    (options.out / "tuning.md").write_text(text + "\n")
    print(text)
    every = [gain for record in records.values() for gain in gains(record).values()]
    return int(sum(gain <= ALLOWED for gain in every) < PART * len(every))


if __name__ == "__main__":
    sys.exit(main())
