"""Loads a packed BitNet-b1.58 model and generates with it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmark_generate import generate
from scripting import (
    about,
    float_model,
    packed_model,
    parser,
    positive,
    prompt_tokens,
    run,
    say,
    synchronize,
    table,
    tokenizer_of,
)

_EPILOG = """\
FOLDER is what BitnetForCausalLM.save_quantized wrote, or `bitblas repack`. Without one, a small random model
is packed, saved to a temporary folder and loaded from there, and the exit status is 1 where its logits are
not, bit for bit, those from before.

  python load_from_quantized.py
  python load_from_quantized.py ours --dtype bfloat16 --prompt "The capital of France is" --new-tokens 32
"""


def arguments() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = parser(__doc__ or "", _EPILOG, model=False)
    made.add_argument("folder", nargs="?", metavar="FOLDER", help="of a packed model")
    made.add_argument("--prompt", metavar="TEXT", help="the folder must have a tokenizer; default: random tokens")
    made.add_argument("--new-tokens", type=positive, default=16, metavar="N", help="default: 16")
    return made


@torch.inference_mode()
def measure(options: argparse.Namespace) -> int:
    """Load, generate, and print."""
    if options.folder:
        return show(options, options.folder)
    options.model = None
    with tempfile.TemporaryDirectory(prefix="bitnet-") as folder:
        original = float_model(options).quantize()
        original.save_quantized(folder)
        tokens = prompt_tokens(options, None, original.config.vocab_size)
        same = torch.equal(original(tokens).logits, packed_model(options, folder)(tokens).logits)
        status = show(options, folder, "random model, saved and loaded")
    say(f"\nlogits after loading: {'bit for bit those from before' if same else 'NOT those from before'}")
    return status or int(not same)


def show(options: argparse.Namespace, folder: str, name: str | None = None) -> int:
    """Load a folder, say how long that took, and generate."""
    began = time.perf_counter()
    model = packed_model(options, folder)
    loaded = time.perf_counter() - began
    tokenizer = tokenizer_of(folder)
    prompt = prompt_tokens(options, tokenizer, model.config.vocab_size)
    generate(model, prompt, 1)
    synchronize(options.device)
    began = time.perf_counter()
    out = generate(model, prompt, options.new_tokens)[0]
    synchronize(options.device)
    seconds = time.perf_counter() - began
    say(about(options, model, name or folder) + "\n")
    megabytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6
    row = [f"{megabytes:.1f}", f"{loaded:.2f}", str(prompt.shape[1]), str(options.new_tokens)]
    say(
        table(
            ["files MB", "load s", "prompt", "new tokens", "tokens/s"], [[*row, f"{options.new_tokens / seconds:.1f}"]]
        )
    )
    new = out[prompt.shape[1] :].tolist()
    said = tokenizer.decode(out) if tokenizer is not None else f"tokens {' '.join(map(str, new))}"
    say(f"\n{'text' if tokenizer is not None else 'generated'}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(run(arguments(), measure))
