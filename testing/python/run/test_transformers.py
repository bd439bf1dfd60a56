"""Models of transformers with quantized layers: loaded, run, saved and quantized, beside float64."""

import copy
import importlib
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bitblas
import tiny_models
from bitblas.codecs.rounding import quantize
from tiny_models import ARCHITECTURES, MIXED

transformers = pytest.importorskip("transformers", minversion="5", reason="pip install 'bitblas[transformers]'")
BitBLASConfig = importlib.import_module("bitblas_transformers").BitBLASConfig

AutoModel, AutoModelForCausalLM = transformers.AutoModel, transformers.AutoModelForCausalLM
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: How many times as far from float64 as the same model with float32 linear layers logits may be: those round alike, and sum in
#: another order. Of 36 tiny models (six architectures, formats, dtypes) it was 0.6 to 1.9 times.
FACTOR = 3.0


def load(tiny, **options):
    return AutoModelForCausalLM.from_pretrained(tiny.folder, **options)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bitblas.Linear)}


@torch.inference_mode()
def logits(model, ids=None):
    return model(tiny_models.tokens() if ids is None else ids).logits.double()


@torch.inference_mode()
def bound(tiny, dtype, ids=None):
    exact = logits(tiny.exact, ids)
    return exact, FACTOR * (logits(tiny_models.wide(tiny, dtype), ids) - exact).abs().max()


def check(model, tiny, dtype, ids=None):
    exact, most = bound(tiny, dtype, ids)
    found = logits(model, ids)
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= most, f"{(found - exact).abs().max():.2e} > {most:.2e}"


