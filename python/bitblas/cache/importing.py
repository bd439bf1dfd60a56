"""Bundles read: everything is verified before anything is written, and the store then takes each operator whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..artifacts import ArtifactStore, artifact_key
from ..artifacts.process import takes_files
from ..artifacts.record import MANIFEST, DamagedError, parse_manifest
from ..errors import ArtifactError, BitBLASError
from ..logs import get_logger, tracked
from ..ops.provider import store
from ..tuner.record import parse_record
from .bundle import INDEX, KIND, MODES, NAMES, SCHEMA, check_toolchain
from .database import parse_saved, saved_name

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_BYTES = 256 << 20  # of a member; a library has some hundred kilobytes
_MOST_TEXT = 16 << 20  # of one that is parsed
_MOST_MEMBERS = 100_000
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Imported:
    """What a bundle has brought.

    Attributes
    ----------
    root : Path
        The store.
    added, kept : tuple of str
        Keys of the operators that are new, and of those that were there already.
    manifests : Mapping[str, Mapping[str, Any]]
        The manifest of each.
    tuning, saved : int
        How many tuning records, and entries of the index of saved operators, are new.
    """

    root: Path
    added: tuple[str, ...]
    kept: tuple[str, ...]
    manifests: Mapping[str, Mapping[str, Any]]
    tuning: int
    saved: int


def import_bundle(path: str | os.PathLike[str]) -> Imported:
    """Take the operators of a bundle into the store (BITBLAS_CACHE_DIR), with their tuning records and places in the index.

    All of the bundle is verified before anything is written. An operator appears whole or not at all; what is there already is
    kept. Needs neither TVM nor a compiler. What is imported is code that will run in your processes: take bundles from those
    alone whom you would take a library from.

    Parameters
    ----------
    path : str or path
        What `export_bundle` wrote.

    Raises
    ------
    ArtifactError
        The file is no bundle, or not what was written; the message names the member. It was made by other versions. Or the
        store has no room, cannot be written, or may be written by others.
    OSError
        The bundle cannot be read.
    """
    with Path(path).open("rb") as file:
        try:
            bundle = _Bundle(file)
        except DamagedError as error:
            raise ArtifactError(f"{path}: {error}. Nothing was imported") from error
        place = store()
        place.check_private()
        _check_room(place, bundle)
        added: list[str] = []
        kept: list[str] = []
        for key in tracked(sorted(bundle.manifests), "importing"):
            (added if bundle.publish(key, place) else kept).append(key)
    new = [name for name, content in sorted(bundle.records.items()) if _publish_record(place.root, name, content)]
    tuning = sum(name.startswith("tuning/") for name in new)
    get_logger().info("imported %d operators from %s into %s", len(added), path, place.root)
    return Imported(place.root, tuple(added), tuple(kept), bundle.manifests, tuning, len(new) - tuning)


def _fail(name: str, problem: str) -> DamagedError:
    return DamagedError(f"{name!r} {problem}")


class _Plain(tarfile.TarInfo):
    """A header of a plain file: any other is refused before tarfile acts on it, as on one that says where the next name is."""

    @classmethod
    def frombuf(cls, *args: Any, **kwargs: Any) -> Self:
        """Read a header; raise DamagedError where it is of another kind."""
        member = super().frombuf(*args, **kwargs)
        if member.type != tarfile.REGTYPE or member.size < 0:
            raise _fail(member.name, "is no plain file")
        return member


class _Bundle:
    """An open bundle, verified whole when it is made.

    Attributes
    ----------
    members : dict
        What the index says of each member: size, sha256, mode.
    manifests : dict
        Manifest by key of the operators.
    records : dict
        Content by name of the tuning records and of the entries of the index of saved operators.
    """

    def __init__(self, file: IO[bytes]) -> None:
        try:
            self._archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_Plain)  # noqa: SIM115 - the file is the caller's
        except tarfile.TarError as error:
            raise DamagedError(f"it is no bundle of operators ({error})") from error
        except DamagedError as error:
            raise DamagedError(f"it is no bundle of operators: it does not begin with {INDEX!r} ({error})") from error
        self.members = self._read_index()
        self._found: dict[str, tarfile.TarInfo] = {}
        texts = self._verify()
        self.manifests = {key: self._manifest(key, texts) for key in self._keys()}
        self.records = {name: content for name, content in texts.items() if not name.startswith("artifacts/")}
        for name, content in self.records.items():
            self._check_record(name, content)

    # -- the archive -------------------------------------------------------------------------------------------------------

    def _read_index(self) -> dict[str, dict[str, Any]]:
        member = self._next()
        if member is None or member.name != INDEX:
            raise DamagedError(f"it is no bundle of operators: it does not begin with {INDEX!r}")
        _check_plain(member)
        if member.size > _MOST_TEXT:
            raise _fail(INDEX, f"has {member.size} bytes, more than a bundle's")
        try:
            index = json.loads(self._content(member))
            checksum = index.pop("checksum")
            intact = checksum == artifact_key(index)
            schema, kind, made, members = (index[name] for name in ("schema", "kind", "toolchain", "members"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BitBLASError) as error:
            raise _fail(INDEX, f"is not the index of a bundle: {error}") from error
        if not intact or not isinstance(made, dict) or not isinstance(members, dict):
            raise _fail(INDEX, "is not what was written")
        if schema != SCHEMA or kind != KIND:
            raise _fail(
                INDEX, f"is of another kind or schema ({kind!r}, {schema!r}): import it with the bitblas that wrote it"
            )
        check_toolchain(made, "the bundle")
        for name, listed in members.items():
            _check_listed(name, listed)
        if len(members) > _MOST_MEMBERS:
            raise _fail(INDEX, f"lists {len(members)} members, more than {_MOST_MEMBERS}")
        return members

    def _verify(self) -> dict[str, bytes]:
        """Read all members, each of which must be what the index says; return the content of those that are parsed."""
        texts = {}
        for _ in tracked(range(len(self.members)), "verifying"):
            member = self._next()
            if member is None:
                break
            name = member.name
            if name not in self.members:
                raise _fail(name, f"is not listed in {INDEX!r}")
            if name in self._found:
                raise _fail(name, "is there twice")
            _check_plain(member)
            listed = self.members[name]
            if (member.size, member.mode) != (listed["size"], listed["mode"]):
                raise _fail(name, "has another size or mode than the index says")
            content = self._content(member)
            self._found[name] = member
            if not name.startswith("artifacts/") or name.endswith(f"/{MANIFEST}"):
                texts[name] = content
        missing = sorted(set(self.members) - set(self._found))
        if missing:
            raise _fail(missing[0], "is missing: the bundle is cut off")
        if (surplus := self._next()) is not None:
            raise _fail(surplus.name, f"is not listed in {INDEX!r}")
        return texts

    def _next(self) -> tarfile.TarInfo | None:
        try:
            return self._archive.next()
        except tarfile.TarError:  # cut off: the index tells what is missing
            return None

    def _content(self, member: tarfile.TarInfo) -> bytes:
        """The bytes of a member, which are those of the index."""
        file = self._archive.extractfile(member)
        try:
            content = b"" if file is None else file.read()
        except tarfile.TarError as error:
            raise _fail(member.name, "is cut off") from error
        if len(content) != member.size:
            raise _fail(member.name, "is cut off")
        if member.name != INDEX and hashlib.sha256(content).hexdigest() != self.members[member.name]["sha256"]:
            raise _fail(member.name, "is not what was written")
        return content

    # -- what it means -----------------------------------------------------------------------------------------------------

    def _keys(self) -> list[str]:
        return sorted({match["key"] for name in self.members if (match := NAMES.fullmatch(name)) and match["key"]})

    def _manifest(self, key: str, texts: Mapping[str, bytes]) -> Mapping[str, Any]:
        folder = f"artifacts/{key}"
        name = f"{folder}/{MANIFEST}"
        if name not in texts:
            raise _fail(name, "is missing")
        try:
            manifest = parse_manifest(texts[name], key)
            made = manifest["toolchain"]
            named = artifact_key({**manifest["plan"], "toolchain": made})
        except (DamagedError, KeyError, TypeError, RecursionError, BitBLASError) as error:
            raise _fail(name, f"is not the manifest of an operator: {error}") from error
        if named != key:
            raise _fail(name, "describes another operator than its key says")
        check_toolchain(made, f"{name!r}")
        there = {
            member.removeprefix(f"{folder}/"): {"size": listed["size"], "sha256": listed["sha256"]}
            for member, listed in self.members.items()
            if member.startswith(f"{folder}/") and member != name
        }
        if there != manifest["files"] or manifest.get("library") not in there:
            raise _fail(name, "lists other files than there are")
        return manifest

    def _check_record(self, name: str, content: bytes) -> None:
        try:
            if name.startswith("tuning/"):
                record = parse_record(content)
                made, right = record["versions"], "checksum" in record
            else:
                record = parse_saved(content)
                made = record["toolchain"]
                right = name == f"operators/{saved_name(record)}" and record["key"] in self.manifests
        except (DamagedError, KeyError, TypeError, RecursionError, BitBLASError) as error:
            raise _fail(name, f"is not what was written: {error}") from error
        if not right:
            raise _fail(name, "has no place in this bundle")
        check_toolchain(made, f"{name!r}")

    # -- writing -----------------------------------------------------------------------------------------------------------

    def publish(self, key: str, place: ArtifactStore) -> bool:
        """Put one operator into a store, unless it is there; return whether it is new."""
        manifest = self.manifests[key]

        def write(staging: Path) -> None:
            for name in manifest["files"]:
                member = f"artifacts/{key}/{name}"
                (staging / name).write_bytes(self._content(self._found[member]))
                (staging / name).chmod(self.members[member]["mode"])

        try:
            artifact, new = place.adopt(key, manifest, write)
        except DamagedError as error:
            raise ArtifactError(f"the bundle has changed while it was imported, at {key}: {error}") from error
        if not artifact.path.is_relative_to(place.root):
            raise ArtifactError(
                f"{place.root} cannot be written, or is full: free some room or mend its permissions, and import the bundle "
                "again; what was imported until now is whole"
            )
        return new


def _check_listed(name: str, listed: object) -> None:
    """Refuse what no bundle of ours lists, such as a name that leads out of the store."""
    if not NAMES.fullmatch(name):
        raise _fail(name, "is no name of a bundle's member")
    if not isinstance(listed, dict) or set(listed) != {"size", "sha256", "mode"}:
        raise _fail(name, f"is not described in {INDEX!r}")
    size, digest, mode = listed["size"], listed["sha256"], listed["mode"]
    most = _MOST_BYTES if name.startswith("artifacts/") and not name.endswith(f"/{MANIFEST}") else _MOST_TEXT
    if type(size) is not int or not 0 <= size <= most:
        raise _fail(name, f"has a size of {size!r}; at most {most} are allowed")
    if type(mode) is not int or mode not in MODES or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise _fail(name, f"has a mode or checksum that is not allowed ({mode!r}, {digest!r})")


def _check_plain(member: tarfile.TarInfo) -> None:
    """Refuse what only looks like a file of ours: those of another owner or mode. `_Plain` refuses links and devices."""
    if (member.uid, member.gid, member.uname, member.gname) != (0, 0, "", ""):
        raise _fail(member.name, f"belongs to somebody ({member.uname or member.uid}): no member of a bundle does")
    if member.mode not in MODES:
        raise _fail(member.name, f"has mode {member.mode:04o}, which no member of a bundle has")


def _check_room(place: ArtifactStore, bundle: _Bundle) -> None:
    """Refuse, before anything is written, what the store could not take."""
    place.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not takes_files(place.root):
        raise ArtifactError(f"{place.root} cannot be written, or is full; nothing was imported")
    there = set(place.keys())
    needed = sum(
        listed["size"]
        for name, listed in bundle.members.items()
        if (match := NAMES.fullmatch(name)) and match["key"] not in there
    )
    status = os.statvfs(place.root)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise ArtifactError(
            f"{place.root} has {free / 1e6:.1f} MB free, and the bundle needs {needed / 1e6:.1f} MB; nothing was imported"
        )


def _publish_record(root: Path, name: str, content: bytes) -> bool:
    """Put a record into its place, unless a whole one is there; return whether it is new."""
    path = root / name
    parse: Callable[[bytes], object] = parse_record if name.startswith("tuning/") else parse_saved
    try:
        parse(path.read_bytes())
        return False
    except (FileNotFoundError, DamagedError):
        pass
    for folder in (*reversed(path.relative_to(root).parents[:-1]), Path(name).parent):
        (root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)  # each as private as the store asks
    draft = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return True
