"""What an artifact is: its key, its files, and the manifest that proves them intact."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ArgumentError, ArtifactError

MANIFEST = "manifest.json"

_SCHEMA = 1
RESERVED = ("schema", "key", "files", "checksum")  # the manifest's own fields, beside those of the build

#: An OSError with one of these says that an artifact is damaged; any other, such as EMFILE, says nothing about it.
_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EACCES, errno.EPERM})


class DamagedError(Exception):
    """An artifact on disk is not what was written."""


def artifact_key(fields: Mapping[str, object]) -> str:
    """Return the key of the artifact that `fields` describe.

    Parameters
    ----------
    fields : Mapping[str, object]
        Everything the artifact depends on: strings, bools, ints, finite floats, None, and sequences and string-keyed
        mappings of these. The order of a mapping does not matter; a tuple equals the list of its items.

    Returns
    -------
    str
        The sha256 of the fields' canonical JSON, 64 hexadecimal digits.

    Raises
    ------
    ArgumentError
        A value is of another type; the message names its place.
    """
    return _checksum(_plain_mapping(fields, "fields"))


def _checksum(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: object, where: str) -> object:
    """Return `value` made of JSON's own types, or refuse what JSON would change or confuse."""
    if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _plain_mapping(value, where)
    raise ArgumentError(
        f"{where} is {value!r} of type {type(value).__name__}: expected a str, bool, int, finite float, None, "
        "or a list, tuple or mapping of these"
    )


def _plain_mapping(value: Mapping[str, object], where: str) -> dict[str, object]:
    for name in value:
        if type(name) is not str:
            raise ArgumentError(f"{where} has the key {name!r}: expected a str")
    return {name: _plain(item, f"{where}[{name!r}]") for name, item in value.items()}


@dataclass(frozen=True)
class Artifact:
    """Files that were built once and are only read from then on.

    Parameters
    ----------
    key : str
        What :func:`artifact_key` gave for the fields it was built from.
    path : Path
        The directory that holds the files.
    manifest : Mapping[str, Any]
        What the build returned, and ``files``: the size and sha256 of each file.
    """

    key: str
    path: Path
    manifest: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files, relative to `path`."""
        return tuple(self.manifest["files"])

    def file(self, name: str) -> Path:
        """Return the path of the file `name`; an ArtifactError lists the files there are."""
        if name not in self.files:
            raise ArtifactError(f"artifact {self.key} has no file {name!r}: it has {', '.join(self.files)}")
        return self.path / name

    @property
    def library(self) -> Path:
        """The path of the shared library, which the build named by ``library`` in its metadata."""
        name = self.manifest.get("library")
        if not isinstance(name, str):
            raise ArtifactError(f"artifact {self.key} names no library")
        return self.file(name)


def describe(directory: Path, key: str, metadata: Mapping[str, object]) -> dict[str, Any]:
    """Return the manifest of what a build has left in `directory`."""
    plain = _plain_mapping(metadata, "metadata")
    reserved = sorted(set(RESERVED) & set(plain))
    if reserved:
        raise ArtifactError(f"the metadata of artifact {key} has the reserved name {reserved[0]!r}")
    files = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        name = path.relative_to(directory).as_posix()
        if stat.S_ISREG(mode) and name != MANIFEST:
            files[name] = _fingerprint(path)
        elif not stat.S_ISDIR(mode):
            raise ArtifactError(f"the build of artifact {key} left {name!r}, which is not a regular file of its own")
    if not files:
        raise ArtifactError(f"the build of artifact {key} wrote no file")
    library = plain.get("library")
    if library is not None and library not in files:
        raise ArtifactError(
            f"the build of artifact {key} wrote no file {library!r}, its library: it wrote {', '.join(files)}"
        )
    return {"schema": _SCHEMA, "key": key, "files": files, **plain}


def _fingerprint(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_entry(entry: Path, key: str, *, verify: bool = True) -> Artifact | None:
    """Return the artifact in the directory `entry` or None; raise DamagedError where it is not what was written."""
    try:
        manifest = parse_manifest((entry / MANIFEST).read_bytes(), key)
        for name, recorded in manifest["files"].items() if verify else ():
            path = entry / name
            if not stat.S_ISREG(path.lstat().st_mode):
                raise DamagedError(f"{name} is not a regular file")
            if _fingerprint(path) != recorded:
                raise DamagedError(f"{name} is not the file that was written")
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        if not os.path.lexists(entry):
            return None
        raise DamagedError(str(error)) from error
    return Artifact(key, entry, MappingProxyType(manifest))


def parse_manifest(content: bytes, key: str) -> dict[str, Any]:
    """Return the manifest of `key` that `content` is; raise DamagedError where it is not what `write_manifest` wrote."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA or manifest.get("key") != key:
        raise DamagedError(f"{MANIFEST} does not describe this artifact")
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise DamagedError(f"{MANIFEST} is not the file that was written")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise DamagedError(f"{MANIFEST} lists no files")
    return manifest


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with a checksum of its own, so that every later change of it shows."""
    record = {**manifest, "checksum": _checksum(manifest)}
    (directory / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
