"""Which target the first, or another, NVIDIA device of this machine would be."""

from __future__ import annotations

from ..logs import get_logger
from ..machines import CARDS
from ..target import device_arch


def auto_detect_nvidia_target(gpu_id: int = 0) -> str:
    """Name a target that operators can be built for on this machine.

    It never raises, so that it can be called when a module is imported. It looks at the devices at each call, and is
    not called by importing bitblas.

    Parameters
    ----------
    gpu_id : int
        Which of the devices that torch sees.

    Returns
    -------
    str
        ``"cuda -arch=sm_XY"`` for that device; ``"llvm"``, which is this CPU, where there is no such device, or none that this
        process can use, such as a child that was forked from one which uses CUDA.
    """
    try:
        arch = device_arch(gpu_id)
    except Exception as error:  # noqa: BLE001 - drivers fail in many ways, and none of them is the caller's business
        get_logger().info("CUDA device %r does not tell its architecture: %s", gpu_id, error)
        return "llvm"
    return f"cuda -arch={arch}" if arch else "llvm"


def get_all_nvidia_targets() -> list[str]:
    """Names of the NVIDIA cards that are known as targets, such as ``"nvidia/nvidia-a100"``."""
    return [f"nvidia/{name}" for name in CARDS]
