"""A directory of saved operators: an index of configs and tilings by target, beside the artifact store of their libraries."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..artifacts import Artifact, artifact_key
from ..artifacts.record import DamagedError
from ..artifacts.survey import toolchains
from ..build import COMPILER, differences, is_usable, toolchain
from ..config import Config, FlashAttenConfig, MatmulConfig, json_fields
from ..errors import ArtifactError, BitBLASError, UnsupportedError
from ..logs import get_logger, warn_once
from ..machines import Card
from ..ops import Matmul
from ..ops.attention import FlashAtten
from ..ops.general_matmul_splitk import MatmulConfigWithSplitK, MatmulWithSplitK
from ..ops.operator import Operator
from ..ops.provider import load, plan_key, provide, store
from ..plan import make_plan
from ..schedule import read_tiling
from ..target import Target

#: The operators that can be saved, and their configs.
KINDS: dict[type[Operator], type[Config]] = {
    Matmul: MatmulConfig,
    MatmulWithSplitK: MatmulConfigWithSplitK,
    FlashAtten: FlashAttenConfig,
}
_BY_NAME = {kind.__name__: kind for kind in KINDS}

_SCHEMA = 1
_LOCK_SECONDS = 10


class Database:
    """A directory that holds ``operators/<target>/<key>.json``, one file for each saved operator, and an artifact store.

    A file is written aside and renamed, so that readers need no lock; it has a checksum. Its key is made of the config, the
    target and the versions, so that two versions can share a directory.

    Parameters
    ----------
    path : Path
        The directory. It is created, for this user alone, when the first operator is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = path / "operators"

    def exists(self) -> bool:
        """Whether anything was saved here."""
        return self._index.is_dir()

    # -- saving ------------------------------------------------------------------------------------------------------------

    def save(self, op: Operator) -> None:
        """Save the library of an operator, and its tilings. What cannot be written is a warning."""
        directory = self._directory(op.target)
        try:
            for folder in (self.path, self._index, directory):  # each as private as the store asks
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            artifact = self._take(op)
            if artifact is None:
                warn_once("database.in memory", "operators that were compiled in memory have no library to save")
            elif artifact.path.is_relative_to(store(self.path).root):  # else the store took it not, and said so
                self._record(op, artifact)
        except (OSError, DamagedError) as error:
            get_logger().warning("%s could not be saved in %s: %s", op, self.path, error)

    def _take(self, op: Operator) -> Artifact | None:
        """The operator's artifact in our store: there already, or a copy; built anew where its files have gone."""
        place = store(self.path)
        found = place.load(op.artifact.key if op.artifact else plan_key(op.plan))
        if found is not None:
            return found
        if op.artifact is not None:
            try:
                return _copy(op.artifact, self.path)
            except (FileNotFoundError, DamagedError) as error:
                get_logger().info("the artifact of %s is no longer there: %s", op, error)
        built = provide(op.plan).artifact
        return None if built is None else _copy(built, self.path)

    def _record(self, op: Operator, artifact: Artifact) -> None:
        record = {
            "schema": _SCHEMA,
            "operator": type(op).__name__,
            "config": json_fields(op.config),
            "target": op.target.fields(),
            "card": op.target.facts().get("card"),
            "tilings": {str(m): tiling.fields() for m, tiling in op.plan.tilings.items()},
            "tuning": op.tuning_record,
            "toolchain": artifact.manifest["toolchain"],
            "key": artifact.key,
        }
        path = self._directory(op.target) / _file_name(record)
        with self.locked():
            untuned = op.plan == make_plan(op.config, op.target)
            if not (untuned and self._holds_another(path, record)):
                draft = path.with_suffix(f".{uuid.uuid4().hex}")
                draft.write_text(
                    json.dumps({**record, "checksum": artifact_key(record)}, indent=1) + "\n", encoding="utf-8"
                )
                draft.replace(path)

    def _holds_another(self, path: Path, record: Mapping[str, Any]) -> bool:
        """Whether an operator with other tilings is saved, and can be loaded."""
        try:
            found = read_saved(path)
        except (FileNotFoundError, DamagedError):
            return False
        return found["tilings"] != record["tilings"] and store(self.path).load(found["key"]) is not None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from writing between a look and a write. What is renamed is whole without it, too."""
        if not self.exists():
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(self._index / ".lock")
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout:
            get_logger().warning("%s is locked by another process for %d s", self._index, _LOCK_SECONDS)
        try:
            yield
        finally:
            lock.release()

    # -- loading -----------------------------------------------------------------------------------------------------------

    def load(self, target: Target) -> list[Operator]:
        """Operators that were saved for a target, with their tilings and ready to run; the others with one warning."""
        directory = self._directory(target)
        paths = sorted(directory.glob("*.json"))
        if not paths:
            return []
        try:
            target.check_runnable()
        except UnsupportedError as error:
            warn_once(f"database.target {directory}", "the operators in %s are left out: %s", directory, error)
            return []
        found, strange = [], []
        for path in paths:
            try:
                record = read_saved(path)
                if is_usable(record["toolchain"]):
                    found.append(self._restore(record, target))
                else:
                    strange.append(record)
            except FileNotFoundError:  # another process has removed it
                continue
            except DamagedError as damage:
                warn_once(f"database.damaged {path}", "the saved operator %s is left out: %s", path, damage)
        have = {artifact_key(json_fields(op.config)) for op in found}
        left_out = [record for record in strange if artifact_key(record["config"]) not in have]
        if left_out:
            warn_once(
                f"database.versions {directory}",
                "%d saved operators in %s are left out, made by another version (%s): they are to be built and saved again",
                len(left_out),
                self.path,
                "; ".join(sorted({differences(record["toolchain"]) for record in left_out})),
            )
        return found

    def find(self, config: Config, target: Target) -> Operator | None:
        """The operator that this version saved for a config and a target, ready to run, or None."""
        names = [kind.__name__ for kind, config_class in KINDS.items() if type(config) is config_class]
        if not names or not self.exists():
            return None
        wanted = {"operator": names[0], "config": json_fields(config), "target": target.fields()}
        here = toolchain()  # where TVM is not installed any version's serves
        made = [here] if here[COMPILER] else filter(is_usable, toolchains(store(self.path)))
        paths = [self._directory(target) / _file_name({**wanted, "toolchain": versions}) for versions in made]
        return next(filter(None, (self._find(path, target) for path in paths)), None)

    def _find(self, path: Path, target: Target) -> Operator | None:
        try:
            target.check_runnable()
            return self._restore(read_saved(path), target)
        except (FileNotFoundError, UnsupportedError):
            return None
        except DamagedError as damage:
            warn_once(f"database.damaged {path}", "the saved operator %s is left out: %s", path, damage)
            return None

    def _restore(self, record: Mapping[str, Any], target: Target) -> Operator:
        try:
            kind = _BY_NAME[record["operator"]]
            config = KINDS[kind](**record["config"])
            tilings = {int(m): read_tiling(values) for m, values in record["tilings"].items()}
            if record.get("card"):  # cards of one capability share code; which tilings there are depends on the card
                target = replace(target, card=Card(**record["card"]))
            plan = make_plan(config, target, tilings)
            if record["target"] != target.fields() or plan.tilings != tilings:
                raise DamagedError("its target or tilings are not those that were saved")
            provided = load(plan, self.path)
        except ArtifactError:  # others may write the directory
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OSError, RuntimeError) as error:
            raise DamagedError(f"{type(error).__name__}: {error}") from error
        if provided is None:
            raise DamagedError(f"its library, artifact {record['key']}, is missing or damaged")
        return kind.restore(config, plan, provided, record=record.get("tuning"))

    def _directory(self, target: Target) -> Path:
        return self._index / artifact_key(target.fields())[:16]


def saved_name(record: Mapping[str, Any]) -> str:
    """The name of a record's file, relative to the index."""
    return f"{artifact_key(record['target'])[:16]}/{_file_name(record)}"


def _file_name(record: Mapping[str, Any]) -> str:
    """The name of a record's file, by what tells it from others."""
    return artifact_key({name: record[name] for name in ("operator", "config", "target", "toolchain")}) + ".json"


def read_saved(path: Path) -> dict[str, Any]:
    """The record in a file of the index, as it was written."""
    try:
        return parse_saved(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error}") from error


def parse_saved(content: bytes) -> dict[str, Any]:
    """The record that the content of a file of the index is; DamagedError where it is not what was written."""
    try:
        record: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it cannot be read: {error}") from error
    try:
        checksum = record.pop("checksum")
        intact = checksum == artifact_key(record) and record["schema"] == _SCHEMA
    except (KeyError, TypeError, AttributeError, BitBLASError):
        intact = False
    if not intact:
        raise DamagedError("it is not what was written")
    return record


def _copy(artifact: Artifact, root: Path) -> Artifact:
    """A copy of an artifact in the store at `root`."""

    def write(staging: Path) -> None:
        for name in artifact.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, staging / name)

    return store(root).adopt(artifact.key, artifact.manifest, write)[0]
