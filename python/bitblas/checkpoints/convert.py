"""A folder made from another, one file of weights at a time: whole files only, verified, to be continued when stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any, Protocol

from ..errors import ArgumentError, CheckpointError
from ..logs import progress
from .journal import Journal, locked
from .shards import INDEX, SINGLE, Shards
from .writing import (
    ShardWriter,
    as_bytes,
    copy_file,
    digest,
    disk_errors,
    index_of,
    sync_directory,
    write_json,
    written,
)

#: Files of a folder that are not copied: weights in any form, and what described them.
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".index.json",
)
_DESCRIPTIONS = ("config.json", "quantize_config.json", "quant_config.json")

#: Bytes beyond what is expected that have to be free.
_SPARE_BYTES = 1 << 20


class Piece(Protocol):
    """Some tensors of the new folder that are made together: those of a layer, or one that is copied."""

    @property
    def name(self) -> str:
        """Of the layer or tensor."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors of the source that it is made from; that which decides the file comes first."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """At least the tensors that are made."""

    @property
    def max_bytes(self) -> int:
        """What these take, at most."""

    def write(self, source: Shards, writer: ShardWriter) -> Any:
        """Make the tensors, and return what to remember in the journal, or None."""

    def check(self, source: Shards, made: Shards, note: Any) -> None:
        """Compare what was made with the source; raise CheckpointError where it is not the same."""


@dataclass(frozen=True)
class Copy:
    """A tensor that is copied as it is, and may get a new name."""

    name: str
    max_bytes: int
    new_name: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The copy."""
        return (self.new_name or self.name,)

    def write(self, source: Shards, writer: ShardWriter) -> None:
        """Copy it."""
        writer.add(self.outputs[0], source.get(self.name), source.infos[self.name])

    def check(self, source: Shards, made: Shards, note: None) -> None:
        """Compare it byte by byte."""
        copy = self.outputs[0]
        ours, theirs = as_bytes(made.get(copy)).numpy(), as_bytes(source.get(self.name)).numpy()
        for first in range(0, max(ours.size, theirs.size), 1 << 20):
            if ours[first : first + (1 << 20)].tobytes() != theirs[first : first + (1 << 20)].tobytes():
                raise CheckpointError(f"{made.where(copy)} is not what {source.where(self.name)} is")


@dataclass(frozen=True)
class Task:
    """What to make of a folder.

    Attributes
    ----------
    verb : str
        What it is called: "repack", "unpack".
    options : Mapping
        What the result depends on beside the source, in JSON.
    pieces : sequence of Piece
        All of them.
    config : callable
        Takes the notes by the names of their pieces, and gives the new `config.json`.
    """

    verb: str
    options: Mapping[str, Any]
    pieces: Sequence[Piece]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes
    ----------
    layers : int
        Layers that were converted, those of an earlier, unfinished run as well.
    formats : dict
        How many of them have which format.
    bytes_in, bytes_out : int
        Size of the weights of SRC and of DST.
    converted_bytes : int
        Size of the weights of SRC that this run converted: less than `bytes_in` where it continued another.
    seconds : float
        What it took.
    verified : bool
        Whether the layers were compared with the source.
    """

    layers: int
    formats: dict[str, int]
    bytes_in: int
    bytes_out: int
    converted_bytes: int
    seconds: float
    verified: bool

    @property
    def mb_per_second(self) -> float:
        """Megabytes (10^6) of the source's weights a second."""
        return self.converted_bytes / 1e6 / self.seconds if self.seconds else 0.0


def convert(source: Shards, target: Path, task: Task, verify: bool) -> Summary:
    """Do a task.

    Parameters
    ----------
    source : Shards
        The weights of SRC.
    target : Path
        DST, apart from SRC: missing, empty, or left by an unfinished run of the same task.
    task : Task
        What to do.
    verify : bool
        Whether to compare what was written with the source.

    Raises
    ------
    CheckpointError
        The source is damaged, DST cannot be written or holds something else, or what was written is not what it should be.
    """
    begin = time.perf_counter()
    with disk_errors(target), locked(target):
        journal = Journal(target, task.verb, source.folder, source.files, {**task.options, "verify": verify})
        try:
            journal.begin()
            return _convert(source, target, task, journal, begin, verify)
        except BaseException:
            source.close()
            journal.give_up()
            raise


