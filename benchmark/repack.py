"""How fast folders are repacked: a synthetic GPTQ model of about 1 GB, one thread, with and without verification.

Run by `python -m benchmark.repack`. Each run is a process of its own, so that its peak of memory is its own. The source is on
disk and in the page cache; what is written is synced, and read back from the disk. A plain copy of the source, synced as well,
says what the disk alone takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}
GROUP = 128


def make(folder: Path, megabytes: int, shards: int, method: str, act_order: bool) -> None:
    """Write a model of random codes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    size, block, weight_map = 0, 0, {}
    for shard in range(shards):
        tensors: dict[str, torch.Tensor] = {}
        while size < megabytes * 1e6 * (shard + 1) / shards:
            for name, (n, k) in SHAPES.items():
                layer = _layer(n, k, method, act_order, generator)
                tensors |= {f"model.layers.{block}.{name}.{part}": tensor for part, tensor in layer.items()}
                size += sum(tensor.nbytes for tensor in layer.values())
            block += 1
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        with (folder / file).open("rb") as stream:
            os.fsync(stream.fileno())  # or it would be written while we measure
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    quantization: dict[str, object] = {"quant_method": method, "bits": 4, "group_size": GROUP, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}), encoding="utf-8")


def _layer(n: int, k: int, method: str, act_order: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shape = (k // 8, n) if method == "gptq" else (k, n // 8)
    drawn = {
        "qweight": _words(shape, generator),
        "qzeros": _words((k // GROUP, n // 8), generator) & 0x77777777,
        "scales": torch.rand(k // GROUP, n, generator=generator).half(),
    }
    if method == "gptq":
        groups = torch.arange(k, dtype=torch.int32) // GROUP
        drawn["g_idx"] = groups[torch.randperm(k, generator=generator)] if act_order else groups
    return drawn


def _words(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, generator=generator)


def measure(source: Path, target: Path, threads: int, *options: str) -> dict[str, object]:
    """Repack in a process of its own: what `bitblas repack --json` says."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "bitblas", "repack", str(source), str(target), "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shutil.rmtree(target)
    return json.loads(done.stdout)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the weights and sync them."""
    begin = time.perf_counter()
    target.mkdir()
    for path in source.glob("*.safetensors"):
        with path.open("rb") as found, (target / path.name).open("wb") as stream:
            shutil.copyfileobj(found, stream, 1 << 20)
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--method", choices=("gptq", "awq"), default="gptq")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        make(source, options.megabytes, options.shards, options.method, options.act_order)
        largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
        print(
            f"{options.method}, uint4 g{GROUP}, {options.threads} thread(s), {options.shards} shards of {largest / 1e6:.0f} MB"
        )
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        for _ in range(options.rounds):
            print(f"plain copy: {size / 1e6 / copy(source, target):.0f} MB/s")
            for name, more in {"verified": (), "not verified": ("--no-verify",)}.items():
                found = measure(source, target, options.threads, *more)
                print(
                    f"{name}: {found['bytes_in'] / 1e6:.0f} MB in {found['seconds']:.2f} s, {found['mb_per_second']:.0f} MB/s, "
                    f"peak memory {found['peak_memory_bytes'] / 1e6:.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
