"""Tuning as a whole: a workbench here or elsewhere, the search, the record."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..logs import get_logger
from ..target import Target
from . import SECONDS
from .local import local_bench
from .record import save_record, this_machine
from .remote import remote_bench
from .search import Tuned, Workbench, tune


def tune_here(
    config: Config, target: Target, topk: int = 20, seconds: float = SECONDS, parallel_build: bool = True
) -> tuple[Tuned, dict[str, Any]]:
    """Tune on this machine, keep the record, and warn where the search ended early; what was found, and the record.

    Raises
    ------
    UnsupportedError
        No rule serves the config, or this machine cannot run the target.
    BuildError
        Not one candidate of a bucket could be built and run.
    KeyboardInterrupt
        Before a default was measured.
    """
    with local_bench(target, parallel_build) as bench:
        return _tune(config, target, topk, seconds, bench, this_machine(target))


def tune_there(
    config: Config, target: Target, address: str, key: str, topk: int = 20, seconds: float = SECONDS
) -> tuple[Tuned, dict[str, Any]]:
    """As `tune_here`, measuring on a machine that serves `key` to the TVM tracker at `address`, ``"host:port"``.

    Raises
    ------
    ArgumentError
        The address is not of that form.
    RemoteError
        The tracker does not answer, or no machine for `key` does.
    """
    with remote_bench(address, key, target) as bench:
        return _tune(config, target, topk, seconds, bench, bench.machine)


def _tune(
    config: Config, target: Target, topk: int, seconds: float, bench: Workbench, machine: dict[str, object]
) -> tuple[Tuned, dict[str, Any]]:
    record: dict[str, Any] = {}

    def keep(found: Any) -> None:
        record.update(save_record(config, target, found, machine))

    tuned = tune(config, target, topk, bench, seconds, keep=keep)
    if tuned.ended:
        reached = ", ".join(str(m) for m in tuned.buckets)
        get_logger().warning(
            "tuning ended early, %s: tuned for m = %s, other buckets keep what they had", tuned.ended, reached
        )
    return tuned, record
