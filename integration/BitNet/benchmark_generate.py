"""Times transformers' `generate` with a packed BitNet-b1.58 model: tokens a second, by batch size."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch

from scripting import about, compared, in_turns, numbers, parser, positive, random_tokens, run, say, table

_EPILOG = """\
Every sequence starts with --prompt-tokens random tokens and goes on for exactly --new-tokens, chosen
greedily. Tokens a second count the new ones of all sequences, over the time of the whole call, the prompt
included. "dense" is transformers' model with torch.nn.Linear and the same weights, not quantized at all;
"times" is packed over dense.

  python benchmark_generate.py
  python benchmark_generate.py --model bitnet_b1_58-3B --dtype bfloat16 --batches 1 --new-tokens 64
  python benchmark_generate.py --packed ours --new-tokens 64
"""


def arguments() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = parser(__doc__ or "", _EPILOG)
    made.add_argument("--batches", type=numbers, default=[1, 8], metavar="B,...", help="batch sizes (default: 1,8)")
    made.add_argument("--prompt-tokens", type=positive, default=16, metavar="N", help="default: 16")
    made.add_argument("--new-tokens", type=positive, default=16, metavar="N", help="default: 16")
    made.add_argument("--rounds", type=positive, default=3, metavar="N", help="turns of each (default: 3)")
    made.add_argument("--no-dense", action="store_true", help="time the packed model only")
    return made


@torch.inference_mode()
def measure(options: argparse.Namespace) -> int:
    """Time all, and print the table."""
    models = compared(options)
    packed = models["packed"]
    say(about(options, packed, options.packed or options.model) + "\n")
    rows = []
    for batch in options.batches:
        prompt = random_tokens(options, packed.config.vocab_size, batch, options.prompt_tokens)
        calls = {name: partial(generate, model, prompt, options.new_tokens) for name, model in models.items()}
        seconds = in_turns(calls, options.device, options.rounds)
        speeds = [batch * options.new_tokens / value for value in seconds.values()]
        times = [f"{speeds[-1] / speeds[0]:.2f}"] if len(speeds) > 1 else []
        rows.append([str(batch), *(f"{speed:.1f}" for speed in speeds), *times])
    header = ["batch", *(f"{name} tokens/s" for name in models), *(["times"] if len(models) > 1 else [])]
    say(table(header, rows))
    return 0


def generate(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """`count` tokens after a prompt, greedily; an end token ends nothing."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


if __name__ == "__main__":
    sys.exit(run(arguments(), measure))
