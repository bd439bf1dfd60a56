"""Times a forward pass of a BitNet-b1.58 model: prompts (prefill) and single tokens after them (decode)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from scripting import about, compared, in_turns, pairs, parser, positive, random_tokens, run, say, table

_EPILOG = """\
Columns: "dense" is transformers' model with torch.nn.Linear and the same weights, not quantized at all;
"packed" is the same model after quantize(); "times" is how many times as long dense takes. Milliseconds are
medians of turns.

  python benchmark_inference_latency.py
  python benchmark_inference_latency.py --model bitnet_b1_58-3B --dtype bfloat16 --sets 1x128,1x2048,16x1 --rounds 3
  python benchmark_inference_latency.py --packed ours
"""


def arguments() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = parser(__doc__ or "", _EPILOG)
    made.add_argument(
        "--sets", type=pairs, default=pairs("1x16,1x128,8x16"), metavar="BxT,...", help="batch sizes and tokens of a "
        "prompt; decode is timed after each of them (default: 1x16,1x128,8x16)"
    )  # fmt: skip
    made.add_argument("--rounds", type=positive, default=7, metavar="N", help="turns of each (default: 7)")
    made.add_argument("--no-dense", action="store_true", help="time the packed model only")
    return made


@torch.inference_mode()
def measure(options: argparse.Namespace) -> int:
    """Time all, and print the table."""
    models = compared(options)
    packed = models["packed"]
    say(about(options, packed, options.packed or options.model) + "\n")
    rows = []
    for batch, length in options.sets:
        prompt = random_tokens(options, packed.config.vocab_size, batch, length)
        for what, make in (("prefill", prefill), ("decode", decode)):
            calls = {name: make(model, prompt) for name, model in models.items()}
            rows.append(row(batch, length, what, in_turns(calls, options.device, options.rounds)))
    header = ["batch", "tokens", "pass", *(f"{name} ms" for name in models), *(["times"] if len(models) > 1 else [])]
    say(table([*header, "packed tokens/s"], rows))
    return 0


def prefill(model: torch.nn.Module, prompt: torch.Tensor) -> Callable[[], object]:
    """A call that reads a prompt, up to the logits of what follows."""
    return lambda: model(prompt, use_cache=True, logits_to_keep=1)


def decode(model: torch.nn.Module, prompt: torch.Tensor) -> Callable[[], object]:
    """A call that reads one token after a prompt; the cache is cut back, so that every call does the same."""
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    token = prompt[:, -1:]

    def call() -> None:
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return call


def row(batch: int, length: int, what: str, seconds: dict[str, float]) -> list[str]:
    """A line of the table."""
    cells = [str(batch), str(length), what, *(f"{value * 1e3:.2f}" for value in seconds.values())]
    if len(seconds) > 1:
        cells.append(f"{seconds['dense'] / seconds['packed']:.2f}")
    return [*cells, f"{batch * (length if what == 'prefill' else 1) / seconds['packed']:.0f}"]


if __name__ == "__main__":
    sys.exit(run(arguments(), measure))
