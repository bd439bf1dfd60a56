"""The safetensors files of a folder: which tensors are in them, and these, read when they are asked for."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: Bytes that are read before a file is opened anew, so that what was mapped of it leaves the memory.
_MAPPED_BYTES = 128 << 20
#: A header is no longer than that (a limit of the format's own library).
_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype as safetensors calls it ("F16"), shape, and first and last byte of the data."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


class Shards:
    """The tensors of some safetensors files of a folder.

    Parameters
    ----------
    folder : Path
        Where they lie.
    files : iterable of str
        Their names.

    Raises
    ------
    CheckpointError
        A file is missing, truncated or not of this format, or two have a tensor of the same name.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder = folder
        self.files = tuple(files)
        self.infos: dict[str, TensorInfo] = {}
        self._open: tuple[str, Any] | None = None
        self._mapped = 0
        for file in self.files:
            for name, info in _read_header(folder, file).items():
                if name in self.infos:
                    raise CheckpointError(f"{name} is in {self.infos[name].file} and in {file} of {folder}")
                self.infos[name] = info

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def where(self, name: str) -> str:
        """The tensor and its file, for an error."""
        info = self.infos.get(name)
        return f"{name} in {self.folder / info.file}" if info else f"{name} of {self.folder}"

    def get(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file.

        Raises
        ------
        CheckpointError
            There is none of that name, or it cannot be read.
        """
        info = self.infos.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        if self._open is None or self._open[0] != info.file or self._mapped > _MAPPED_BYTES:
            self.close()
            self._open = (info.file, _opened(self.folder / info.file))
        self._mapped += info.num_bytes
        try:
            tensor: torch.Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self.where(name)} cannot be read: {error}") from error
        return tensor

    def find(self, name: str) -> torch.Tensor | None:
        """`get`, or None where there is no such tensor."""
        return self.get(name) if name in self.infos else None

    def close(self) -> None:
        """Let go of the file that is open. Tensors that were handed out stay valid."""
        self._open, self._mapped = None, 0


def open_shards(folder: Path) -> Shards:
    """The tensors of a model: those of the files that its index names, or of the one file that there is.

    Raises
    ------
    CheckpointError
        There is none, the index is wrong, or a file is.
    """
    index = folder / INDEX
    if not index.is_file():
        return Shards(folder, [_single(folder)])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors and files")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r}; expected the name of a .safetensors file beside it")
        if not (folder / file).is_file():
            name = next(name for name, other in weight_map.items() if other == file)
            raise CheckpointError(f"{index} says that {name} is in {file}, and there is no such file")
    shards = Shards(folder, files)
    for name, file in weight_map.items():
        if name not in shards or shards.infos[name].file != file:
            raise CheckpointError(f"{index} says that {name} is in {file}, which has no such tensor")
    return shards


def _single(folder: Path) -> str:
    """The name of the file of a model that is in one."""
    if (folder / SINGLE).is_file():
        return SINGLE
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder} has {len(found)} .safetensors files and no {INDEX} that says what is in them")
    pickled = sorted(path.name for ending in ("bin", "pt", "pth") for path in folder.glob(f"*.{ending}"))
    if pickled:
        raise CheckpointError(
            f"{folder} holds pickled weights ({pickled[0]}), which are not read, since they can run code: convert them, "
            "with model.save_pretrained(..., safe_serialization=True) of transformers"
        )
    raise CheckpointError(f"{folder} has no weights: no {SINGLE} and no {INDEX}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    CheckpointError
        There is no such file, or no object in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no object")
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_header(folder: Path, file: str) -> dict[str, TensorInfo]:
    """The tensors of a file. Its library checks the header as well; this says which tensor is cut off."""
    path = folder / file
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is truncated, or no safetensors file: it ends within its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        infos = {name: _parse_info(file, entry) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged, or no safetensors file: its header cannot be read: {error}"
        ) from error
    for name, info in infos.items():
        if 8 + length + info.end > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, and {name} ends at byte {8 + length + info.end}"
            )
    _opened(path)
    return infos


def _parse_info(file: str, entry: Any) -> TensorInfo:
    """An entry of a header; raises ValueError, KeyError or TypeError where it is none."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError(f"a tensor has dtype {dtype!r} and shape {shape!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or begin > end:
        raise ValueError(f"a tensor has shape {shape} and offsets {[begin, end]}")
    return TensorInfo(file, dtype, tuple(shape), begin, end)