def _convert(source: Shards, target: Path, task: Task, journal: Journal, begin: float, verify: bool) -> Summary:
    files = _by_file(source, task.pieces)
    notes: dict[str, Any] = {}
    finished = {file: found for file in files if (found := journal.done(file)) is not None}
    for found in finished.values():
        notes.update(found)
    left = {file: pieces for file, pieces in files.items() if file not in finished}
    others = sum(path.stat().st_size for path in other_files(source.folder))
    _check_room(target, sum(piece.max_bytes for pieces in left.values() for piece in pieces) + others)
    with progress(f"{task.verb}ing", sum(map(len, left.values())) * (2 if verify else 1)) as step:
        for file, pieces in left.items():
            notes.update(_make_file(source, target / file, pieces, journal, step, verify))
    source.close()
    bytes_out = _finish(source, target, list(files), task.config(notes), journal)
    formats: dict[str, int] = {}
    for note in notes.values():
        formats[note["W_dtype"]] = formats.get(note["W_dtype"], 0) + 1
    converted = {name for pieces in left.values() for piece in pieces for name in piece.inputs}
    return Summary(
        layers=len(notes),
        formats=dict(sorted(formats.items())),
        bytes_in=sum(info.num_bytes for info in source.infos.values()),
        bytes_out=bytes_out,
        converted_bytes=sum(source.infos[name].num_bytes for name in converted),
        seconds=time.perf_counter() - begin,
        verified=verify,
    )


def _by_file(source: Shards, pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each new file, in the order in which their tensors lie in the source."""
    files: dict[str, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: source.infos[piece.inputs[0]].begin):
        files.setdefault(source.infos[piece.inputs[0]].file, []).append(piece)
    if len(source.files) == 1:
        return dict(zip([SINGLE], files.values(), strict=True))
    return dict(sorted(files.items()))


def _check_room(target: Path, needed: int) -> None:
    free = disk_usage(target).free
    if needed + _SPARE_BYTES > free:
        raise CheckpointError(
            f"up to {needed / 1e6:.0f} MB are to be written to {target}, and its disk has {free / 1e6:.0f} MB free"
        )


def _make_file(
    source: Shards, path: Path, pieces: Sequence[Piece], journal: Journal, step: Callable[[str], None], verify: bool
) -> dict[str, Any]:
    """Write a file, compare it with the source, give it its name, and note that it is whole."""
    notes: dict[str, Any] = {}
    with written(path) as aside:
        writer = ShardWriter(aside, [name for piece in pieces for name in piece.outputs])
        try:
            for piece in pieces:
                step(piece.name)
                with blamed(source, piece):
                    note = piece.write(source, writer)
                if note is not None:
                    notes[piece.name] = note
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        sha256, size = digest(aside), aside.stat().st_size
        if verify:
            made = Shards(path.parent, [aside.name])
            for piece in pieces:
                step(piece.name)
                with blamed(source, piece):
                    piece.check(source, made, notes.get(piece.name))
            made.close()
    made_of = {source.infos[name].file for piece in pieces for name in piece.inputs}
    journal.note(path.name, made_of, size, sha256, notes)
    return notes


@contextmanager
def blamed(source: Shards, piece: Piece) -> Iterator[None]:
    """Name the tensor and its file where one of a piece's is not what it should be."""
    try:
        yield
    except ArgumentError as error:
        part, _, rest = str(error).partition(" ")
        tensor = f"{piece.name}.{part}"
        where = f"{source.where(tensor)} {rest}" if tensor in source else f"{source.where(piece.inputs[0])}: {error}"
        raise CheckpointError(where) from error


def _finish(source: Shards, target: Path, files: Sequence[str], config: dict[str, Any], journal: Journal) -> int:
    """Write all but the weights, `config.json` last, and end the journal; return the bytes of all weights."""
    made = Shards(target, files)
    total = sum(info.num_bytes for info in made.infos.values())
    for path in other_files(source.folder):
        there = target / path.relative_to(source.folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, there)
    if files != [SINGLE]:
        write_json(target / INDEX, index_of({name: info.file for name, info in made.infos.items()}, total))
    journal.check_source()
    write_json(target / "config.json", config)
    sync_directory(target)
    journal.end()
    return total


def other_files(folder: Path) -> list[Path]:
    """The files of a folder that are neither weights nor say how these are quantized; hidden ones are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        if not path.name.endswith(_WEIGHTS) and (len(parts) > 1 or path.name not in _DESCRIPTIONS):
            found.append(path)
    return found
