"""What `ptxas` says that a kernel takes: registers, spills, stack and shared memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

_FUNCTION = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """What one thread, or one block, of a kernel takes.

    Attributes
    ----------
    registers : int
        Of a thread.
    spill_stores, spill_loads : int
        Bytes that a thread moves for want of registers.
    stack : int
        Bytes of a thread's stack, spills included.
    shared : int
        Bytes of a block's static shared memory.
    """

    registers: int
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0

    def fields(self) -> dict[str, int]:
        """As JSON values."""
        return asdict(self)


def parse_ptxas(text: str) -> dict[str, KernelResources]:
    """Read the output of ``ptxas -v``.

    Returns
    -------
    dict
        By name of the kernel; of one that was compiled for several cards, for the last.
    """
    found: dict[str, KernelResources] = {}
    name, frame = None, (0, 0, 0)
    for line in text.splitlines():
        if match := _FUNCTION.search(line):
            name, frame = match[1], (0, 0, 0)
        elif match := _FRAME.search(line):
            frame = (int(match[1]), int(match[2]), int(match[3]))
        elif name is not None and (match := _REGISTERS.search(line)):
            shared = _SHARED.search(line)
            stack, stores, loads = frame
            found[name] = KernelResources(int(match[1]), stores, loads, stack, int(shared[1]) if shared else 0)
            name = None
    return found


def read_resources(manifest: Mapping[str, object]) -> dict[str, KernelResources]:
    """What the manifest of an artifact says of its kernels, by name; empty where no `ptxas` has told."""
    kept = manifest.get("resources")
    if not isinstance(kept, Mapping):
        return {}
    return {str(name): KernelResources(**fields) for name, fields in kept.items()}
