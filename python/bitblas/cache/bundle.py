"""Bundles: operators in one file, with their tuning records and their places in the index, for machines that cannot compile.

A bundle is an uncompressed tar archive (ustar). Its first member, `bundle.json`, lists all others with size and sha256; they
are sorted, and have no dates, names or owners, so that the same operators give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..artifacts import Artifact, artifact_key
from ..artifacts.record import MANIFEST
from ..build import differences, is_usable, toolchain
from ..config import Config
from ..errors import ArgumentError, ArtifactError
from ..logs import get_logger, tracked
from ..ops.provider import build, store
from ..plan import AnyPlan, make_plan
from ..target import Target, resolve_target
from ..tuner.record import choices, find_record, read_record
from .inventory import take_inventory

INDEX = "bundle.json"
SCHEMA = 1
#: What identifies a bundle.
KIND = "bitblas operators"
#: The names that a bundle's members may have; no other, and so none that leads elsewhere, is written.
NAMES = re.compile(
    r"artifacts/(?P<key>[0-9a-f]{64})/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
    r"|(?P<tuning>tuning/[0-9a-f]{64}\.json)|(?P<saved>operators/[0-9a-f]{16}/[0-9a-f]{64}\.json)"
)
#: Modes of members: files that nobody writes, and libraries.
MODES = (0o444, 0o555)


@dataclass(frozen=True)
class Exported:
    """What was put into a bundle.

    Attributes
    ----------
    path : Path
        The bundle.
    size : int
        Its bytes.
    operators : tuple of Artifact
        The operators in it.
    tuning, saved : int
        How many tuning records, and how many entries of the index.
    left_out : int
        Operators of the store that are damaged, or were made by other versions.
    """

    path: Path
    size: int
    operators: tuple[Artifact, ...]
    tuning: int
    saved: int
    left_out: int = 0


def export_bundle(
    path: str | os.PathLike[str], configs: Sequence[Config], targets: Sequence[object] = (None,)
) -> Exported:
    """Put the operators of some configs into a bundle, building those that are not in the store.

    They have the tilings of the store's tuning records, which are put in as well, and so are their entries in the index of
    saved operators.

    Parameters
    ----------
    path : str or path
        The bundle, a name that ends in ``.tar``; it appears whole or not at all, in the place of what was there.
    configs : sequence of Config
        The operators.
    targets : sequence
        What each is compiled for, as of `bitblas.target.resolve_target`; this machine need not be able to run it.

    Raises
    ------
    ArgumentError
        The path does not end in ``.tar``, or there are no configs or targets.
    ConfigError
        A target is not understood.
    UnsupportedError
        No schedule rule serves a config on a target.
    BuildError
        An operator had to be built, and could not be.
    ArtifactError
        Others may write the store, or it could not take an operator.
    OSError
        The bundle cannot be written.
    """
    path = _checked_path(path)
    wanted = {(config, target): None for target in map(resolve_target, targets) for config in configs}
    if not wanted:
        raise ArgumentError("configs or targets is empty; there is nothing to put into a bundle")
    plans: dict[AnyPlan, None] = {}
    records: set[Path] = set()
    for config, target in wanted:
        record = read_record(config, target)
        plans[make_plan(config, target, choices(record) if record else None)] = None
        records |= {find_record(config, target)} if record else set()
    artifacts = {artifact.key: artifact for artifact in map(build, tracked(list(plans), "building operators"))}
    return _write(path, list(artifacts.values()), records)


def export_store(path: str | os.PathLike[str], targets: Sequence[Target] = ()) -> Exported:
    """Put all operators of the store that the installed versions would load into a bundle, those for some targets or for any.

    Raises
    ------
    ArgumentError
        The path does not end in ``.tar``, or there is no such operator.
    ArtifactError, OSError
        As of `export_bundle`.
    """
    path, place = _checked_path(path), store()
    inventory = take_inventory(place.root)
    names = {str(target) for target in targets}
    meant = [row for row in inventory.operators if not names or row.target in names]
    usable = [row for row in meant if row.usable]
    found = [artifact for row in tracked(usable, "verifying") if (artifact := place.load(row.entry.key)) is not None]
    if not found:
        where = f" for {', '.join(sorted(names))}" if names else ""
        raise ArgumentError(f"there is no operator of the installed versions{where} in {place.root}")
    records = {
        row.path
        for row in inventory.records
        if row.kind == "tuning" and row.usable and (not names or row.content.get("target") in names)
    }
    return _write(path, found, records, len(meant) - len(found))


def _checked_path(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if found.suffix != ".tar":
        raise ArgumentError(f"{found} is no name for a bundle: it must end in .tar")
    if found.is_dir():
        raise ArgumentError(f"{found} is a directory")
    if not found.absolute().parent.is_dir():
        raise ArgumentError(f"{found} cannot be written: {found.absolute().parent} is no directory")
    return found


def _write(path: Path, artifacts: list[Artifact], tuning: Iterable[Path], left_out: int = 0) -> Exported:
    root = store().root
    outside = [artifact for artifact in artifacts if not artifact.path.is_relative_to(root)]
    if outside:
        raise ArtifactError(
            f"{root} could not take the operators that were built; free some room, or mend its permissions"
        )
    keys = {artifact.key for artifact in artifacts}
    saved = [
        row.path
        for row in take_inventory(root).records
        if row.kind == "operators" and row.usable and row.content["key"] in keys
    ]
    members = {f"artifacts/{a.key}/{name}": a.path / name for a in artifacts for name in (*a.files, MANIFEST)}
    members |= {f"operators/{file.parent.name}/{file.name}": file for file in saved}
    records = {f"tuning/{file.name}": file for file in tuning}
    strange = [name for name in members if not NAMES.fullmatch(name)]
    if strange:
        raise ArtifactError(f"{strange[0]} has no name that a bundle can hold")
    with _published(path) as draft:
        _fill(draft, dict(sorted((members | records).items())))
    get_logger().info("wrote %d operators to %s", len(artifacts), path)
    ordered = tuple(sorted(artifacts, key=lambda artifact: artifact.key))
    return Exported(path, path.stat().st_size, ordered, len(records), len(saved), left_out)


@contextmanager
def _published(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is whole and on the disk, and else leaves nothing."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if error.filename in (None, str(draft)):  # else it is about what is put into it
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def _fill(file: IO[bytes], members: Mapping[str, Path]) -> None:
    """Write the members, and in front of them the index, for which each is read once more."""
    listed: dict[str, object] = {}
    for name, source in members.items():
        content = source.read_bytes()
        mode = MODES[1] if name.endswith(".so") else MODES[0]
        listed[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "mode": mode}
    index = {"schema": SCHEMA, "kind": KIND, "toolchain": toolchain(), "members": listed}
    text = json.dumps({**index, "checksum": artifact_key(index)}, indent=1, sort_keys=True) + "\n"
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
        _add(archive, INDEX, text.encode(), MODES[0])
        for name, source in tracked(list(members.items()), "writing the bundle"):
            content = source.read_bytes()
            if hashlib.sha256(content).hexdigest() != listed[name]["sha256"]:  # type: ignore[index]
                raise ArtifactError(f"{source} has changed while it was exported; try again")
            _add(archive, name, content, listed[name]["mode"])  # type: ignore[index]


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    member = tarfile.TarInfo(name)  # of user and group 0 without names, and of no date
    member.size, member.mode = len(content), mode
    archive.addfile(member, io.BytesIO(content))


def check_toolchain(made: Mapping[str, Any], what: str) -> None:
    """Raise ArtifactError where operators that a toolchain made could not be loaded here."""
    if not is_usable(made):
        raise ArtifactError(
            f"{what} was made by other versions ({differences(made)}), and could not be loaded: export it again with those "
            "that are installed here, or install those"
        )
