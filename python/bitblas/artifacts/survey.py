"""What lies in a store: every entry, whole or damaged, and what builds and damage have left behind."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .record import MANIFEST, DamagedError, read_entry
from .store import ArtifactStore

#: Directories of a store that hold what is no artifact, and can be removed.
LEFTOVERS = ("staging", "quarantine", "failed")

_NOATIME = getattr(os, "ST_NOATIME", 0)  # Linux tells


@dataclass(frozen=True)
class Entry:
    """One entry of a store, as it was found.

    Attributes
    ----------
    key : str
        Its key.
    path : Path
        Its directory.
    size : int
        Bytes of its files.
    built : float
        When it came into the store, in seconds since the epoch; 0 where nothing tells.
    used : float or None
        When it was last read, as far as the file system tells (many do so once a day); None where it does not.
    manifest : Mapping[str, Any]
        Its manifest; empty where that is damaged.
    damage : str
        What is wrong; empty where nothing was found.
    """

    key: str
    path: Path
    size: int
    built: float
    used: float | None
    manifest: Mapping[str, Any] = field(repr=False)
    damage: str = ""

    @property
    def touched(self) -> float:
        """When it was last used, or else built."""
        return max(self.built, self.used or 0.0)


@dataclass(frozen=True)
class Leftover:
    """A directory of `LEFTOVERS`: its `kind` is the name of that, `changed` when it was last written to."""

    kind: str
    path: Path
    size: int
    changed: float


def look(store: ArtifactStore, key: str, *, verify: bool = False) -> Entry | None:
    """Look at one entry; None where there is none.

    Parameters
    ----------
    store : ArtifactStore
        Where.
    key : str
        Which.
    verify : bool
        Whether to read all files and compare their checksums. When they were last used stays what it was.
    """
    path = store.root / "artifacts" / key
    before = _times(path)
    try:
        artifact = read_entry(path, key, verify=verify)
    except DamagedError as damage:
        # the manifest may be whole, and tell what the entry was
        manifest, problem = _manifest(path, key), str(damage)
    else:
        if artifact is None:
            return None
        manifest, problem = artifact.manifest, _missing(artifact.path, artifact.manifest)
    finally:
        if verify:
            _restore(before)
    size = size_of(path)
    if not os.path.lexists(path):  # removed while we looked
        return None
    stamps = {file.name: status for file, status in before.items()}
    library = stamps.get(str(manifest.get("library")))
    built = stamps[MANIFEST].st_mtime if MANIFEST in stamps else 0.0
    used = None if library is None or _hides_use(path) else library.st_atime
    return Entry(key, path, size, built, used, manifest, problem)


def _manifest(path: Path, key: str) -> Mapping[str, Any]:
    with suppress(DamagedError, OSError):
        artifact = read_entry(path, key, verify=False)
        return {} if artifact is None else artifact.manifest
    return {}


def _missing(path: Path, manifest: Mapping[str, Any]) -> str:
    """What can be seen of damage without reading."""
    for name, recorded in manifest["files"].items():
        try:
            status = (path / name).lstat()
        except OSError as error:
            return "" if not os.path.lexists(path) else f"{name}: {error.strerror}"
        if not stat.S_ISREG(status.st_mode) or status.st_size != recorded["size"]:
            return f"{name} is not the file that was written"
    return ""


def _times(path: Path) -> dict[Path, os.stat_result]:
    found = {}
    with suppress(OSError):
        for file in path.iterdir():
            with suppress(OSError):
                found[file] = file.lstat()
    return found


def _restore(before: Mapping[Path, os.stat_result]) -> None:
    for file, status in before.items():
        with suppress(OSError):  # a read-only store keeps no times, either
            if stat.S_ISREG(status.st_mode):
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _hides_use(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & _NOATIME)
    except OSError:
        return True


def toolchains(store: ArtifactStore) -> tuple[dict[str, Any], ...]:
    """What made the entries of a store: each ``toolchain`` of their manifests, read once while no entry comes or goes."""
    try:
        return _toolchains(store.root, (store.root / "artifacts").stat().st_mtime_ns)
    except OSError:
        return ()


@lru_cache(maxsize=8)
def _toolchains(root: Path, _changed: int) -> tuple[dict[str, Any], ...]:
    made = [artifact.manifest.get("toolchain") for artifact in ArtifactStore(root).entries()]
    found = {json.dumps(values, sort_keys=True): values for values in made if isinstance(values, dict)}
    return tuple(found[text] for text in sorted(found))


def leftovers(store: ArtifactStore) -> list[Leftover]:
    """What builds and damage have left behind, and builds that are at work."""
    found = []
    for kind in LEFTOVERS:
        try:
            paths = sorted((store.root / kind).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        for path in paths:
            with suppress(FileNotFoundError):
                found.append(Leftover(kind, path, size_of(path), path.lstat().st_mtime))
    return found


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; of what vanishes meanwhile, none."""
    total = 0
    with suppress(FileNotFoundError):
        if not path.is_dir():
            return path.lstat().st_size
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).lstat().st_size
    return total
