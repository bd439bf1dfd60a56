"""Counts the static memory of a BitNet-b1.58 model, float and packed: its parameters and buffers, and what the device says."""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from typing import Any

import torch

from bitblas.nn import BitLinear, Linear
from scripting import about, float_model, packed_model, parser, run, say, table

_EPILOG = """\
"ternary layers" are all projections with their scales, "rest" the embeddings, the norms and lm_head. On a
card, "allocated" is torch.cuda.memory_allocated(); on a CPU "peak RSS" is the largest memory that the process
ever had, the model's loading, torch and the compiler included. The exit status is 1 where the packed layers
hold more than --limit.

  python eval_gpu_memory.py
  python eval_gpu_memory.py --model bitnet_b1_58-3B --dtype float16 --device cuda
  python eval_gpu_memory.py --packed ours
"""
#: Layers with ternary weights, float or packed: ours, and those of a folder of `bitblas repack`.
_TERNARY = (BitLinear, Linear)


def arguments() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = parser(__doc__ or "", _EPILOG)
    made.add_argument(
        "--limit",
        type=float,
        metavar="X",
        help="bits a weight (default: 2, and 8 bytes a row and 256 a layer beside them)",
    )
    return made


@torch.inference_mode()
def measure(options: argparse.Namespace) -> int:
    """Count, and print the table."""
    model = packed_model(options, options.packed) if options.packed else float_model(options)
    say(about(options, model, options.packed or options.model) + "\n")
    states = {}
    if not options.packed:
        states["float"] = [*count(model), used(options.device)]
        model.quantize()
        gc.collect()
    states["packed"] = after = [*count(model), used(options.device)]
    names = ["ternary layers", "rest", "allocated" if options.device.type == "cuda" else "peak RSS"]
    rows = []
    for index, name in enumerate(names):
        sizes = [state[index] for state in states.values()]
        rows.append([name, *(f"{size / 2**20:.3f}" for size in sizes)])
        rows[-1] += [f"{sizes[1] / sizes[0]:.3f}"] if len(sizes) > 1 else []
    say(table(["", *(f"{state} MiB" for state in states), *(["packed / float"] if len(states) > 1 else [])], rows))
    layers = [layer for layer in model.modules() if isinstance(layer, _TERNARY)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    limit = sum(layer.out_features * (-(-layer.in_features // 4) + 8) + 256 for layer in layers)
    limit = limit if options.limit is None else options.limit * weights / 8
    say(f"\n{after[0] * 8 / weights:.3f} bits a weight; at most {limit * 8 / weights:.3f} are allowed")
    return int(after[0] > limit)


def count(model: Any) -> tuple[int, int]:
    """Bytes of the ternary layers, and of all else; what two share counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    ternary = {
        id(tensor)
        for layer in model.modules()
        if isinstance(layer, _TERNARY)
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    inside = sum(size for key, size in sizes.items() if key in ternary)
    return inside, sum(sizes.values()) - inside


def used(device: torch.device) -> int:
    """Bytes that a card's allocator has given away, or the most that the process ever had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


if __name__ == "__main__":
    sys.exit(run(arguments(), measure))
