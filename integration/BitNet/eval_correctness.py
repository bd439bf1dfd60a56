"""Compares a packed BitNet-b1.58 model with its float weights: codes, scales, layers, logits, generated tokens."""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch

from benchmark_generate import generate
from scripting import (
    about,
    float_model,
    parser,
    positive,
    prompt_tokens,
    random_tokens,
    run,
    say,
    table,
    tokenizer_of,
)
from utils_quant import EPS, BitLinearBitBLAS

_EPILOG = """\
Every packed layer is held to float64: its codes are the nearest ones to the float weights over their mean
magnitude, its scales are that mean, and its output, for the inputs that it gets in the model, is within the
rounding of the model's dtype of what codes, scales and int8 activations say exactly. So many rounded numbers
may lie the other way in two models that compute the same: a step of one activation is 1/127 of the largest of
its row. Logits are therefore compared with those of the whole model in float64, beside the float model's (its
BitLinear layers quantize at each call), and may be twice as far from them, or --tolerance of their size. The
exit status is 1 where something is farther away than allowed.

  python eval_correctness.py
  python eval_correctness.py --model bitnet_b1_58-3B --dtype bfloat16 --no-exact --prompt "The capital of France is"
"""
#: Unit roundoffs, and the smallest positive number.
_ROUNDOFF = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.float16: (2.0**-11, 2.0**-24),
    torch.bfloat16: (2.0**-8, 2.0**-133),
}
#: Relative errors of a few operations in float32, and how near a weight must be to the middle to count as between two codes.
_FEW, _MIDDLE = 2.0**-21, 1e-5


def arguments() -> argparse.ArgumentParser:
    """The script's arguments."""
    made = parser(__doc__ or "", _EPILOG, packed=False)
    made.add_argument("--prompt", metavar="TEXT", help="the folder must have a tokenizer; default: random tokens")
    made.add_argument(
        "--tokens", type=positive, default=32, metavar="N", help="tokens of the two sequences (default: 32)"
    )
    made.add_argument("--new-tokens", type=positive, default=16, metavar="N", help="to generate (default: 16)")
    made.add_argument("--no-fuse", action="store_true", help="pack q, k, v, gate and up by themselves")
    made.add_argument("--no-exact", action="store_true", help="leave the float64 model out (8 bytes a weight)")
    made.add_argument("--tolerance", type=float, default=0.02, metavar="X", help="of logits, relative (default: 0.02)")
    return made


@dataclass
class Layers:
    """What was found of all packed layers.

    Attributes
    ----------
    wrong, codes : int
        Codes that are not nearest to their weights, and all.
    scale : float
        Largest relative error of a scale.
    output : float
        Largest error of an output over what is allowed.
    """

    wrong: int = 0
    codes: int = 0
    scale: float = 0.0
    output: float = 0.0


@torch.inference_mode()
def measure(options: argparse.Namespace) -> int:
    """Compare all, and print the table."""
    source = float_model(options)
    tokenizer, vocab = tokenizer_of(options.model), source.config.vocab_size
    tokens, prompt = random_tokens(options, vocab, 2, options.tokens), prompt_tokens(options, tokenizer, vocab)
    packed = copy.deepcopy(source).quantize(fuse_qkv=not options.no_fuse, fuse_gateup=not options.no_fuse)
    found = compare_layers(source, packed, tokens)
    rounded = _ROUNDOFF[source.dtype][0] if not options.no_fuse else 0.0
    rows: list[tuple[str, float, float | None, str]] = [
        (f"codes that are not the nearest, of {found.codes}", found.wrong, 0, "d"),
        ("scales: largest relative error", found.scale, _FEW + rounded, ".2e"),
        ("layers: largest error, in units of the rounding", found.output, 1.0, ".3f"),
    ]
    theirs, ours = source(tokens).logits, packed(tokens).logits
    if not options.no_exact:
        exact = exact_model(source)(tokens).logits
        distance = rms(theirs, exact)
        rows.append(("logits, float layers: distance from float64", distance, None, ".2e"))
        rows.append(
            ("logits, packed: distance from float64", rms(ours, exact), max(2 * distance, options.tolerance), ".2e")
        )
    rows.append(("logits, packed: distance from float layers", rms(ours, theirs), None, ".2e"))
    texts = [generate(model, prompt, options.new_tokens)[0, prompt.shape[1] :] for model in (source, packed)]
    same = int((texts[0] == texts[1]).int().cumprod(0).sum())
    rows.append((f"generated tokens until they differ, of {options.new_tokens}", same, None, "d"))
    say(about(options, source, options.model) + "\n")
    lines = [(name, f"{value:{style}}", "" if most is None else f"{most:{style}}") for name, value, most, style in rows]
    say(table(["", "found", "allowed"], lines))
    for name, text in zip(("float", "packed"), texts, strict=True):
        ids = text.tolist()
        say(f"\n{name}: {' '.join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)}")
    return int(any(most is not None and not value <= most for _, value, most, _ in rows))


