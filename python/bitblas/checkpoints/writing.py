"""Files that are whole or not there: written aside, synced and renamed; a safetensors file tensor by tensor."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from .shards import TensorInfo

#: What safetensors calls the dtypes that we write.
_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ALIGNMENT = 8
_BUFFER_BYTES = 1 << 20
#: Of a header's entry, without the tensor's name: dtype, shape and offsets.
_ENTRY_BYTES = 256


def partial(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a name to write to; at the end of the block the file is synced and renamed to `path`, or removed on an error."""
    aside = partial(path)
    try:
        yield aside
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    with written(path) as aside, aside.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2) + "\n")
        sync(stream.fileno())


def copy_file(source: Path, path: Path) -> None:
    """Copy a file, whole or not at all."""
    with written(path) as aside, source.open("rb") as found, aside.open("wb") as stream:
        while block := found.read(_BUFFER_BYTES):
            stream.write(block)
        stream.flush()
        sync(stream.fileno())


def sync(descriptor: int) -> None:
    """Wait until a file is on disk."""
    os.fsync(descriptor)


def sync_directory(folder: Path) -> None:
    """Wait until a directory's names are on disk, where the file system can say so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest(path: Path) -> str:
    """The sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BUFFER_BYTES):
            found.update(block)
    return found.hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a `CheckpointError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"the disk of {folder} is full: make room, and run it again to continue") from error
        raise CheckpointError(f"{error.filename or folder}: {error.strerror or error}") from error


class ShardWriter:
    """A safetensors file, written tensor by tensor, so that none of them has to stay in memory.

    The format wants its header first and each tensor at a multiple of its element size: room for the header is kept, and
    filled up with the spaces that the format allows, and tensors whose size would leave the next one misaligned are kept until
    the end. The bytes depend on nothing but what is added, in which order, and on `names`.

    Parameters
    ----------
    path : Path
        Where to write.
    names : iterable of str
        At least all names that will be added.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        room = len(json.dumps(self._entries)) + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._header = -(-room // _ALIGNMENT) * _ALIGNMENT
        self._kept: list[tuple[str, torch.Tensor, str, tuple[int, ...]]] = []
        self._end = 0
        self._stream: BinaryIO = path.open("wb")
        self._stream.seek(8 + self._header)

    def add(self, name: str, tensor: torch.Tensor, info: TensorInfo | None = None) -> None:
        """Append a tensor; `info`, of the file it is from, says dtype and shape where torch may have other names for them."""
        dtype, shape = (info.dtype, info.shape) if info else (_DTYPES[tensor.dtype], tuple(tensor.shape))
        if tensor.nbytes % _ALIGNMENT:
            self._kept.append((name, tensor.clone(), dtype, shape))
        else:
            self._append(name, tensor, dtype, shape)

    def _append(self, name: str, tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> None:
        begin, self._end = self._end, self._end + tensor.nbytes
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, self._end]}
        if tensor.nbytes:
            self._stream.write(as_bytes(tensor).numpy().data)

    def close(self) -> None:
        """Write what was kept and the header, and wait until all is on disk."""
        for name, tensor, dtype, shape in sorted(self._kept, key=lambda kept: -kept[1].element_size()):
            self._append(name, tensor, dtype, shape)
        self._kept.clear()
        header = json.dumps(self._entries, separators=(",", ":")).encode("utf-8")
        if len(header) > self._header:
            raise CheckpointError(f"the header takes {len(header)} bytes, and {self._header} were kept for it")
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", self._header) + header.ljust(self._header))
        self._stream.flush()
        sync(self._stream.fileno())
        self._forget()
        self._stream.close()

    def _forget(self) -> None:
        """Ask that the file be read from disk, and not from memory, when it is checked."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def abandon(self) -> None:
        """Let go of the file, which is not whole."""
        with suppress(OSError):
            self._stream.close()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 (bytes,)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def index_of(weight_map: Mapping[str, str], total_size: int) -> dict[str, Any]:
    """What `model.safetensors.index.json` holds."""
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
