"""What of a store goes: chosen by age, size, version or kind, and removed beside processes that build and load."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..artifacts import ArtifactStore
from ..artifacts.survey import Leftover, look
from ..errors import ArgumentError
from ..logs import tracked
from .database import Database
from .inventory import RECORDS, Inventory, Operator, Record, take_inventory

_DAY = 86400.0


@dataclass(frozen=True)
class Criteria:
    """What is to be removed; each adds to what the others choose.

    Attributes
    ----------
    older_than : float, optional
        Operators that were neither built nor, where the file system tells, used in so many days.
    max_size : int, optional
        As many operators, the longest unused first, as leave the rest of them at most so many bytes.
    stale : bool
        Operators, saved ones and tuning records that other versions of bitblas, TVM or the kernel sources have made.
    quarantine, staging, failed : bool
        What was damaged; what killed builds have left, but nothing that is being built; failed builds that were kept.
    everything : bool
        All of that, and all operators and records.
    """

    older_than: float | None = None
    max_size: int | None = None
    stale: bool = False
    quarantine: bool = False
    staging: bool = False
    failed: bool = False
    everything: bool = False

    def __post_init__(self) -> None:
        if self.older_than is None and self.max_size is None and not self._kinds and not self.stale:
            raise ArgumentError("nothing says what to remove: give an age, a size, or what kind of things")

    @property
    def _kinds(self) -> tuple[str, ...]:
        kinds = ("quarantine", "staging", "failed")
        return tuple(kind for kind in kinds if self.everything or getattr(self, kind))

    def choose(self, inventory: Inventory) -> tuple[list[Operator], list[Record], list[Leftover]]:
        """Choose among what a store holds."""
        left = [leftover for leftover in inventory.leftovers if leftover.kind in self._kinds]
        if self.everything:
            return list(inventory.operators), list(inventory.records), left
        gone = list(self._operators(inventory.operators))
        keys = {operator.entry.key for operator in gone}
        records = [
            record
            for record in inventory.records
            if (self.stale and not record.usable and not record.damage) or record.content.get("key") in keys
        ]
        return gone, records, left

    def _operators(self, operators: tuple[Operator, ...]) -> Iterator[Operator]:
        rest = []
        for operator in operators:
            # what is damaged tells of no version: it is stale, since nothing will load it
            old = self.older_than is not None and operator.entry.touched < time.time() - self.older_than * _DAY
            if old or (self.stale and not operator.usable):
                yield operator
            else:
                rest.append(operator)
        if self.max_size is not None:
            rest.sort(key=lambda row: (row.entry.touched, row.entry.key))
            size = sum(row.entry.size for row in rest)
            for operator in rest:
                if size <= self.max_size:
                    break
                size -= operator.entry.size
                yield operator


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be: (what, where, bytes) of each."""

    removed: tuple[tuple[str, Path, int], ...]

    @property
    def freed(self) -> int:
        """Bytes of all."""
        return sum(size for _, _, size in self.removed)


def prune(root: Path, criteria: Criteria, *, dry_run: bool = False) -> Pruned:
    """Remove what `criteria` choose from a store; a library that a process has loaded stays loaded there.

    An operator is taken away whole, under the lock of its key, and so is what a build has left, unless the build is at work.

    Raises
    ------
    ArtifactError
        Others may write the store.
    OSError
        It cannot be written.
    """
    operators, records, left = criteria.choose(take_inventory(root))
    if not dry_run:
        store = ArtifactStore(root)
        operators = [row for row in tracked(operators, "removing operators") if store.remove(row.entry.key)]
        left = [row for row in left if store.discard(row.path)]
        records = _remove_records(store, records)
    return Pruned(
        (
            *(("operator", row.entry.path, row.entry.size) for row in operators),
            *((RECORDS[row.kind], row.path, row.size) for row in records),
            *((row.kind, row.path, row.size) for row in left),
        )
    )


def _remove_records(store: ArtifactStore, records: list[Record]) -> list[Record]:
    """Remove files of `records`, but not those of operators that were built again meanwhile."""
    removed = []
    if records:
        with Database(store.root).locked():
            for record in records:
                key = record.content.get("key")
                if isinstance(key, str) and record.usable and look(store, key) is not None:
                    continue
                with suppress(FileNotFoundError):
                    record.path.unlink()
                    removed.append(record)
    return removed


def repair(inventory: Inventory) -> list[tuple[str, Path]]:
    """Set aside what an inventory has found damaged; return what, and where it was. It is built again when it is asked for.

    Raises
    ------
    OSError
        The store cannot be written.
    """
    store, done = ArtifactStore(inventory.root), []
    for operator in inventory.operators:
        if operator.entry.damage:
            store.load(operator.entry.key)
            if look(store, operator.entry.key) is None:
                done.append(("operator", operator.entry.path))
    damaged = [record for record in inventory.records if record.damage]
    if damaged:
        aside = store.root / "quarantine"
        aside.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Database(store.root).locked():
            for record in damaged:
                with suppress(FileNotFoundError):
                    record.path.rename(aside / f"{record.path.stem}.{uuid.uuid4().hex[:16]}")
                    done.append((RECORDS[record.kind], record.path))
    return done
