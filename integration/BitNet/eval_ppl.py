"""Compares the perplexity of a BitNet-b1.58 model with float weights, quantized at each call, and packed."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitblas.errors import ArgumentError
from scripting import about, float_model, number, packed_model, parser, positive, run, say, table, tokenizer_of

_EPILOG = """\
The text is cut into windows of --length tokens. Each token of a window but the first counts, given those
before it in the window. By default the text is a synthetic one, and the small random model learns it for
--train steps first, with its weights and activations quantized as later on: without that its perplexity would
be the size of the vocabulary. The exit status is 1 where the packed model's perplexity is not within
--tolerance of the float one's.

  python eval_ppl.py
  python eval_ppl.py --model bitnet_b1_58-3B --dtype float32 --text book.txt --length 2048
  python eval_ppl.py --model bitnet_b1_58-3B --dataset wikitext,wikitext-2-raw-v1,test      # needs `pip install datasets`
  python eval_ppl.py --packed ours --tokens tokens.npy                                      # a packed folder, by itself
"""


def arguments() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = parser(__doc__ or "", _EPILOG)
    text = made.add_argument_group("the text, one of").add_mutually_exclusive_group()
    text.add_argument("--tokens", metavar="FILE", help="a file of NumPy (.npy), integers in one dimension")
    text.add_argument("--text", metavar="FILE", help="in UTF-8; the folder must have a tokenizer")
    text.add_argument("--dataset", metavar="NAME,CONFIG,SPLIT", help='of the package "datasets", its column "text"')
    made.add_argument("--length", type=positive, default=64, metavar="N", help="of a window (default: 64)")
    made.add_argument("--most", type=positive, default=4096, metavar="N", help="tokens to read (default: 4096)")
    made.add_argument("--batch", type=positive, default=8, metavar="N", help="windows at once (default: 8)")
    made.add_argument("--train", type=number, default=60, metavar="N", help="steps of the small model (default: 60)")
    made.add_argument("--tolerance", type=float, default=0.01, metavar="X", help="relative (default: 0.01)")
    return made


def measure(options: argparse.Namespace) -> int:
    """Measure, and print the table."""
    if options.length < 2:
        raise ArgumentError("--length is 1; a window needs two tokens at least")
    small = not (options.packed or options.model)
    model = packed_model(options, options.packed) if options.packed else float_model(options)
    tokens = read_tokens(options, model.config.vocab_size)
    if small and options.train:
        learn(model, synthetic(options.seed + 1, options.vocab, 1 << 15).to(options.device), options.train)
    found = {}
    if not options.packed:
        found["float, quantized at each call"] = perplexity(model, tokens, options.length, options.batch)
        model.quantize()
    found["packed"] = perplexity(model, tokens, options.length, options.batch)
    say(about(options, model, options.packed or options.model))
    say(f"{tokens.numel()} tokens, windows of {options.length}\n")
    say(
        table(
            ["weights", "perplexity", "bits a token"],
            [(k, f"{v:.4f}", f"{math.log2(v):.4f}") for k, v in found.items()],
        )
    )
    values = list(found.values())
    distance = max(values) / min(values) - 1
    if len(values) > 1:
        say(f"\nrelative difference {distance:.2e}; at most {options.tolerance:g} is allowed")
    return int(not all(map(math.isfinite, values)) or distance > options.tolerance)


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor, length: int, batch: int = 8) -> float:
    """exp of the mean negative log-likelihood of tokens, each given those before it in its window.

    Parameters
    ----------
    model : torch.nn.Module
        With logits, (batch, length, vocabulary).
    tokens : torch.Tensor
        int64 (n,), on any device; those after the last whole window are left out.
    length : int
        Of a window, at least 2.
    batch : int
        Windows at once.
    """
    windows = tokens[: tokens.numel() // length * length].view(-1, length)
    total = 0.0
    for part in windows.split(batch):
        part = part.to(model.device)
        logits = model(part, use_cache=False).logits[:, :-1].double()
        chosen = logits.log_softmax(-1).gather(-1, part[:, 1:, None])
        total -= float(chosen.sum())
    return math.exp(total / (windows.shape[0] * (length - 1)))


# -- texts -----------------------------------------------------------------------------------------------------------------


def read_tokens(options: argparse.Namespace, vocab: int) -> torch.Tensor:
    """The tokens that the arguments name, at most `--most`."""
    if options.tokens:
        tokens = read_array(Path(options.tokens))
    elif options.text or options.dataset:
        tokenizer = tokenizer_of(options.packed or options.model)
        if tokenizer is None:
            raise ArgumentError("a text needs a folder with a tokenizer: give --model or --packed, or --tokens")
        text = read_dataset(options.dataset) if options.dataset else Path(options.text).read_text(encoding="utf-8")
        tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    else:
        tokens = synthetic(options.seed, vocab, options.most)
    tokens = tokens[: options.most]
    if tokens.numel() < options.length:
        raise ArgumentError(f"there are {tokens.numel()} tokens; a window takes {options.length}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        raise ArgumentError(f"tokens are {int(tokens.min())} to {int(tokens.max())}; the model knows 0 to {vocab - 1}")
    return tokens


def read_array(path: Path) -> torch.Tensor:
    """Tokens of a file of NumPy."""
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ArgumentError(f"{path} is no file of NumPy: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArgumentError(f"{path} holds {array.dtype} of shape {array.shape}; expected integers in one dimension")
    return torch.from_numpy(array.astype(np.int64))


def read_dataset(name: str) -> str:
    """The texts of a dataset, joined."""
    try:
        import datasets  # type: ignore[import-not-found]  # no dependency of ours
    except ImportError as error:
        raise ArgumentError("--dataset needs the package datasets: pip install datasets") from error
    parts = name.split(",")
    if len(parts) != 3:
        raise ArgumentError(f"--dataset is {name!r}; expected NAME,CONFIG,SPLIT")
    found: Any = datasets.load_dataset(parts[0], parts[1] or None, split=parts[2])
    return "\n\n".join(found["text"])


def synthetic(seed: int, vocab: int, count: int) -> torch.Tensor:
    """A text of a simple language: a token decides its successor, but for every eighth, which is random."""
    generator = torch.Generator().manual_seed(seed)
    follower = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))  # the language, whatever the text
    surprise = torch.rand(count, generator=generator) < 1 / 8
    drawn = torch.randint(vocab, (count,), generator=generator)
    tokens = torch.empty(count, dtype=torch.int64)
    token = int(drawn[0])
    for index in range(count):
        token = int(drawn[index]) if surprise[index] else int(follower[token])
        tokens[index] = token
    return tokens


def learn(model: Any, text: torch.Tensor, steps: int, length: int = 64, batch: int = 16) -> float:
    """Train a model on random windows of a text; the loss of the last step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    starts = torch.randint(text.numel() - length, (steps, batch), generator=torch.Generator().manual_seed(0))
    loss = torch.tensor(math.nan)
    for row in starts:
        windows = torch.stack([text[start : start + length] for start in row.tolist()])
        loss = model(windows, labels=windows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


if __name__ == "__main__":
    sys.exit(run(arguments(), measure))
