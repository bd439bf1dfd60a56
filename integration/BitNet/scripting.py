"""What the scripts share: arguments, the models that they are about, tables, and errors without a traceback."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.bitnet.modeling_bitnet import BitNetRotaryEmbedding

import bitblas
from bitblas.checkpoints.load import load_model
from bitblas.errors import ArgumentError, BitBLASError
from bitblas.measuring import cpu_name
from configuration_bitnet import BitnetConfig
from modeling_bitnet import BitnetForCausalLM

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Standard deviation of the weights of a random model: its logits then differ by more than rounding.
_SPREAD = 0.05


# -- starting a script -----------------------------------------------------------------------------------------------------


def parser(description: str, epilog: str = "", *, model: bool = True, packed: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments of all scripts.

    Parameters
    ----------
    description, epilog : str
        What the script does, and what it prints.
    model, packed : bool
        Whether there are `--model`, and, beside it, `--packed`.
    """
    made = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if model:
        which = made.add_mutually_exclusive_group()
        which.add_argument(
            "--model",
            metavar="FOLDER",
            help="a folder, or a name on Hugging Face's hub, with float weights of a BitNet-b1.58 model (the layout of "
            "1bitLLM or of transformers); default: a small random model",
        )
        if packed:
            which.add_argument(
                "--packed", metavar="FOLDER", help="a folder of save_quantized, or of `bitblas repack`, packed already"
            )
    made.add_argument("--device", default="cpu", help='"cpu" (the default), "cuda", or "cuda:1" and so on')
    made.add_argument("--dtype", choices=DTYPES, help="of activations (default: float32, or what the folder says)")
    made.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: torch's choice)")
    made.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    small = made.add_argument_group("the small random model")
    small.add_argument("--hidden", type=positive, default=256, metavar="N", help="hidden size (default: 256)")
    small.add_argument("--layers", type=positive, default=2, metavar="N", help="number of blocks (default: 2)")
    small.add_argument("--vocab", type=positive, default=512, metavar="N", help="number of tokens (default: 512)")
    return made


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return value


def number(text: str) -> int:
    """An argument that is an integer of at least 0."""
    return 0 if text.strip() == "0" else positive(text)


def numbers(text: str) -> list[int]:
    """An argument like ``1,8``."""
    return [positive(part) for part in text.split(",")]


def pairs(text: str) -> list[tuple[int, int]]:
    """An argument like ``1x128,8x16``: batch sizes and numbers of tokens."""
    found = []
    for part in text.split(","):
        batch, cross, length = part.partition("x")
        if not cross:
            raise argparse.ArgumentTypeError(f"{part!r} is no pair like 1x128")
        found.append((positive(batch), positive(length)))
    return found


def run(made: argparse.ArgumentParser, script: Callable[[argparse.Namespace], int | None]) -> int:
    """Parse, prepare torch, run; the exit status: 0, what the script returns, 1 or 2 after an error, 130 when interrupted."""
    options = made.parse_args()
    try:
        prepare(options)
        return script(options) or 0
    except (ArgumentError, argparse.ArgumentTypeError) as error:
        print(f"{made.prog}: error: {error}", file=sys.stderr)
        return 2
    except (BitBLASError, OSError, torch.OutOfMemoryError) as error:
        print(f"{made.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def prepare(options: argparse.Namespace) -> None:
    """Seed, threads, and a device that is there."""
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        options.device = torch.device(options.device)
    except RuntimeError as error:
        raise ArgumentError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    if options.device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device {options.device}: there are kernels for cpu and cuda")
    if options.device.type == "cuda" and (options.device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"--device {options.device}: torch sees {torch.cuda.device_count()} CUDA devices")


# -- models ----------------------------------------------------------------------------------------------------------------


def random_config(options: argparse.Namespace) -> BitnetConfig:
    """Of the small random model: two key heads for four query heads, an MLP whose size is no power of two."""
    if options.hidden % 64:
        raise ArgumentError(f"--hidden is {options.hidden}; it must be a multiple of 64")
    return BitnetConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 43 // 16,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=options.vocab,
        max_position_embeddings=4096,
        initializer_range=_SPREAD,
        bos_token_id=None,
        eos_token_id=None,
    )


