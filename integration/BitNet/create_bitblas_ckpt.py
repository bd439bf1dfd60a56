"""Converts a BitNet-b1.58 checkpoint to a folder of ours with `bitblas repack`, loads that, and generates."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bitblas.checkpoints.bitnet import LATENT_NORMS
from bitblas.cli import main as bitblas_command
from bitblas.errors import ArgumentError
from load_from_quantized import show
from modeling_bitnet import BitnetForCausalLM
from scripting import parser, positive, random_config, run, say

_EPILOG = """\
SOURCE is a folder in the layout of 1bitLLM/bitnet_b1_58-3B (float weights) or of microsoft/bitnet-b1.58-2B-4T
(packed ones). Without one, a small random model in 1bitLLM's layout is written to a temporary folder, and
converted. The exit status is that of `bitblas repack` where it fails.

  python create_bitblas_ckpt.py
  python create_bitblas_ckpt.py bitnet-b1.58-2B-4T ours --prompt "The capital of France is"
"""


def arguments() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = parser(__doc__ or "", _EPILOG, model=False)
    made.add_argument("source", nargs="?", metavar="SOURCE", help="a folder with the checkpoint")
    made.add_argument("folder", nargs="?", metavar="FOLDER", help="to write; it must not be there yet")
    made.add_argument("--prompt", metavar="TEXT", help="the folder must have a tokenizer; default: random tokens")
    made.add_argument("--new-tokens", type=positive, default=16, metavar="N", help="default: 16")
    return made


def convert(options: argparse.Namespace) -> int:
    """Convert, load, and generate."""
    if options.source is not None and options.folder is None:
        raise ArgumentError("FOLDER is missing: where to write")
    with tempfile.TemporaryDirectory(prefix="bitnet-") as temporary:
        source, folder = options.source, options.folder
        if source is None:
            source, folder = f"{temporary}/bitnet_b1_58", f"{temporary}/ours"
            write_like_1bitllm(BitnetForCausalLM(random_config(options)), Path(source))
        if not Path(source).is_dir():
            raise ArgumentError(
                f"{source} is no folder: `hf download {source} --local-dir DIRECTORY` makes one of a model's name"
            )
        say(f"bitblas repack {source} {folder}")
        status = bitblas_command(["repack", source, folder])
        say()
        return status or show(options, folder, "repacked")


def write_like_1bitllm(model: Any, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a float model as 1bitLLM's folders are: names, a model_type of "llama", weights in float16."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in LATENT_NORMS.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.to(dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config, rope = model.config.to_dict(), model.config.rope_parameters
    for name in ("packed", "fuse_qkv", "fuse_gateup", "rope_parameters", "dtype"):
        config.pop(name, None)
    config |= {"model_type": "llama", "architectures": ["BitnetForCausalLM"], "torch_dtype": str(dtype)[6:]}
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(arguments(), convert))
