"""The journal of an unfinished run: what it was made from, how, and which files of it are whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ArgumentError, CheckpointError
from .shards import INDEX, read_json
from .writing import digest, partial, sync_directory, write_json

#: Bytes at the beginning of a file that tell it from another: its header, mostly.
_HEAD_BYTES = 1 << 20


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells a file from a changed one without reading it whole: size, time of change, sha256 of its beginning."""
    status = path.stat()
    with path.open("rb") as stream:
        head = hashlib.sha256(stream.read(_HEAD_BYTES)).hexdigest()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "head": head}


def check_folders(source: Path, target: Path) -> None:
    """Refuse folders that lie in each other.

    Raises
    ------
    ArgumentError
        `source` is no directory, or one is the other or in it.
    """
    if not source.is_dir():
        raise ArgumentError(f"SRC is {source}, which is no directory")
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ArgumentError(f"SRC is {source} and DST {target}; neither may be or hold the other")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a directory, which is made where it is missing, against other runs.

    A directory that this made and nothing was put into is removed again.

    Raises
    ------
    CheckpointError
        Another process holds it, or it cannot be made.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing to {folder}") from None
        yield
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):
                folder.rmdir()  # which only removes an empty one


class Journal:
    """What has been done, in a file of the folder that is written.

    Parameters
    ----------
    folder : Path
        DST.
    verb : str
        "repack" or "unpack".
    source : Path
        SRC.
    files : iterable of str
        The files with the weights of SRC.
    options : Mapping
        What else the result depends on, in JSON.

    Raises
    ------
    CheckpointError
        DST holds something else than an unfinished run of this kind.
    """

    def __init__(self, folder: Path, verb: str, source: Path, files: Iterable[str], options: Mapping[str, Any]) -> None:
        self.path = folder / f".{verb}.json"
        self._source, self._files = source, tuple(files)
        self._fingerprints = {file: fingerprint(source / file) for file in self._files}
        self._identity: dict[str, Any] = {
            "verb": verb,
            "bitblas": __version__,
            "options": dict(options),
            "files": list(self._files),
        }
        for name in ("config.json", INDEX):
            self._identity[name] = digest(source / name) if (source / name).is_file() else None
        self._done: dict[str, Any] = {}
        self._resume(folder, verb)
        _remove_partial(folder)

    def _resume(self, folder: Path, verb: str) -> None:
        if not self.path.exists():
            ours = partial(self.path).name
            held = sorted(path.name for path in folder.iterdir() if path.name != ours)
            if held:
                raise CheckpointError(
                    f"DST is {folder}, which holds {held[0]} and no unfinished {verb}: name a new or an empty directory"
                )
            return
        found = read_json(self.path)
        for key, value in self._identity.items():
            if found.get(key) != value:
                raise CheckpointError(
                    f"DST is {folder}, which holds an unfinished {verb} that differs in its {key}: remove it to begin anew"
                )
        done = found.get("done")
        self._done = done if isinstance(done, dict) else {}

    def begin(self) -> None:
        """Write the journal, which from now on says that DST is ours."""
        self._write()

    def done(self, file: str) -> dict[str, Any] | None:
        """What was noted of a file, if it is whole and what it was made from has not changed."""
        entry, path = self._done.get(file), self.path.parent / file
        if entry is None or not path.is_file():
            return None
        try:
            if any(self._fingerprints.get(name) != value for name, value in entry["sources"].items()):
                return None
            same = path.stat().st_size == entry["size"] and digest(path) == entry["sha256"]
            return dict(entry["notes"]) if same else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged: remove {self.path.parent} to begin anew") from error

    def note(self, file: str, made_of: Iterable[str], size: int, sha256: str, notes: Mapping[str, Any]) -> None:
        """Note that a file is whole.

        Parameters
        ----------
        file : str
            Its name.
        made_of : iterable of str
            The files of SRC that it was made from.
        size, sha256 : int, str
            Of the file.
        notes : Mapping
            What to remember of it, in JSON.
        """
        sources = {name: self._fingerprints[name] for name in sorted(made_of)}
        self._done[file] = {"size": size, "sha256": sha256, "sources": sources, "notes": dict(notes)}
        self._write()

    def check_source(self) -> None:
        """Hold the files of SRC against what they were at the beginning.

        Raises
        ------
        CheckpointError
            One has changed.
        """
        for file, found in self._fingerprints.items():
            path = self._source / file
            if not path.is_file() or fingerprint(path) != found:
                raise CheckpointError(f"{path} has changed meanwhile: run it again")

    def give_up(self) -> None:
        """After an error: leave what is whole, to be continued, and nothing where there is nothing."""
        with suppress(OSError):
            _remove_partial(self.path.parent)
            if [path.name for path in self.path.parent.iterdir()] == [self.path.name]:
                self.path.unlink()

    def end(self) -> None:
        """Remove the journal: all is done."""
        self.path.unlink(missing_ok=True)
        sync_directory(self.path.parent)

    def _write(self) -> None:
        write_json(self.path, {**self._identity, "done": self._done})


def _remove_partial(folder: Path) -> None:
    """Remove what an unfinished run was writing."""
    for left in folder.rglob(".*.partial"):
        left.unlink()
