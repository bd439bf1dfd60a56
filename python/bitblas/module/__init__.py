"""Door of the public API: layers, by the name that the original BitBLAS gives their module."""

from ..nn import BitLinear, Linear

__all__ = ["BITBLAS_DATABASE_PATH", "BITBLAS_TARGET", "BitLinear", "Linear"]


def __getattr__(name: str) -> object:
    """What the original BitBLAS finds out when it is imported: here when it is asked for."""
    if name == "BITBLAS_TARGET":
        from ..utils import auto_detect_nvidia_target

        return auto_detect_nvidia_target()
    if name == "BITBLAS_DATABASE_PATH":
        from ..cache import get_database_path

        return get_database_path()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
