"""The C and CUDA sources that come with the package: where they lie and what identifies them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from .errors import BitBLASError


def source_dir() -> Path:
    """Return the directory of the sources: ``bitblas/src`` of an installation, or ``src`` of a checkout.

    Raises
    ------
    BitBLASError
        Neither is there.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "src", package.parents[1] / "src")
    for candidate in candidates:
        if (candidate / "README.md").is_file():
            return candidate
    looked = " or ".join(str(candidate) for candidate in candidates)
    raise BitBLASError(f"the C sources of bitblas are not in {looked}: the installation is incomplete, reinstall it")


@functools.cache
def source_digest() -> str:
    """Return the sha256 of all sources, names and contents, in hexadecimal; documentation does not count."""
    root = source_dir()
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".md"):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