def float_model(options: argparse.Namespace) -> Any:
    """The model of `--model`, or a small random one: with float weights, in evaluation mode, on the device."""
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.model is None:
        torch.manual_seed(options.seed)
        made: Any = BitnetForCausalLM(random_config(options))
        made.to(dtype or torch.float32)
        made.model.rotary_emb = BitNetRotaryEmbedding(made.config)  # float32, as in a model that was loaded
    else:
        made = from_hub(options.model, lambda name: BitnetForCausalLM.from_pretrained(name, dtype=dtype or "auto"))
    return made.to(options.device).eval()


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """The models to be measured: "packed", and, where there are float weights and not `--no-dense`, "dense" before it."""
    if options.packed:
        return {"packed": packed_model(options, options.packed)}
    source = float_model(options)
    dense = {} if options.no_dense else {"dense": dense_copy(source)}
    return {**dense, "packed": source.quantize()}


def dense_copy(source: Any) -> Any:
    """transformers' own model with the weights of a float one, which are shared."""
    with torch.device("meta"):
        dense = transformers.BitNetForCausalLM(source.config)
    dense.model.rotary_emb = source.model.rotary_emb
    dense.load_state_dict(source.state_dict(), assign=True)
    return dense.eval()


def from_hub(name: str, load: Callable[[str], Any]) -> Any:
    """What `load` makes of a folder or of a name on the hub; what leads nowhere or cannot be read is an `ArgumentError`."""
    try:
        return load(name)
    except (OSError, ValueError, RuntimeError) as error:  # the last one is transformers', where tensors do not fit
        if isinstance(error, (BitBLASError, torch.OutOfMemoryError)):
            raise
        raise ArgumentError(f"{name} cannot be loaded: {error}") from error


def packed_model(options: argparse.Namespace, folder: str) -> Any:
    """A packed model: of a folder that `save_quantized` or `bitblas repack` wrote."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ArgumentError(f"{folder} is no folder with a config.json")
    dtype = DTYPES[options.dtype] if options.dtype else None
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"{path / 'config.json'} is damaged: {error}") from error
    if fields.get("packed"):
        return BitnetForCausalLM.from_quantized(path, dtype=dtype, device=options.device)
    return load_model(path, dtype=dtype, device=options.device).eval()


def tokenizer_of(folder: str | None) -> Any:
    """The tokenizer of a folder; None where it has none."""
    if folder is None:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None


def random_tokens(options: argparse.Namespace, vocab: int, batch: int, length: int) -> torch.Tensor:
    """(batch, length) random tokens on the device, the same at each call."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(vocab, (batch, length), generator=generator).to(options.device)


def prompt_tokens(options: argparse.Namespace, tokenizer: Any, vocab: int) -> torch.Tensor:
    """(1, n): `--prompt`, or random tokens where there is none."""
    if options.prompt is None:
        return random_tokens(options, vocab, 1, 16)
    if tokenizer is None:
        raise ArgumentError("--prompt needs a folder with a tokenizer")
    return tokenizer(options.prompt, return_tensors="pt").input_ids.to(options.device)


# -- results ---------------------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """Print a line."""
    print(text, flush=True)


def about(options: argparse.Namespace, model: Any, name: str | None = None) -> str:
    """The machine, the versions and the model, in two lines."""
    device = options.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    config = model.config
    return (
        f"{place}{threads}; Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, bitblas {bitblas.__version__}\n"
        f"{name or 'random model'}: {config.num_hidden_layers} blocks, hidden size {config.hidden_size}, vocabulary "
        f"{config.vocab_size}, {str(model.dtype).removeprefix('torch.')}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, aligned: the first column to the left, the others to the right."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a card."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, each: int = 1
) -> dict[str, float]:
    """Median seconds of each call, measured in turns A B A B; the first round, which builds and warms up, is not counted.

    Parameters
    ----------
    calls : dict
        By name.
    device : torch.device
        Where they compute: a card is waited for.
    rounds : int
        How often each is measured.
    each : int
        Calls between two looks at the clock.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            synchronize(device)
            began = time.perf_counter()
            for _ in range(each):
                call()
            synchronize(device)
            if index:
                taken[name].append((time.perf_counter() - began) / each)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
