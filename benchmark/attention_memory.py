"""`python -m benchmark.attention_memory WHO THREADS CONFIG`: what an attention's first calls in this process add to its memory.

Prints JSON, for `measure`, which starts it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bitblas import FlashAtten, FlashAttenConfig
from bitblas.bench.matmul import bytes_of
from bitblas.errors import BitBLASError

from .attention_cells import OURS, SDPA, draw_attention, native, scaled_dot_product

#: An attention that does hold the matrix of scores: what shows that this measurement sees one.
NAIVE = "a matrix of scores"
_SELF = Path("/proc/self")


@dataclass(frozen=True)
class Growth:
    """By how many bytes a call of attention lets a process grow, at its peak, beside inputs and output.

    Linux counts resident pages for each CPU, and adds them up some 32 at a time: a number is right to 128 KiB a CPU.

    Attributes
    ----------
    first : int
        The first call in the process: with what it loads and sets up, and its threads' stacks.
    later : int
        A later call.
    threads : int
        Of the call.
    """

    first: int
    later: int
    threads: int

    @property
    def per_thread(self) -> float:
        """Bytes of the first call for each thread."""
        return self.first / self.threads


def measure(who: str, config: FlashAttenConfig, threads: int) -> Growth:
    """Start a process that calls a candidate.

    Raises
    ------
    BitBLASError
        It failed, or this system does not tell a process's peak.
    """
    command = [sys.executable, "-m", __spec__.name, who, str(threads), json.dumps(config.fields())]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=False)
    if done.returncode:
        raise BitBLASError(f"no memory of {who} was measured: {done.stderr.strip().splitlines()[-1]}")
    return Growth(**json.loads(done.stdout), threads=threads)


# -- in the process --------------------------------------------------------------------------------------------------------


def growth(call: Callable[[], object]) -> int:
    """Bytes of resident memory at the peak of a call, less those before; free memory goes back to the system first."""
    ctypes.CDLL(None).malloc_trim(0)
    (_SELF / "clear_refs").write_text("5")  # the peak is that of now
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (_SELF / "status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def caller(who: str, config: FlashAttenConfig) -> tuple[Callable[[], object], int]:
    """A call that has all it needs, and how many bytes of output it allocates."""
    work = draw_attention(config)
    out = torch.zeros(work.output_shape, dtype=getattr(torch, config.Out_dtype))
    if who == OURS:
        op = FlashAtten(config)
        return lambda: op(work.q, work.k, work.v, output=out), 0
    q, k, v = native(work.q), native(work.k), native(work.v)
    if who == SDPA:
        return lambda: scaled_dot_product(config, q, k, v), bytes_of([out])
    assert who == NAIVE
    return lambda: torch.softmax(q @ k.mT * config.softmax_scale, -1) @ v, bytes_of([out])


def main() -> None:
    """See the module."""
    who, threads, fields = sys.argv[1:]
    torch.set_num_threads(int(threads))
    call, output = caller(who, FlashAttenConfig(**json.loads(fields)))
    torch.ones(1 << 22).add_(1)  # starts the threads
    with torch.inference_mode():
        found = [max(0, growth(call) - output) for _ in range(2)]
    print(json.dumps(dict(zip(("first", "later"), found, strict=True))))


if __name__ == "__main__":
    main()
