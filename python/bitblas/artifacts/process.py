"""What one process alone knows of artifacts: which it is building, and those it keeps because no disk takes them."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from ..errors import ArtifactError
from .record import Artifact

_NOEXEC = getattr(os, "ST_NOEXEC", 0)  # Linux tells; other systems do not
_PROBE_BYTES = 4 << 20  # more than a build writes

#: An OSError with one of these says that a file system does not take our files; any other is a fault.
UNWRITABLE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EIO, errno.ESTALE, errno.ENOLCK),
    }
)


class Process:
    """The keys being built here and the artifacts kept in memory, by store and key; a forked child starts afresh.

    A child must not inherit the locks, whose holders are not in it, nor the artifacts, which its parent removes.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._kept: dict[tuple[Path, str], Artifact] = {}
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[tuple[Path, str], threading.Lock] = WeakValueDictionary()
        self._scratch: Path | None = None

    @contextmanager
    def building(self, root: Path, key: str) -> Iterator[None]:
        """Let one thread at a time build `key`."""
        with self._guard:
            lock = self._locks.setdefault((root, key), threading.Lock())
        with lock:
            yield

    def keep(self, root: Path, artifact: Artifact) -> None:
        """Keep an artifact that the store in `root` cannot take."""
        self._kept[root, artifact.key] = artifact

    def find(self, root: Path, key: str) -> Artifact | None:
        """Return the artifact that was kept, unless a cleaner of temporary files has removed it."""
        found = self._kept.get((root, key))
        return found if found is not None and all((found.path / name).is_file() for name in found.files) else None

    def keys(self, root: Path) -> set[str]:
        """Return the keys of what is kept for the store in `root`."""
        return {key for place, key in list(self._kept) if place == root}

    def drop(self, root: Path, key: str) -> bool:
        """Remove what is kept; return whether there was anything."""
        dropped = self._kept.pop((root, key), None)
        if dropped is not None:
            shutil.rmtree(dropped.path, ignore_errors=True)
        return dropped is not None

    def scratch(self) -> Path:
        """Return a new private directory which lives as long as the process."""
        with self._guard:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="bitblas-", dir=_scratch_parent()))
                atexit.register(_remove_own, self._scratch, os.getpid())
        return Path(tempfile.mkdtemp(dir=self._scratch))


def _scratch_parent() -> Path:
    """Return a directory that takes files and lets libraries be loaded from it."""
    candidates = [Path("/dev/shm")]
    with suppress(FileNotFoundError):  # which says that none of the usual places takes files
        candidates.insert(0, Path(tempfile.gettempdir()))
    for candidate in candidates:
        if candidate.is_dir() and not os.statvfs(candidate).f_flag & _NOEXEC and takes_files(candidate):
            return candidate
    places = " and ".join(str(candidate) for candidate in candidates)
    raise ArtifactError(f"no place for temporary files: {places} are full, read-only or noexec; set TMPDIR to another")


def takes_files(directory: Path) -> bool:
    """Whether as much as a build may write can be written to `directory`."""
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return False
    return True


def _remove_own(directory: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child runs its parent's exit functions too
        shutil.rmtree(directory, ignore_errors=True)


this_process = Process()
os.register_at_fork(after_in_child=this_process.reset)
