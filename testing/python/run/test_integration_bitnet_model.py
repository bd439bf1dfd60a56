"""integration/BitNet/modeling_bitnet.py: packed models against their float weights and against float64; folders."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM
from transformers.models.bitnet.modeling_bitnet import BitNetRotaryEmbedding

import bitblas
from bitblas.checkpoints import repack
from bitblas.errors import ArgumentError, CheckpointError, ConfigError
from configuration_bitnet import PACKED_TYPE, BitnetConfig
from create_bitblas_ckpt import write_like_1bitllm
from documents import PYTHON, ROOT, blocks
from eval_correctness import Exact, compare_layers
from modeling_bitnet import BitnetForCausalLM
from utils_quant import BitLinear, BitLinearBitBLAS

README = ROOT / "integration" / "BitNet" / "README.md"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: How far the logits of a packed model may be from the model's in float64, relative to their root mean square. Where a rounded
#: activation lies in the middle of two codes, a rounding error changes it by a 127th of its row's largest.
LOGITS = {torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}


def make(dtype=torch.float32, seed=0, **fields):
    """A float model whose norms have factors other than one."""
    torch.manual_seed(seed)
    model = BitnetForCausalLM(BitnetConfig(**{**SIZES, **fields}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 8
    model.to(dtype).model.rotary_emb = BitNetRotaryEmbedding(model.config)  # float32, as in a model that was loaded
    return model.eval()


def tokens(rows=2, columns=11, seed=0):
    return torch.randint(97, (rows, columns), generator=torch.Generator().manual_seed(seed))


def in_float64(model):
    """transformers' own model with the same weights, in float64, its projections as BitNet's paper has them."""

    class Layer(torch.nn.Module):
        def __init__(self, weight, bias):
            super().__init__()
            mean = np.abs(weight).mean()
            self.codes = torch.from_numpy(np.clip(np.rint(weight / mean), -1, 1))
            self.mean, self.bias = mean, bias

        def forward(self, x):
            step = np.maximum(np.abs(x.numpy()).max(-1, keepdims=True), 1e-5) / 127
            found = torch.from_numpy(np.rint(x.numpy() / step)) @ self.codes.T * torch.from_numpy(step) * self.mean
            return found if self.bias is None else found + self.bias

    exact = BitNetForCausalLM(
        BitNetConfig(**{k: v for k, v in model.config.to_dict().items() if k in SIZES or "tie" in k})
    )
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    exact = exact.double().eval()
    for block in exact.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Layer(child.weight.detach().numpy(), child.bias))
    return exact


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# -- logits ----------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "fused"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, True)],
)
def test_a_packed_model_computes_what_its_float_weights_mean(dtype, fused):
    model = make(dtype)
    exact, floats = in_float64(model)(tokens()).logits, model(tokens()).logits
    source = copy.deepcopy(model)
    assert model.quantize(fuse_qkv=fused, fuse_gateup=fused) is model
    packed = model(tokens()).logits
    assert packed.dtype is dtype
    assert distance(packed, exact) <= LOGITS[dtype]
    assert distance(floats, exact) <= LOGITS[dtype]
    layers = compare_layers(source, model, tokens())
    assert layers.wrong == 0
    assert layers.output <= 1
    assert layers.codes == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3)
    assert not [name for name, p in model.named_parameters() if "_proj" in name and "bias" not in name]
    assert isinstance(model.lm_head, torch.nn.Linear)


@torch.inference_mode()
def test_biases():
    model = make(attention_bias=True)
    for layer in model.ternary_layers().values():
        if layer.bias is not None:
            layer.bias.data = torch.randn_like(layer.bias)
    source = copy.deepcopy(model)
    layers = compare_layers(source, model.quantize(), tokens())
    assert (layers.wrong, layers.output <= 1) == (0, True)
    assert distance(model(tokens()).logits, source(tokens()).logits) <= LOGITS[torch.float32]


@torch.inference_mode()
def test_the_comparison_sees_one_wrong_code():
    model = make()
    source = copy.deepcopy(model)
    packed = model.quantize(fuse_qkv=False, fuse_gateup=False)
    state = packed.state_dict()
    name = "model.layers.1.mlp.down_proj.qweight"
    state[name] = state[name].clone()
    state[name][3, 5] ^= 3 << 2  # codes are value + 2: another value in the second of four
    packed.load_state_dict(state)
    assert compare_layers(source, packed, tokens()).wrong == 1


@torch.inference_mode()
def test_generation_goes_through_the_cache():
    model = make().quantize()
    prompt = tokens(2, 5)
    out = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    again = prompt
    for _ in range(6):
        again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, again)


def test_the_float_model_learns():
    model = make(num_hidden_layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    text = torch.arange(64).remainder(7).view(4, 16)
    losses = []
    for _ in range(15):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    with torch.inference_mode():
        learnt = model(text, labels=text).loss.item()
        assert model.quantize()(text, labels=text).loss.item() == pytest.approx(learnt, rel=0.02)


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_packed():
    model = make()
    with pytest.raises(ArgumentError, match="not packed"):
        model.save_quantized("nowhere")
    with pytest.raises(ArgumentError, match=r"torch\.float64"):
        copy.deepcopy(model).double().quantize()
    model.quantize(build=False)
    with pytest.raises(ArgumentError, match="packed already"):
        model.quantize()


def test_weights_that_are_no_numbers_are_named_and_nothing_is_packed():
    model = make()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ArgumentError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds a NaN"):
        model.quantize()
    assert not model.config.packed
    assert not any(layer.deployed for layer in model.ternary_layers().values())


def test_a_model_that_deploy_packed_writes_no_folder(tmp_path):
    model = bitblas.deploy(make(), build=False)
    for call in (lambda: model.save_pretrained(tmp_path / "made"), model.quantize):
        with pytest.raises(
            ArgumentError, match=r"q_proj has been packed by itself \(14 layers have\): call quantize\(\)"
        ):
            call()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("fields", [{"weight_bits": 2}, {"input_bits": 4}])
def test_other_numbers_of_bits(fields):
    with pytest.raises(ConfigError, match="weight_bits is"):
        BitnetConfig(**SIZES, **fields)


# -- folders ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "fused", "fields"),
    [
        (torch.float32, True, {}),
        (torch.float32, True, {"attention_bias": True}),
        (torch.float16, False, {}),
        (torch.bfloat16, True, {"tie_word_embeddings": True}),
    ],
)
def test_a_packed_folder_gives_the_same_model(tmp_path, dtype, fused, fields):
    model = make(dtype, **fields).quantize(fuse_qkv=fused, fuse_gateup=fused)
    model.generation_config.max_new_tokens = 5
    model.save_quantized(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "self_attn.qkv_proj" if fused else "self_attn.k_proj"
    rows = 64 + 2 * 32 if fused else 32
    assert stored[f"model.layers.0.{name}.qweight"].shape == (rows, 16)
    assert stored[f"model.layers.0.{name}.sw"].dtype is torch.float64
    assert not [key for key in stored if key.endswith("_proj.weight")]
    loaded = BitnetForCausalLM.from_quantized(tmp_path)
    assert loaded.dtype is dtype
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 5
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    again = tmp_path / "again"
    loaded.save_quantized(again)
    for key, tensor in load_file(again / "model.safetensors").items():
        assert torch.equal(tensor, stored[key]), key


@torch.inference_mode()
def test_a_packed_folder_in_another_dtype(tmp_path):
    model = make().quantize()
    model.save_quantized(tmp_path)
    loaded = BitnetForCausalLM.from_quantized(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype is torch.bfloat16
    assert distance(loaded(tokens()).logits, model(tokens()).logits) <= LOGITS[torch.bfloat16]
    assert loaded.model.layers[0].mlp.down_proj.sw.dtype is torch.float64


def test_damaged_folders(tmp_path):
    make().quantize(build=False).save_quantized(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.sw"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        BitnetForCausalLM.from_quantized(tmp_path)
    wide = "model.layers.0.mlp.down_proj.qweight"
    save_file({**tensors, wide: tensors[wide][:, :-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=wide):
        BitnetForCausalLM.from_quantized(tmp_path)
    with pytest.raises(CheckpointError, match="from_quantized"):
        BitnetForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"torch\.float64"):
        BitnetForCausalLM.from_quantized(tmp_path, dtype=torch.float64)


@torch.inference_mode()
def test_float_folders(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "ours")
    loaded = BitnetForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert all(isinstance(layer, BitLinear) for layer in loaded.ternary_layers().values())
    with pytest.raises(CheckpointError, match="does not say that weights are packed"):
        BitnetForCausalLM.from_quantized(tmp_path / "ours")
    # transformers' own class reads the same folder
    assert isinstance(BitNetForCausalLM.from_pretrained(tmp_path / "ours").model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_float_folders_with_other_tensors(tmp_path):
    make(attention_bias=True, initializer_range=0.05).save_pretrained(
        tmp_path
    )  # weights are drawn so where they are missing
    path, full = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.attn_sub_norm.weight"
    bias = "model.layers.1.self_attn.o_proj.bias"
    fewer = {name: tensor for name, tensor in full.items() if name not in (up, norm, bias)}
    for tensors, message in (
        (fewer, rf"{up} is missing, {norm} is missing, {bias} is missing$"),
        ({**full, "model.more": torch.ones(2)}, "model.more is not known"),
        ({**full, up: torch.ones(160, 32)}, rf"{up} has shape \(160, 32\) instead of \(160, 64\)"),
    ):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            BitnetForCausalLM.from_pretrained(tmp_path)
    loaded = BitnetForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    # who asks for the report has numbers that were drawn, and not what was in memory
    save_file(fewer, path, metadata={"format": "pt"})
    held = [torch.full((160, 64), 7e37) for _ in range(60)]
    del held
    loaded, report = BitnetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {up, norm, bias}
    assert loaded.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.equal(loaded.model.layers[1].self_attn.o_proj.bias, torch.zeros(64))
    assert torch.equal(loaded.model.layers[0].mlp.gate_proj.weight, full[up.replace("up", "gate")])


def test_packed_folders_are_for_from_quantized_alone(tmp_path):
    folder = tmp_path / "packed"
    make().quantize(build=False).save_quantized(folder)
    with pytest.raises(ValueError, match=f"model type `{PACKED_TYPE}`"):
        AutoModelForCausalLM.from_pretrained(folder)
    for read in (bitblas.load_model, lambda path: repack(path, tmp_path / "made")):
        with pytest.raises(CheckpointError, match=r"BitnetForCausalLM\.from_quantized"):
            read(folder)
    config = BitnetConfig.from_pretrained(folder)
    assert (config.packed, config.model_type, config.hidden_size) == (True, "bitnet", 64)
    assert BitnetConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_folders_of_other_models(tmp_path, kind):
    AutoConfig.for_model(kind, hidden_size=64, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"a model of type '{kind}'"):
        BitnetForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weight_bits": 1, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"architectures is \['LlamaForCausalLM'\]"):
        BitnetForCausalLM.from_pretrained(tmp_path)


@torch.inference_mode()
def test_1bitllms_layout(tmp_path):
    model = make(hidden_act="silu", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    write_like_1bitllm(model, tmp_path / "theirs")
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert fields["model_type"] == "llama"
    assert "model.layers.0.self_attn.inner_attn_ln.weight" in load_file(tmp_path / "theirs" / "model.safetensors")
    for name in ("hidden_act", "rope_theta"):  # what llama means where nothing is said
        del fields[name]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(fields))
    loaded = BitnetForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    loaded.save_pretrained(tmp_path / "ours")  # in transformers' layout
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(model.state_dict())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "bitnet"
    loaded.quantize(build=False).save_quantized(tmp_path / "packed")
    packed = BitnetForCausalLM.from_quantized(tmp_path / "packed")
    assert torch.equal(packed(tokens()).logits, model.quantize()(tokens()).logits)


@torch.inference_mode()
def test_quantization_configs(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    path.write_text(json.dumps({**fields, "quantization_config": online}))  # float weights, rounded at each call
    loaded = BitnetForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    for other in (
        {**online, "quantization_mode": "offline"},
        {**online, "use_rms_norm": True},
        {"quant_method": "gptq"},
    ):
        path.write_text(json.dumps({**fields, "quantization_config": other}))
        with pytest.raises(CheckpointError, match="bitblas repack"):
            BitnetForCausalLM.from_pretrained(tmp_path)


def test_the_readmes_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_like_1bitllm(make(), tmp_path / "bitnet_b1_58-3B")
    programs = [text for _, language, text in blocks(README) if language == PYTHON]
    assert len(programs) == 2
    for program in programs:
        names = {}
        exec(compile(program, str(README), "exec"), names)
    assert list(names["packed"].state_dict()) == ["format", "qweight", "sw"]
    assert names["fresh"].deployed


def test_a_config_of_transformers_is_taken():
    model = BitnetForCausalLM(BitNetConfig(**SIZES))
    assert isinstance(model.config, BitnetConfig)
    assert len(model.ternary_layers()) == 14
    assert not any(isinstance(layer, BitLinearBitBLAS) for layer in model.modules())
    assert isinstance(Exact(model.model.layers[0].mlp.up_proj), torch.nn.Module)