# -- running ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_in_float32(tiny, name):
    model = load(tiny(name), dtype=torch.float32)
    assert set(layers(model)) == set(tiny(name).layers)
    check(model, tiny(name), torch.float32)
    check(model, tiny(name), torch.float32, tiny_models.tokens(1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_format_for_each_layer(tiny, dtype):
    mixed = tiny("llama", MIXED)
    model = load(mixed, dtype=dtype)
    assert {layer.W_dtype for layer in layers(model).values()} == {entry["W_dtype"] for entry in MIXED}
    assert {layer.A_dtype for layer in layers(model).values()} == {str(dtype).removeprefix("torch.")}
    check(model, mixed, dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_logits_in_half_precision(tiny, dtype, name):
    model = load(tiny(name), dtype=dtype)
    assert model.dtype is dtype
    check(model, tiny(name), dtype)


@pytest.mark.parametrize("part", ["qweight", "scales", "zeros"])
def test_the_comparison_notices_one_bit(tiny, part):
    model = load(tiny("llama"), dtype=torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    state = layer.state_dict()
    state[part].view(-1).view(torch.uint8)[5] ^= 4
    layer.load_state_dict(state)
    with pytest.raises(AssertionError, match="e-"):
        check(model, tiny("llama"), torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_the_dense_model(tiny, name):
    model, dense = load(tiny(name), dtype=torch.float32), copy.deepcopy(tiny(name).exact).float()
    ids = tiny_models.tokens()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    wanted, found = dense.generate(ids, **options), model.generate(ids, **options)
    assert found.shape == (2, 23)
    assert torch.equal(found, wanted)
    assert "tied" in name or len(set(found[:, 11:].flatten().tolist())) > 2  # it repeats itself


@torch.inference_mode()
def test_a_prompt_at_once_is_what_its_tokens_are_one_by_one(tiny):
    model, ids = load(tiny("llama"), dtype=torch.float32), tiny_models.tokens(1, 9)
    out, parts = model(ids[:, :4], use_cache=True), []
    parts.append(out.logits)
    for column in range(4, 9):
        out = model(ids[:, column : column + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    exact, most = bound(tiny("llama"), torch.float32, ids)
    assert (torch.cat(parts, 1).double() - exact).abs().max() <= most


def test_the_whole_forward_compiles(tiny):
    model, ids = load(tiny("llama"), dtype=torch.float32), tiny_models.tokens()
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
        assert (compiled - model(ids).logits).abs().max() <= 1e-5 * compiled.abs().max()


def test_gradients_reach_what_is_not_quantized(tiny):
    model, dense = load(tiny("llama"), dtype=torch.float32), copy.deepcopy(tiny("llama").exact).float()
    ids = tiny_models.tokens()
    for each in (model, dense):
        each(ids, labels=ids).loss.backward()
    wanted, found = dense.model.embed_tokens.weight.grad, model.model.embed_tokens.weight.grad
    assert wanted.abs().max() > 0
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_copy_and_a_pickled_model_are_the_same(tiny):
    model = load(tiny("llama"), dtype=torch.float32)
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)


def test_a_model_without_its_head(tiny):
    model = AutoModel.from_pretrained(tiny("llama").folder, dtype=torch.float32)
    assert set(layers(model)) == {name.removeprefix("model.") for name in tiny("llama").layers}
    ids = tiny_models.tokens()
    with torch.inference_mode():
        hidden = model(ids).last_hidden_state
        assert torch.equal(hidden, load(tiny("llama"), dtype=torch.float32).model(ids).last_hidden_state)


# -- where and in what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_device_maps(tiny, device_map):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto is the card")
    model = load(tiny("llama"), device_map=device_map, dtype="float32")
    assert {str(tensor.device) for tensor in model.state_dict().values()} == {"cpu"}
    check(model, tiny("llama"), torch.float32)


def test_the_dtype_of_the_folder_is_the_default(tiny):
    for options in ({}, {"dtype": "auto"}):
        model = load(tiny("llama"), **options)
        assert model.dtype is torch.float16
        assert {layer.out_dtype for layer in layers(model).values()} == {"float16"}


def test_a_dtype_without_kernels(tiny):
    with pytest.raises(bitblas.BitBLASError, match=r"dtype is torch.float64; activations can be torch.float32"):
        load(tiny("llama"), dtype=torch.float64)


def test_weights_on_a_disk_are_refused(tiny, tmp_path):
    with pytest.raises(bitblas.ArgumentError, match="quantized layers cannot be on a disk"):
        load(tiny("llama"), device_map={"": "disk"}, offload_folder=tmp_path)


def test_operators_are_shared_and_built(tiny):
    model = load(tiny("llama"), dtype=torch.float32)
    operators = {id(layer.bitblas_matmul): layer.bitblas_matmul for layer in layers(model).values()}
    shapes = {(layer.in_features, layer.out_features) for layer in layers(model).values()}
    assert len(operators) == len(shapes) == 4
    assert {operator.origin for operator in operators.values()} <= {"compiled", "loaded"}


# -- saving ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2"])
def test_saved_and_loaded_again(tiny, tmp_path, name, dtype):
    model = load(tiny(name, MIXED), dtype=dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype is dtype
    assert torch.equal(logits(again), logits(model))
    wanted, found = (load_file(folder / "model.safetensors") for folder in (tiny(name, MIXED).folder, tmp_path))
    assert set(wanted) == set(found)
    for key in wanted:
        if key.endswith((".qweight", ".perm", ".format")) or found[key].dtype is torch.int8:
            assert torch.equal(wanted[key], found[key]), key
        else:
            assert torch.equal(wanted[key].to(dtype), found[key]), key
    kept = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert kept["layers"] == tiny(name, MIXED).layers


def test_shards(tiny, tmp_path):
    model = load(tiny("llama"), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_tied_embeddings_stay_tied(tiny, tmp_path):
    model = load(tiny("llama, tied"), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - it is no mapping
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_state_dict_as_a_file(tiny, tmp_path):
    model = load(tiny("llama"), dtype=torch.float32)
    wanted = logits(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    states = [torch.load(tmp_path / "state.pt", weights_only=True), load_file(tmp_path / "state.safetensors")]
    for state in states:
        other = load(tiny("llama"), dtype=torch.float32)
        for layer in layers(other).values():
            layer.scales.zero_()
        other.load_state_dict(state)
        assert torch.equal(logits(other), wanted)


# -- quantizing while loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [None, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2"])
def test_a_dense_folder_is_rounded(dense, tmp_path, name, symmetric):
    source, folder = dense(name)
    wanted = BitBLASConfig("int4" if symmetric else "uint4", 32, symmetric)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.float32)
    assert set(layers(model)) == set(tiny_models.linears(source))
    for layer_name, (_, _, transposed) in tiny_models.linears(source).items():
        module, layer = source.get_submodule(layer_name), model.get_submodule(layer_name)
        weight = module.weight.T if transposed else module.weight
        rounded = quantize(weight.detach(), wanted.W_dtype, 32, symmetric).dequantize()
        assert torch.equal(layer.to_quantized().dequantize(), rounded)
        assert torch.equal(layer.bias, module.bias) if module.bias is not None else layer.bias is None
        module.weight.data = rounded.T.contiguous() if transposed else rounded
    expected = logits(source)
    assert (logits(model) - expected).abs().max() <= 2e-5 * expected.abs().max()

    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    kept = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    zeros = None if symmetric else "quantized"
    entry = {"W_dtype": wanted.W_dtype, "group_size": 32, "zeros_mode": zeros, "act_order": False}
    assert kept["layers"] == {key: entry for key in layers(model)}  # noqa: C420 - one for each
    assert kept["modules_to_not_convert"] == ["lm_head"]


def test_layers_that_stay_dense(dense):
    _, folder = dense()
    wanted = BitBLASConfig("uint4", 32, modules_to_not_convert=["lm_head", "k_proj", "model.layers.1"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.float32)
    assert set(layers(model)) == {
        f"model.layers.0.{name}"
        for name in (
            *("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    }


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (BitBLASConfig("uint4", 48), "group_size is 48, which does not divide the 64 inputs of model.layers.0"),
        (BitBLASConfig("float16", 32), "W_dtype is 'float16', which is not quantized"),
        (BitBLASConfig("uint9", 32), "uint9"),
    ],
)
def test_what_cannot_be_rounded_to(dense, wanted, message):
    _, folder = dense()
    with pytest.raises(bitblas.BitBLASError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted)
