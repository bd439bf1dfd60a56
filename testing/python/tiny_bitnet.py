"""Tiny BitNet models with random ternary weights: as the folders of others, and in float64.

Folders are written here from public descriptions, and the model in float64 rounds, normalizes and multiplies by plain formulas:
nothing of the product takes part. The layouts:

- transformers, `linear_class` "bitlinear": `weight` uint8 (N/4, K), values plus 1, four rows to a byte; `weight_scale` (1,), by
  which values are divided. "autobitlinear", `quantization_mode` "offline" (microsoft/bitnet-b1.58-2B-4T): the same, multiplied.
  A bias is added before.
- the same class, "online" (microsoft/bitnet-b1.58-2B-4T-bf16): float weights, which are rounded at every forward pass, by
  s = max(mean |w|, 1e-5) to s · clamp(rint(w / s), -1, 1).
- 1bitLLM/bitnet_b1_58-3B: float weights like these, in a model that calls itself a Llama, whose two more norms in each block
  are called `self_attn.inner_attn_ln` and `mlp.ffn_layernorm`.

All round activations row by row, s = max(max |a|, 1e-5) / 127, q = rint(a / s).
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file

from foreign import pack_bitnet

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
#: What a `quantization_config` says of each kind; of the last one there is none.
KINDS = {
    "bitlinear": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "offline": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "1bitLLM": None,
}
#: What `BitNetConfig` takes.
FIELDS = {*CONFIG, "hidden_act", "attention_bias", "tie_word_embeddings", "rope_theta"}
#: The norms in front of two layers of a block, as transformers and as 1bitLLM call them.
NORMS = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
#: The least mean magnitude of a weight, and magnitude of a row; that of norms in front of layers.
EPS, NORM_EPS = 1e-5, 1e-6


class Norm(torch.nn.Module):
    """An RMSNorm in float64, whatever it is given."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(weight.double()), eps

    def forward(self, x):
        x = x.double()
        return self.weight.double() * (x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt())


class Exact(torch.nn.Module):
    """A layer as it is described, in float64, whose result has the dtype of its input.

    Attributes
    ----------
    rounds : bool
        Whether activations are rounded.
    margin : float
        How near to a tie an activation over its step came: where float32 is off by less, it rounds alike.
    """

    def __init__(self, drawn):
        super().__init__()
        self.drawn, self.rounds, self.margin = drawn, True, math.inf
        self.norm = None if drawn.norm is None else Norm(drawn.norm, NORM_EPS)

    def forward(self, x):
        dtype = x.dtype
        x = x.double() if self.norm is None else self.norm(x)
        step = x.abs().amax(-1, keepdim=True).clamp(min=EPS) / 127
        if self.rounds:
            self.margin = min(self.margin, float(((x / step).frac().abs() - 0.5).abs().min()))
            x = torch.round(x / step) * step
        out = x @ self.drawn.values.double().T * self.drawn.scale
        return (out if self.drawn.bias is None else out + self.drawn.bias.double()).to(dtype)


@dataclass(frozen=True)
class Drawn:
    """A layer: its tensors by their names, and what they mean: values (N, K), scale, bias, and factors of a norm in front."""

    tensors: dict[str, torch.Tensor]
    values: torch.Tensor
    scale: float
    bias: torch.Tensor | None
    norm: torch.Tensor | None

    def dense(self):
        """The weight, float64 (N, K)."""
        return self.values.double() * self.scale


