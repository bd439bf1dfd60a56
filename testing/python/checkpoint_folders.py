"""Small Hugging Face folders as GPTQ, AWQ and llm-compressor write them, packed bit by bit from their documentation.

Each packer draws codes, zero points and scales, and returns a layer's tensors beside the dense weight that they stand for,
float64 (N, K). The formats:

- GPTQ (AutoGPTQ, GPTQModel): `qweight` (K·b/32, N) and `qzeros` (G, N·b/32) int32 with codes in order from the lowest bit on,
  the first along K, the second along N; `scales` (G, N); `g_idx` (K,). w = (q - z)·s; "gptq" stores z - 1, "gptq_v2" z.
- AWQ (AutoAWQ, version "gemm"): `qweight` (K, N/8), `qzeros` (G, N/8) int32; nibbles hold columns 0 2 4 6 1 3 5 7.
- compressed-tensors, "pack-quantized": `weight_packed` (N, ceil(K·b/32)) with q + 2^(b-1), `weight_zero_point`
  (ceil(N·b/32), G) likewise along N, or int8 (N, G) or (1,), `weight_scale` (N, G), `weight_shape`, `weight_g_idx` (K,).
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

LINEARS = {
    "self_attn.q_proj": (1, 1),
    "self_attn.k_proj": (0.5, 1),
    "self_attn.o_proj": (1, 1),
    "mlp.up_proj": (2, 1),
    "mlp.down_proj": (1, 2),
}


def words(codes, bits):
    """Rows of codes, (R, C), as rows of 32-bit words, (R, ceil(C·bits/32)), each code from the lowest bit on."""
    stream = ((codes[..., None].astype(np.uint32) >> np.arange(bits)) & 1).astype(np.uint8).reshape(codes.shape[0], -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    joined = np.ascontiguousarray(np.packbits(stream, axis=1, bitorder="little"))
    return torch.from_numpy(joined.view(np.int32))


class Draw:
    """Codes, zero points and scales of one layer."""

    def __init__(self, n, k, bits, group, sym, seed, dtype=torch.float16, order=None):
        rng = np.random.default_rng(seed)
        groups = k // group
        self.q = rng.integers(0, 1 << bits, (n, k))
        self.z = np.full((n, groups), 1 << (bits - 1)) if sym else rng.integers(1, 1 << bits, (n, groups))
        self.s = torch.from_numpy(rng.uniform(0.001, 0.1, (n, groups))).to(dtype)
        self.groups = np.arange(k) // group if order is None else order(rng, k, group)
        self.dense = (self.q - self.z[:, self.groups]) * self.s.double().numpy()[:, self.groups]
        self.bias = torch.from_numpy(rng.normal(size=n)).to(dtype)


def shuffled(rng, k, group):
    """Groups of columns as act-order leaves them."""
    return rng.permutation(np.arange(k) // group)


def gptq_layer(n, k, *, bits=4, group=32, sym=False, act_order=False, version=1, bias=False, seed=0, **options):
    """(tensors, dense weight)."""
    drawn = Draw(n, k, bits, group, sym, seed, order=shuffled if act_order else None, **options)
    stored = drawn.z - 1 if version == 1 else drawn.z
    tensors = {
        "qweight": words(drawn.q, bits).T.contiguous(),
        "qzeros": words(stored.T, bits),
        "scales": drawn.s.T.contiguous(),
        "g_idx": torch.from_numpy(drawn.groups.astype(np.int32)),
    }
    return tensors | ({"bias": drawn.bias} if bias else {}), drawn.dense


def awq_layer(n, k, *, group=32, sym=False, bias=False, seed=0, **options):
    """(tensors, dense weight)."""
    drawn = Draw(n, k, 4, group, sym, seed, **options)
    interleaved = np.arange(n).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    tensors = {
        "qweight": words(drawn.q.T[:, interleaved], 4),
        "qzeros": words(drawn.z.T[:, interleaved], 4),
        "scales": drawn.s.T.contiguous(),
    }
    return tensors | ({"bias": drawn.bias} if bias else {}), drawn.dense


def compressed_layer(
    n, k, *, bits=4, group=32, sym=True, act_order=False, bias=False, seed=0, signed_zeros=False, whole=False, **options
):
    """(tensors, dense weight). `signed_zeros`: zero points as int8; `whole`: one scale, and one int8 zero point, for all."""
    group = k if group == -1 else group
    drawn = Draw(n, k, bits, group, sym, seed, order=shuffled if act_order else None, **options)
    tensors = {
        "weight_packed": words(drawn.q, bits),
        "weight_scale": drawn.s,
        "weight_shape": torch.tensor([n, k]),
    }
    if not sym and signed_zeros:
        tensors["weight_zero_point"] = torch.from_numpy((drawn.z - (1 << (bits - 1))).astype(np.int8))
    elif not sym:
        tensors["weight_zero_point"] = words(drawn.z.T, bits).T.contiguous()
    if whole:
        drawn.s[:], drawn.z[:] = drawn.s[0, 0].clone(), drawn.z[0, 0]
        tensors["weight_scale"] = drawn.s[:1, 0].clone()
        tensors |= (
            {} if sym else {"weight_zero_point": torch.tensor([drawn.z[0, 0] - (1 << (bits - 1))]).to(torch.int8)}
        )
        drawn.dense = (drawn.q - drawn.z[:, drawn.groups]) * drawn.s.double().numpy()[:, drawn.groups]
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(drawn.groups.astype(np.int32))
    return tensors | ({"bias": drawn.bias} if bias else {}), drawn.dense


def dense_layer(n, k, *, bias=False, seed=0, dtype=torch.float16):
    """(tensors, dense weight)."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(n, k)) / np.sqrt(k)).to(dtype)
    tensors = {"weight": weight}
    return tensors | ({"bias": torch.from_numpy(rng.normal(size=n)).to(dtype)} if bias else {}), weight.double().numpy()


