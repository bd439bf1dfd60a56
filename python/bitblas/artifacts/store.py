"""The content-addressed store: staging, locks, atomic publication, quarantine."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import env
from ..errors import ArgumentError, ArtifactError
from ..logs import get_logger, warn_once
from .process import UNWRITABLE, takes_files, this_process
from .record import RESERVED, Artifact, DamagedError, describe, read_entry, write_manifest

_KEY = re.compile(r"[0-9a-f]{64}")

Build = Callable[[Path], Mapping[str, object]]


class _UnwritableError(Exception):
    """The store cannot take an artifact that was to be built."""


class ArtifactStore:
    """A directory of artifacts which many processes share.

    It holds ``artifacts/<key>``, published by renaming and never written again; ``staging/<key>.<random>``, touched
    only by the holder of the key's lock; ``locks/<key>.lock``; ``quarantine`` for damaged entries and ``failed`` for
    builds kept by BITBLAS_KEEP_BUILD.

    Parameters
    ----------
    root : str or Path
        The directory. It is created, for this user alone, when the first artifact is built.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.realpath(root))
        self._artifacts = self.root / "artifacts"
        self._staging = self.root / "staging"
        self._locks = self.root / "locks"
        self._quarantine = self.root / "quarantine"
        self._failed = self.root / "failed"
        self._directories = (self.root, self._artifacts, self._staging, self._locks, self._quarantine)

    def __repr__(self) -> str:
        return f"ArtifactStore({str(self.root)!r})"

    def load(self, key: str) -> Artifact | None:
        """Return the verified artifact of `key`, or None.

        A damaged entry is moved to the quarantine with a warning. Nothing is written, locked or created otherwise, so
        that a read-only store serves.

        Raises
        ------
        ArtifactError
            Others may write the store.
        """
        _check_key(key)
        self.check_private()
        try:
            found = read_entry(self._artifacts / key, key)
        except DamagedError as damage:
            found = self._load_again(key, damage)
        return found or this_process.find(self.root, key)

    def get_or_build(self, key: str, build: Build) -> tuple[Artifact, bool]:
        """Return the artifact of `key`, building it where it is missing: once for all threads and processes.

        Parameters
        ----------
        key : str
            From :func:`artifact_key`.
        build : Callable[[Path], Mapping[str, object]]
            Writes regular files into the empty directory it is given, and returns metadata for the manifest, of which
            ``library`` names the shared library among the files. It may be called a second time when the store ran out
            of room under it.

        Returns
        -------
        tuple[Artifact, bool]
            The artifact, and whether this call built it. Where the store cannot be written the artifact lives in a
            temporary directory until the process ends; the first time that happens a warning says so.

        Raises
        ------
        ArtifactError
            Others may write the store, or `build` left something that is no artifact.
        """
        found = self.load(key)
        if found is not None:
            return found, False
        with this_process.building(self.root, key):
            found = this_process.find(self.root, key)
            if found is not None:
                return found, False
            try:
                return self._get_or_build_locked(key, build)
            except _UnwritableError as refusal:
                _warn_unwritable(self.root, refusal)
                directory = this_process.scratch()
                return self._keep(key, directory, describe(directory, key, build(directory))), True

    def adopt(self, key: str, manifest: Mapping[str, Any], write: Callable[[Path], None]) -> tuple[Artifact, bool]:
        """Return the artifact of `key`, taking a copy of one that was built elsewhere where it is missing.

        Parameters
        ----------
        key : str
            Its key.
        manifest : Mapping[str, Any]
            Its manifest.
        write : Callable[[Path], None]
            Writes its files into the empty directory it is given.

        Returns
        -------
        tuple[Artifact, bool]
            As of `get_or_build`.

        Raises
        ------
        DamagedError
            `write` has left other files than the manifest says. Nothing was published.
        """
        metadata = {name: value for name, value in manifest.items() if name not in RESERVED}

        def fill(staging: Path) -> Mapping[str, object]:
            write(staging)
            if describe(staging, key, metadata)["files"] != manifest["files"]:
                raise DamagedError("its files are not what was written")
            return metadata

        return self.get_or_build(key, fill)

    def entries(self) -> list[Artifact]:
        """Return the artifacts on disk, sorted by key; their files are not verified, damaged manifests left out."""
        self.check_private()
        found = []
        for key in self.keys():
            try:
                found.append(read_entry(self._artifacts / key, key, verify=False))
            except DamagedError as damage:
                get_logger().debug("artifact %s is damaged: %s", key, damage)
        return [artifact for artifact in found if artifact is not None]

    def remove(self, key: str) -> bool:
        """Remove the artifact of `key`; return whether there was one. A library in use by a process stays loaded."""
        _check_key(key)
        dropped = this_process.drop(self.root, key)
        if not os.path.lexists(self._artifacts / key):
            return dropped
        self._prepare()
        with self._lock(key):
            trash = self._staging / f"{key}.{uuid.uuid4().hex[:16]}"
            try:
                (self._artifacts / key).rename(trash)  # whole at once, so that no reader sees a half of it
            except FileNotFoundError:
                return dropped
            shutil.rmtree(trash)
        return True

    def discard(self, leftover: Path) -> bool:
        """Remove a directory of ``staging``, unless its build is at work, of ``quarantine`` or ``failed``; return whether."""
        if leftover.parent not in (self._staging, self._quarantine, self._failed):
            raise ArgumentError(
                f"leftover is {leftover}: it is not in the staging, quarantine or failed of {self.root}"
            )
        if leftover.parent == self._staging:
            return self._discard_staging(leftover)
        shutil.rmtree(leftover, ignore_errors=True)
        return not os.path.lexists(leftover)

    def clear(self) -> int:
        """Remove all artifacts, and what was set aside; return how many artifacts there were."""
        self.check_private()
        removed = sum(self.remove(key) for key in {*self.keys(), *this_process.keys(self.root)})
        for directory in (self._quarantine, self._failed):
            shutil.rmtree(directory, ignore_errors=True)
        return removed

    def size(self) -> int:
        """Return the bytes that the artifacts on disk occupy, and what was set aside."""
        total = 0
        for directory in (self._artifacts, self._quarantine, self._failed):
            for folder, _, names in os.walk(directory):
                for name in names:
                    with suppress(FileNotFoundError):  # another process may be removing
                        total += Path(folder, name).lstat().st_size
        return total

    def keys(self) -> list[str]:
        """Return the keys of all entries on disk, sorted; what they hold is not looked at."""
        try:
            return sorted(path.name for path in self._artifacts.iterdir() if _KEY.fullmatch(path.name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _load_again(self, key: str, damage: DamagedError) -> Artifact | None:
        """Look again under the lock, since another process may have mended the entry; else set it aside."""
        try:
            with _unwritable_store():
                self._prepare()
                with self._lock(key):
                    return self._load_locked(key)
        except _UnwritableError as refusal:
            get_logger().warning("artifact %s is damaged (%s) and cannot be set aside (%s)", key, damage, refusal)
            return None

    def _load_locked(self, key: str) -> Artifact | None:
        entry = self._artifacts / key
        try:
            return read_entry(entry, key)
        except DamagedError as damage:
            aside = self._quarantine / f"{key}.{uuid.uuid4().hex[:16]}"
            entry.rename(aside)
            get_logger().warning("artifact %s is damaged (%s): moved to %s, to be built again", key, damage, aside)
            return None

    def _get_or_build_locked(self, key: str, build: Build) -> tuple[Artifact, bool]:
        with ExitStack() as stack:
            with _unwritable_store():
                self._prepare()
                stack.enter_context(self._lock(key))
                found = self._load_locked(key)
                if found is not None:
                    return found, False
                self._sweep(key)
                staging = self._staging / f"{key}.{uuid.uuid4().hex[:16]}"
                staging.mkdir(mode=0o755)
            try:
                return self._build(key, build, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # renamed away unless something failed

    def _build(self, key: str, build: Build, staging: Path) -> tuple[Artifact, bool]:
        try:
            manifest = describe(staging, key, build(staging))
        except Exception as error:
            if not takes_files(staging):  # a compiler reports a full disk in its own way
                raise _UnwritableError(str(error)) from error
            self._keep_failed(staging)
            raise
        try:
            with _unwritable_store():
                return self._publish(key, staging, manifest), True
        except _UnwritableError as refusal:  # it is built: save it rather than build it again
            _warn_unwritable(self.root, refusal)
            directory = this_process.scratch()
            for name in manifest["files"]:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(staging / name, directory / name)
            return self._keep(key, directory, manifest), True

    def _publish(self, key: str, staging: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Make `staging` durable and rename it to its final place, or return what is there already."""
        write_manifest(staging, manifest)
        _sync_tree(staging)
        entry = self._artifacts / key
        try:
            staging.rename(entry)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            found = self._load_locked(key)  # a process that our lock does not reach has been faster
            if found is not None:
                return found
            staging.rename(entry)
        with suppress(OSError):  # published: only a crash of the machine could undo it
            _sync(self._artifacts)
        return Artifact(key, entry, MappingProxyType(dict(manifest)))

    def _keep(self, key: str, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        artifact = Artifact(key, directory, MappingProxyType(dict(manifest)))
        this_process.keep(self.root, artifact)
        return artifact

    def _keep_failed(self, staging: Path) -> None:
        if not env.KEEP_BUILD.get():
            return
        kept = self._failed / staging.name
        self._failed.mkdir(mode=0o700, exist_ok=True)
        staging.rename(kept)
        get_logger().warning("the files of the failed build are in %s", kept)

    def _sweep(self, key: str) -> None:
        """Remove what builds of dead processes have left: whoever holds a key's lock owns all staging of that key."""
        for leftover in self._staging.iterdir():
            if leftover.name.partition(".")[0] == key:
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                self._discard_staging(leftover)

    def _discard_staging(self, leftover: Path) -> bool:
        from filelock import FileLock, Timeout

        owner = leftover.name.partition(".")[0]
        if _KEY.fullmatch(owner):
            with suppress(Timeout), FileLock(self._locks / f"{owner}.lock", timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)
        return not os.path.lexists(leftover)

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold the lock of `key` among processes and threads. The kernel frees it when its holder dies."""
        from filelock import FileLock, Timeout  # here, since a warm start needs no lock and has 10 ms in all

        lock = FileLock(self._locks / f"{key}.lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            get_logger().info("waiting for another process that builds artifact %s", key)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _prepare(self) -> None:
        for directory in self._directories:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.check_private()

    def check_private(self) -> None:
        """Raise ArtifactError where others may write the store."""
        for directory in self._directories:
            _check_private(directory)


def _check_key(key: str) -> None:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ArgumentError(f"key is {key!r}: expected 64 hexadecimal digits, as artifact_key returns")


def _check_private(directory: Path) -> None:
    """Refuse a directory in which somebody else could put or replace a library that this process would run."""
    try:
        status = directory.stat()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return  # not there, or not ours to see: nothing will be loaded from it
    mode, quoted = stat.S_IMODE(status.st_mode), shlex.quote(str(directory))
    if status.st_uid not in (0, os.geteuid()):
        raise ArtifactError(
            f"the artifact directory {directory} belongs to user {status.st_uid} (mode {mode:04o}), who could replace "
            f"what this process loads: run `chown -R {os.geteuid()} {quoted} && chmod go-w {quoted}`, "
            f"or set {env.CACHE_DIR.name} to a directory of your own"
        )
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ArtifactError(
            f"the artifact directory {directory} may be written by others (mode {mode:04o}), who could replace "
            f"what this process loads: run `chmod go-w {quoted}`"
        )


def _warn_unwritable(root: Path, refusal: Exception) -> None:
    warn_once(
        "artifacts.unwritable",
        "compiled operators cannot be kept in %s (%s): they stay in memory and are built again by the next process; "
        "free some room, or set %s to a directory that can be written",
        root,
        refusal,
        env.CACHE_DIR.name,
    )


@contextmanager
def _unwritable_store() -> Iterator[None]:
    """Turn an OSError that refuses our files into _UnwritableError."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _UnwritableError(str(error)) from error


def _sync_tree(directory: Path) -> None:
    """Make all files read-only for everybody, and durable together with the names that lead to them."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            path.chmod(0o555 if path.stat().st_mode & stat.S_IXUSR else 0o444)
            _sync(path)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)