@dataclass(frozen=True)
class Folder:
    """A kind of folder: its tensors and config, its layers by name, and the others by transformers' names."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, object]
    layers: dict[str, Drawn]
    others: dict[str, torch.Tensor]

    def write(self, folder, dtype=torch.bfloat16):
        """Put it into a directory, which is returned; floats, which bfloat16 can hold, in a dtype."""
        folder.mkdir(parents=True)
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self.tensors.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**self.config, "torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    def exact(self, dtype=torch.float64):
        """The model that it means, in evaluation mode, but for its layers and norms in a dtype."""
        import transformers

        fields = {key: value for key, value in self.config.items() if key in FIELDS}
        model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**fields)).eval()
        missing = model.load_state_dict(self.others, strict=False).missing_keys
        assert {name.removesuffix(".weight").removesuffix(".bias") for name in missing} <= {*self.layers, "lm_head"}
        model.config._attn_implementation = "eager"
        model = model.to(dtype)
        for name, drawn in self.layers.items():
            model.set_submodule(name, Exact(drawn))
        if dtype is torch.float64:
            for name, module in list(model.named_modules()):
                if type(module).__name__ == "BitNetRMSNorm":
                    model.set_submodule(name, Norm(module.weight.data, module.variance_epsilon))
        return model


def rounded(weight):
    """Values and scale of a float weight, by numpy, with the mean in float64."""
    values = weight.double().numpy()
    scale = np.float32(max(np.abs(values).mean(), EPS))
    return torch.from_numpy(np.clip(np.rint(values.astype(np.float32) / scale), -1, 1)), float(scale)


def draw(kind, n, k, generator, bias=False, norm=False):
    """One layer."""
    tensors, extra = {}, None
    if kind in ("online", "1bitLLM"):
        weight = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()
        values, scale = rounded(weight)
        tensors["weight"] = weight
    else:
        values = torch.randint(-1, 2, (n, k), generator=generator)
        stored = ((1 + torch.rand(1, generator=generator)) / k**0.5).bfloat16()
        stored = (1 / stored.float()).bfloat16() if kind == "bitlinear" else stored
        scale = 1 / float(stored) if kind == "bitlinear" else float(stored)
        tensors |= {"weight": pack_bitnet(values.numpy()), "weight_scale": stored}
    if bias:
        tensors["bias"] = torch.randn(n, generator=generator).bfloat16()
        extra = tensors["bias"].double() * (
            scale if kind == "offline" else 1
        )  # which multiplies what it has added, too
    if norm:
        tensors["rms_norm.weight"] = (1 + torch.randn(k, generator=generator) / 8).bfloat16()
    return Drawn(tensors, values, scale, extra, tensors.get("rms_norm.weight"))


def make(kind, *, norms=False, bias=False, tied=False, seed=0):
    """A model of a kind; `norms`: with one in front of every layer; `bias`: attention's layers have one."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inside = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    grouped = hidden * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (grouped, hidden),
        "self_attn.v_proj": (grouped, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inside, hidden),
        "mlp.up_proj": (inside, hidden),
        "mlp.down_proj": (hidden, inside),
    }
    norms_of = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms_of |= {"self_attn.attn_sub_norm": hidden, "mlp.ffn_sub_norm": inside}
    layers, others = {}, {}
    for block in range(CONFIG["num_hidden_layers"]):
        for name, (n, k) in sizes.items():
            has_bias = bias and name.startswith("self_attn")
            layers[f"model.layers.{block}.{name}"] = draw(kind, n, k, generator, has_bias, norms)
        for name, size in norms_of.items():
            factors = 1 + torch.randn(size, generator=generator) / 8
            others[f"model.layers.{block}.{name}.weight"] = factors.bfloat16()
    others["model.norm.weight"] = (1 + torch.randn(hidden, generator=generator) / 8).bfloat16()
    for name in ("model.embed_tokens", *(() if tied else ("lm_head",))):
        others[f"{name}.weight"] = torch.randn(CONFIG["vocab_size"], hidden, generator=generator).bfloat16()
    act = "silu" if kind == "1bitLLM" else "relu2"
    config = {**CONFIG, "hidden_act": act, "attention_bias": bias, "tie_word_embeddings": tied, "rope_theta": 10000.0}
    tensors = {f"{name}.{part}": tensor for name, drawn in layers.items() for part, tensor in drawn.tensors.items()}
    return Folder(*_described(kind, {**tensors, **others}, config, norms), layers, others)


def _described(kind, tensors, config, norms):
    """Tensors and config.json as a kind has them."""
    if kind == "1bitLLM":
        for ours, theirs in NORMS.items():
            tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
        for block in range(CONFIG["num_hidden_layers"]):
            tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        said = {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "input_bits": 8, "weight_bits": 1}
        return tensors, {**config, **said, "pretraining_tp": 1, "rope_scaling": None}
    said = {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet"}
    own = {"AutoConfig": "configuration_bitnet.BitNetConfig"}
    said["auto_map"] = {**own, "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM"}  # which is not run
    quantization = {"quant_method": "bitnet", "modules_to_not_convert": None, **KINDS[kind]}
    if norms:
        quantization |= {"use_rms_norm": True, "rms_norm_eps": NORM_EPS}
    return tensors, {**config, **said, "quantization_config": quantization}