def gptq_config(bits=4, group=32, sym=False, act_order=False, version=1):
    """Its `quantization_config`."""
    layout = "gptq" if version == 1 else "gptq_v2"
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": sym,
        "checkpoint_format": layout,
    }


def awq_config(group=32):
    """Its `quantization_config`."""
    return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}


def compressed_config(bits=4, group=32, sym=True, act_order=False):
    """Its `quantization_config`."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "actorder": "group" if act_order else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def model(layer, hidden=64, blocks=2, vocabulary=96, dtype=torch.float16, **options):
    """A Llama-like model: (tensors, dense weights of its linear layers by name)."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors, dense, seed = {"model.embed_tokens.weight": drawn(vocabulary, hidden)}, {}, 0
    for block in range(blocks):
        for short, (out, inside) in LINEARS.items():
            name, seed = f"model.layers.{block}.{short}", seed + 1
            parts, dense[name] = layer(int(hidden * out), int(hidden * inside), seed=seed, **options)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"model.layers.{block}.input_layernorm.weight"] = drawn(hidden)
    tensors |= {"model.norm.weight": drawn(hidden), "lm_head.weight": drawn(vocabulary, hidden)}
    return tensors, dense


def write(folder, tensors, quantization=None, shards=1, split=None, config=None):
    """Write a folder.

    `shards` files get the tensors in turn, in their order, unless `split` says which file (0, 1, ...) a name belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    place = split or (lambda name: names.index(name) * shards // len(names))
    files = {}
    for name, tensor in tensors.items():
        file = "model.safetensors" if shards == 1 else f"model-{place(name) + 1:05}-of-{shards:05}.safetensors"
        files.setdefault(file, {})[name] = tensor.contiguous()
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, held in files.items() for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", **(config or {})}
    if quantization is not None:
        found["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(found), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "modeling_own.py").write_text("raise SystemExit('run by nobody')\n", encoding="utf-8")
    return folder


def tree(folder):
    """The contents of every file of a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
