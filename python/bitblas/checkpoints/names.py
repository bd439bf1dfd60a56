"""Which tensors of a folder are the weights of linear layers, as their names and shapes tell."""

from __future__ import annotations

from collections.abc import Sequence

from .shards import Shards

FLOATS = ("F16", "BF16", "F32")
#: Modules whose two-dimensional weights are no linear layer's, or one that suffers from rounding: by the last part of their
#: name, in part.
_OTHERS = ("embed", "wte", "wpe", "norm", "lm_head", "output_head", "relative_attention_bias", "router", "rotary")
#: The same, but by the whole of it: gates of experts, the head of some, and T5's embedding.
_OTHERS_EXACTLY = ("gate", "score", "shared", "ln_f")


def is_linear(tensor: str, source: Shards, keep: Sequence[str] = ()) -> bool:
    """Whether a tensor is the weight of a linear layer; of layers whose last name is in `keep`, whatever it is."""
    name, _, part = tensor.rpartition(".")
    info, last = source.infos[tensor], name.rpartition(".")[2].lower()
    if part != "weight" or len(info.shape) != 2 or info.dtype not in FLOATS or not all(info.shape):
        return False
    return last in keep or (last not in _OTHERS_EXACTLY and not any(other in last for other in _OTHERS))
