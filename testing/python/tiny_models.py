"""Tiny models of transformers with random quantized weights: as a folder of ours, and in float64.

Folders are written here from the documents, with the codes of `reference`: nothing of the product takes part.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import reference

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
_OPT = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "init_std": 0.5,
    "dropout": 0.0,
}
_GPT2 = {
    "n_embd": 64,
    "n_inner": 160,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 64,
    "initializer_range": 0.5,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
#: By name, the architecture and what its config is given: grouped heads, biases, tied embeddings, weights that lie transposed.
ARCHITECTURES = {
    "llama": ("Llama", {**_LLAMA, "tie_word_embeddings": False}),
    "llama, tied": ("Llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 8, "tie_word_embeddings": False}),
    "opt": ("OPT", _OPT),
    "gpt2": ("GPT2", _GPT2),
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

#: What the config.json of a folder says of each layer, in turn.
UINT4 = {"W_dtype": "uint4", "group_size": 32, "zeros_mode": "quantized", "act_order": False}
MIXED = (
    UINT4,
    {"W_dtype": "int4", "group_size": -1, "zeros_mode": None, "act_order": False},
    {"W_dtype": "uint2", "group_size": 32, "zeros_mode": "original", "act_order": False},
    {"W_dtype": "nf4", "group_size": 16, "zeros_mode": None, "act_order": False},
    {"W_dtype": "uint3", "group_size": 32, "zeros_mode": "rescale", "act_order": False},
    {"W_dtype": "uint4", "group_size": 32, "zeros_mode": "quantized", "act_order": True},
    {"W_dtype": "int8", "group_size": 32, "zeros_mode": None, "act_order": False},
)


@dataclass(frozen=True)
class Tiny:
    """A folder, and the model that it means: in evaluation mode, in float64."""

    folder: Path
    exact: torch.nn.Module
    layers: dict[str, dict[str, object]]


class Wide(torch.nn.Module):
    """A linear layer that multiplies in float32, and rounds its result: what a quantized layer is to compute."""

    def __init__(self, weight, bias, dtype):
        super().__init__()
        self.weight, self.bias, self.dtype = weight.float(), None if bias is None else bias.float(), dtype

    def forward(self, x):
        return torch.nn.functional.linear(x.float(), self.weight, self.bias).to(self.dtype)


def dense(name, seed=0):
    """A model in float64 whose weights bfloat16 and float16 can hold, without dropout."""
    import transformers

    kind, fields = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**fields, **_TOKENS)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases, which are zeros, and norms' factors, which are ones
            parameter.data += torch.randn_like(parameter) / 8
        parameter.data = parameter.data.bfloat16().float()
    return model.double()


def linears(model):
    """The layers to be quantized: their inputs, outputs and whether the weight lies transposed."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf, True)
        elif isinstance(module, torch.nn.Linear) and name != "lm_head":
            found[name] = (module.in_features, module.out_features, False)
    return found


def draw(n, k, entry, generator):
    """Tensors of a layer by name, and its float64 (N, K) weight."""
    fmt, bits = entry["W_dtype"], reference.width(entry["W_dtype"])
    groups = 1 if entry["group_size"] == -1 else k // entry["group_size"]
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
    if fmt == "int8":
        codes = torch.where(codes == 128, 129, codes)
    values = reference.decode(codes, fmt)
    size = float(reference.table(fmt).std()) * k**0.5
    scales = ((0.5 + torch.rand(n, groups, generator=generator)) / size).bfloat16()
    tensors = {"qweight": reference.pack_bits(codes, bits), "scales": scales.half()}
    s = scales.double().repeat_interleave(k // groups, 1)
    middle = (1 << bits) / 2
    if entry["zeros_mode"] == "quantized":
        points = torch.randint(int(middle) - 1, int(middle) + 2, (n, groups), generator=generator)
        tensors["zeros"] = reference.pack_bits(points.T.contiguous(), bits)
    elif entry["zeros_mode"] is not None:
        points = (middle + torch.rand(n, groups, generator=generator)).bfloat16()
        points = (points * scales).bfloat16() if entry["zeros_mode"] == "rescale" else points
        tensors["zeros"] = points.half()
        points = tensors["zeros"]
    else:
        points = torch.zeros(n, groups)
    z = points.double().repeat_interleave(k // groups, 1)
    weight = values * s - z if entry["zeros_mode"] == "rescale" else (values - z) * s
    if entry["act_order"]:
        perm = torch.randperm(k, generator=generator)
        tensors["perm"] = perm.int()
        weight = weight[:, perm.argsort()]
    return tensors, weight


def format_bytes(entry):
    """The tensor `format`, as documented."""
    fields = {name: entry[name] for name in ("W_dtype", "group_size", "zeros_mode")}
    text = json.dumps({**fields, "version": 1}, sort_keys=True)
    return torch.frombuffer(bytearray(text.ljust(128).encode("ascii")), dtype=torch.uint8)


def make(folder, name="llama", formats=(UINT4,), dtype="float16", seed=0):
    """Write a folder, and return it with its meaning."""
    exact, generator = dense(name, seed), torch.Generator().manual_seed(seed)
    layers, tensors = {}, {}
    for index, (layer, (k, n, transposed)) in enumerate(linears(exact).items()):
        entry = layers[layer] = formats[index % len(formats)]
        parts, weight = draw(n, k, entry, generator)
        parts["format"] = format_bytes(entry)
        tensors.update({f"{layer}.{part}": tensor for part, tensor in parts.items()})
        exact.get_submodule(layer).weight.data = weight.T.contiguous() if transposed else weight
    tied = set(exact.all_tied_weights_keys)
    quantized = {f"{layer}.weight" for layer in layers}
    for key, tensor in exact.state_dict().items():
        if key not in quantized and key not in tied:
            tensors[key] = tensor.to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    exact.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": dtype, "architectures": [type(exact).__name__]}
    config["quantization_config"] = {
        "quant_method": "bitblas",
        "format_version": 1,
        "modules_to_not_convert": ["lm_head"],
        "layers": layers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return Tiny(folder, exact, layers)


def wide(tiny, dtype):
    """The model of a folder in a dtype, whose layers multiply in float32 what float64 means."""
    model = copy.deepcopy(tiny.exact)
    replaced = {}
    for name, (_, _, transposed) in linears(model).items():
        module = model.get_submodule(name)
        replaced[name] = Wide(module.weight.T if transposed else module.weight, module.bias, dtype)
    model = model.to(dtype)
    for name, module in replaced.items():
        model.set_submodule(name, module)
    return model


def tokens(rows=2, columns=11, seed=0):
    """Random ones, without those of a special meaning."""
    return torch.randint(2, 97, (rows, columns), generator=torch.Generator().manual_seed(seed))