# -- layers ----------------------------------------------------------------------------------------------------------------


def compare_layers(source: Any, packed: Any, tokens: torch.Tensor) -> Layers:
    """Hold every packed layer to the float weights that it was made from, for the inputs that it gets of some tokens."""
    found, hooks = Layers(), []
    for name, layer in packed.ternary_layers().items():
        weights = [source.get_submodule(part).weight for part in parts_of(name)]

        def look(
            layer: BitLinearBitBLAS, inputs: tuple[torch.Tensor], out: torch.Tensor, weights: Any = weights
        ) -> None:
            compare_layer(layer, weights, inputs[0], out, found)

        hooks.append(layer.register_forward_hook(look))
    packed(tokens)
    for hook in hooks:
        hook.remove()
    return found


def parts_of(name: str) -> list[str]:
    """The layers of a float model that a layer of a packed one is made of."""
    block, _, last = name.rpartition(".")
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(last, (last,))
    return [f"{block}.{part}" for part in parts]


def compare_layer(
    layer: BitLinearBitBLAS, weights: list[torch.Tensor], x: torch.Tensor, out: torch.Tensor, found: Layers
) -> None:
    """Compare one layer: its codes and scales with its weights (N, K), its output with float64."""
    codes, scales = (tensor.double() for tensor in layer.unpacked())
    first = 0
    for weight in weights:
        rows = slice(first, first := first + weight.shape[0])
        mean = weight.double().abs().mean().clamp(min=EPS)
        ratio = (weight.double() / mean).clamp(-1, 1)
        far = (ratio - codes[rows]).abs() > 0.5 + _MIDDLE
        found.wrong, found.codes = found.wrong + int(far.sum()), found.codes + far.numel()
        found.scale = max(found.scale, float((scales[rows] / mean - 1).abs().max()))
    a = x.float()
    step = a.abs().amax(-1, keepdim=True).clamp(min=EPS).div(a.new_tensor(127.0))  # on cards, / 127 is no division
    product = (a / step).round().double() @ codes.T * step.double() * scales.T
    bias = torch.zeros_like(scales.T) if layer.bias is None else layer.bias.double()
    unit, least = _ROUNDOFF[out.dtype]
    allowed = (unit + _FEW) * (product.abs() + bias.abs()) + least
    found.output = max(found.output, float(((out.double() - product - bias).abs() / allowed).max()))


# -- float64 ---------------------------------------------------------------------------------------------------------------


class Exact(torch.nn.Module):
    """A ternary layer in float64, from its definition."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight = layer.weight.double()
        mean = weight.abs().mean().clamp(min=EPS)
        self.weight = torch.nn.Parameter((weight / mean).round().clamp(-1, 1) * mean)
        self.bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N), both float64."""
        step = x.abs().amax(-1, keepdim=True).clamp(min=EPS) / 127
        return torch.nn.functional.linear((x / step).round() * step, self.weight, self.bias)


def exact_model(source: Any) -> Any:
    """A copy of a float model in float64."""
    model = copy.deepcopy(source)
    for name, layer in source.ternary_layers().items():
        model.set_submodule(name, Exact(layer))
    return model.double()


def rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square of a difference over that of what is wanted."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    sys.exit(run(arguments(), measure))
