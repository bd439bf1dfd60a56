"""What a search found, kept in the store: the choices, and all that was measured, by which versions, where and when."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import env
from ..artifacts import ArtifactStore, artifact_key
from ..artifacts.record import DamagedError
from ..artifacts.survey import toolchains
from ..build import COMPILER, is_usable, toolchain
from ..config import Config, config_fields
from ..errors import BitBLASError
from ..logs import get_logger
from ..schedule import Tiling, read_tiling
from ..target import Target, host_target

if TYPE_CHECKING:
    from .search import TunedBucket

_SCHEMA = 1


def this_machine(target: Target | None = None) -> dict[str, object]:
    """The machine that measures, as JSON values; with its card where the target is one."""
    import psutil

    from ..cards import describe_card, device_of
    from ..measuring import cpu_name

    try:
        isa = host_target().isa
    except BitBLASError:
        isa = platform.machine()
    return {
        "name": "here",
        "cpu": cpu_name(),
        "isa": isa,
        "cores": psutil.cpu_count(logical=False) or 0,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        **({"card": describe_card(device_of(target))} if target is not None and target.kind == "cuda" else {}),
    }


def record_path(config: Config, target: Target) -> Path:
    """The file of a config and a target, with the numbers of its card, under the installed versions."""
    return env.CACHE_DIR.get() / "tuning" / f"{_key(config, target, toolchain())}.json"


def _key(config: Config, target: Target, versions: Mapping[str, str]) -> str:
    return artifact_key({"config": config.recorded.fields(), "target": target.facts(), "toolchain": versions})


def save_record(
    config: Config,
    target: Target,
    found: Mapping[int, TunedBucket],
    machine: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Keep what was measured; a store that cannot be written costs only the record. Buckets that were not keep theirs.

    Parameters
    ----------
    config, target : Config, Target
        What was tuned.
    found : mapping of int to TunedBucket
        By bucket.
    machine : mapping, optional
        Where it was measured; None is this machine.

    Returns
    -------
    dict
        The record, as JSON values.
    """
    path, before = record_path(config, target), _read_record(record_path(config, target))
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    where = dict(this_machine(target) if machine is None else machine)
    rows = {str(m): {**row.fields(), "date": date, "machine": where} for m, row in found.items()}
    record = {
        "schema": _SCHEMA,
        **config_fields(config),
        "target": str(target),
        "versions": toolchain(),
        "date": date,
        "machine": where,
        "buckets": {**(before["buckets"] if before else {}), **rows},
    }
    record["checksum"] = _checksum(record)
    try:
        for directory in (path.parent.parent, path.parent):  # each as private as the store asks
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_suffix(f".{uuid.uuid4().hex}")
        draft.write_text(json.dumps(record, indent=1))
        draft.replace(path)
    except OSError as error:
        get_logger().warning("the tuning record could not be kept in %s: %s", path.parent, error)
    return record


def read_record(config: Config, target: Target) -> dict[str, Any] | None:
    """The stored record, or None; a damaged one counts as none. Where TVM is not installed, that of any version of it."""
    return _read_record(find_record(config, target))


def find_record(config: Config, target: Target) -> Path:
    """The file that `read_record` reads, which need not be there."""
    path = record_path(config, target)
    if toolchain()[COMPILER] or path.exists():
        return path
    made = filter(is_usable, toolchains(ArtifactStore(env.CACHE_DIR.get())))
    others = (path.with_name(f"{_key(config, target, versions)}.json") for versions in made)
    return next((other for other in others if other.exists()), path)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = parse_record(path.read_bytes())
        choices(record)
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, DamagedError, ValueError, KeyError, TypeError, AttributeError) as error:
        get_logger().warning("the tuning record %s is not readable and is ignored: %s", path, error)
        return None


def parse_record(content: bytes) -> dict[str, Any]:
    """The record that the content of a file is; DamagedError where it is none, or not what was written."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("buckets"), dict):
        raise DamagedError("it is no tuning record")
    if record.get("checksum", "") not in ("", _checksum(record)):  # older ones have none
        raise DamagedError("it is not what was written")
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def choices(record: Mapping[str, Any]) -> dict[int, Tiling]:
    """The tilings that a record chose, by bucket. Whether a rule still offers them is for `make_plan` to see."""
    return {int(m): read_tiling(row["tiling"]) for m, row in record["buckets"].items()}


def load_record(config: Config, target: Target) -> dict[int, Tiling] | None:
    """The stored choices by bucket, or None."""
    record = read_record(config, target)
    return None if record is None else choices(record)
