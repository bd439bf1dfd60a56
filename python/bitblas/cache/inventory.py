"""What a store holds, in words: operators, the index of saved ones, tuning records; and whether all is as it was written."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..artifacts import ArtifactStore
from ..artifacts.record import DamagedError
from ..artifacts.survey import Entry, Leftover, leftovers, look, size_of
from ..build import is_usable
from ..config import Config, MatmulConfig, read_config
from ..errors import BitBLASError
from ..logs import tracked
from ..machines import ARM_CPUS, X86_CPUS
from ..plan import make_plan
from ..schedule import read_tiling
from ..target import Target, device_arch, host_features, runs_on
from ..tuner.record import choices, parse_record
from .database import read_saved

#: Files beside the artifacts, by the directory that holds them, and what they are called.
RECORDS = {"operators": "saved operator", "tuning": "tuning record"}


@dataclass(frozen=True)
class Operator:
    """An entry of a store, in words.

    Attributes
    ----------
    entry : Entry
        What lies there.
    config : str
        What it computes; empty where nothing tells.
    target : str
        What it was compiled for; empty where nothing tells.
    runs : bool or None
        Whether this machine can run it; None where only LLVM could tell.
    tilings : str
        ``"tuned"``: a record of the store chose them; ``"default"``: what everybody gets without; ``"other"``: neither; ``""``:
        not known.
    usable : bool
        Whether the installed versions of bitblas, TVM and the kernel sources would load it.
    """

    entry: Entry
    config: str
    target: str
    runs: bool | None
    tilings: str
    usable: bool


@dataclass(frozen=True)
class Record:
    """A file of `RECORDS`: its `kind` is the name of the directory; `damage` says what is wrong with it."""

    kind: str
    path: Path
    size: int
    content: Mapping[str, Any]
    damage: str = ""

    @property
    def usable(self) -> bool:
        """Whether the installed versions would take it."""
        made = self.content.get("toolchain", self.content.get("versions"))
        return isinstance(made, Mapping) and is_usable(made)


@dataclass(frozen=True)
class Inventory:
    """All that a store holds."""

    root: Path
    operators: tuple[Operator, ...]
    records: tuple[Record, ...]
    leftovers: tuple[Leftover, ...]

    @property
    def size(self) -> int:
        """Bytes of everything."""
        sizes = [operator.entry.size for operator in self.operators]
        sizes += [record.size for record in self.records]
        return sum(sizes + [leftover.size for leftover in self.leftovers])

    @property
    def damaged(self) -> list[tuple[str, Path, str]]:
        """(what, where, what is wrong) of everything that is not as it was written."""
        found = [("operator", row.entry.path, row.entry.damage) for row in self.operators if row.entry.damage]
        return found + [(RECORDS[row.kind], row.path, row.damage) for row in self.records if row.damage]


def take_inventory(root: Path, *, verify: bool = False) -> Inventory:
    """Look at everything in a store, which need not exist; what other processes remove meanwhile is left out.

    Parameters
    ----------
    root : Path
        The directory of the store.
    verify : bool
        Whether to read all files and compare their checksums, with a progress bar.

    Raises
    ------
    ArtifactError
        Others may write the store.
    """
    store = ArtifactStore(root)
    store.check_private()
    records = tuple(_records(store.root))
    tuned = [_choices(record.content) for record in records if record.kind == "tuning" and not record.damage]
    operators = []
    for key in tracked(store.keys(), "verifying" if verify else "looking"):
        entry = look(store, key, verify=verify)
        if entry is not None:
            operators.append(_operator(entry, tuned))
    operators.sort(key=lambda row: (not row.config, row.target, row.config, row.entry.key))
    return Inventory(store.root, tuple(operators), records, tuple(leftovers(store)))


# -- records ---------------------------------------------------------------------------------------------------------------


def _records(root: Path) -> Iterator[Record]:
    read: dict[str, Callable[[Path], Mapping[str, Any]]] = {
        "operators": read_saved,
        "tuning": lambda path: parse_record(path.read_bytes()),
    }
    for kind, parse in read.items():
        for path in sorted((root / kind).glob("*/*.json" if kind == "operators" else "*.json")):
            size = size_of(path)
            try:
                yield Record(kind, path, size, parse(path))
            except FileNotFoundError:  # another process has removed it
                continue
            except (DamagedError, OSError) as damage:
                yield Record(kind, path, size, {}, str(damage))


def _choices(record: Mapping[str, Any]) -> tuple[object, ...]:
    """What tells the operator that a tuning record is for: its config and target, and the tilings by bucket."""
    with suppress(KeyError, TypeError, ValueError, AttributeError, BitBLASError):
        return read_config(record).recorded, record["target"], choices(record)
    return ()


# -- operators -------------------------------------------------------------------------------------------------------------


def _operator(entry: Entry, tuned: list[tuple[object, ...]]) -> Operator:
    plan = entry.manifest.get("plan")
    plan = plan if isinstance(plan, Mapping) else {}
    made = entry.manifest.get("toolchain")
    usable = isinstance(made, Mapping) and is_usable(made) and not entry.damage
    target, config = target_of(plan), config_of(plan)
    tilings = _tilings(plan, config, target, tuned, usable)
    runs = None if target is None else can_run(target)
    return Operator(entry, describe(config, plan), str(target or ""), runs, tilings, usable)


def config_of(plan: Mapping[str, Any]) -> Config | None:
    """The config in the fields of a plan; None where this version knows none like that."""
    with suppress(KeyError, TypeError, BitBLASError):
        return read_config(plan)
    return None


def target_of(plan: Mapping[str, Any]) -> Target | None:
    """The target in the fields of a plan; None where this version knows none like that."""
    with suppress(KeyError, TypeError, ValueError, BitBLASError):
        values = plan["target"]
        return Target(values["kind"], values["arch"], values["mcpu"], tuple(values["mattr"]))
    return None


def describe(config: Config | None, plan: Mapping[str, Any]) -> str:
    """A config in words; one that this version does not know as it is written."""
    if config is None:
        values = plan.get("config")
        return " ".join(f"{name}={value}" for name, value in values.items()) if isinstance(values, Mapping) else ""
    rows = " ".join(str(m) for m in config.buckets)
    if isinstance(config, MatmulConfig):
        return f"{config.describe()}, M={rows if config.is_dynamic else f'{rows} only'}"
    return f"{config.describe()}, rows={rows}"


@cache
def can_run(target: Target) -> bool | None:
    """Whether this machine can run code for a target; None where only LLVM could tell."""
    if target.kind == "cuda":
        return bool(device_arch()) and runs_on(target.arch, device_arch())
    if target.arch != platform.machine():
        return False
    if target.mcpu not in (*X86_CPUS, *ARM_CPUS):
        return None
    return target.features <= host_features()


def _tilings(
    plan: Mapping[str, Any],
    config: Config | None,
    target: Target | None,
    tuned: list[tuple[object, ...]],
    usable: bool,
) -> str:
    with suppress(KeyError, TypeError, BitBLASError):
        own = {m: read_tiling(kernel["tiling"]) for kernel in plan["kernels"] for m in kernel["buckets"]}
        if config is None or target is None:
            return ""
        if any(row and row[:2] == (config.recorded, str(target)) and _agrees(row[2], own) for row in tuned):
            return "tuned"
        if usable and target.kind == "llvm":  # a card's numbers, which are not written here, decide on its defaults
            return "default" if make_plan(config, target).tilings == own else "other"
    return ""


def _agrees(chosen: object, own: Mapping[int, object]) -> bool:
    """Whether tilings are those of a record; either may know some buckets only."""
    if not isinstance(chosen, Mapping):
        return False
    known = [m for m in own if m in chosen]
    return bool(known) and all(chosen[m] == own[m] for m in known)
