"""Folders of models: damaged and foreign ones, `load_model`, the config, and what the documents do with them."""

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark import model as benchmark_of_models
from safetensors.torch import load_file, save_file

import bitblas
import checkpoint_folders as foreign
import tiny_bitnet
import tiny_models
from bitblas import env
from bitblas.checkpoints import repack, unpack
from bitblas.codecs import format_tensor
from documents import CONSOLE, PYTHON, blocks
from tiny_models import UINT4

transformers = pytest.importorskip("transformers", minversion="5", reason="pip install 'bitblas[transformers]'")
bitblas_transformers = importlib.import_module("bitblas_transformers")
BitBLASConfig = bitblas_transformers.BitBLASConfig

ROOT = Path(__file__).resolve().parents[3]
AutoModelForCausalLM = transformers.AutoModelForCausalLM


@pytest.fixture
def spoiled(tiny, tmp_path):
    """``spoiled(change)``: a copy of a folder, with a change to its tensors or its quantization_config."""

    def make(change, name="llama"):
        folder = tmp_path / "spoiled"
        shutil.copytree(tiny(name).folder, folder)
        tensors, path = load_file(folder / "model.safetensors"), folder / "config.json"
        config = json.loads(path.read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path.write_text(json.dumps(config))
        return folder

    return make


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bitblas.Linear)}


# -- damaged and foreign folders -------------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"


def other_format(tensors, config):
    tensors[f"{LAYER}.format"] = tiny_models.format_bytes({**UINT4, "group_size": 64})


def no_format(tensors, config):
    tensors[f"{LAYER}.format"] = torch.zeros(128, dtype=torch.uint8)


def lost(part):
    def change(tensors, config):
        del tensors[f"{LAYER}.{part}"]

    return change


def put(part, tensor):
    return lambda tensors, config: tensors.update({f"{LAYER}.{part}": tensor})


def no_entry(tensors, config):
    del config["layers"][LAYER]


def no_order(tensors, config):
    config["layers"][LAYER] = {**config["layers"][LAYER], "act_order": True}
    tensors[f"{LAYER}.perm"] = torch.zeros(64, dtype=torch.int32)


def of_uint8(tensors, config):
    tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"].view(torch.uint8)


def of_the_embedding(tensors, config):
    config["layers"]["model.embed_tokens"] = config["layers"][LAYER]


def of_no_layer(tensors, config):
    config["layers"]["model.layers.7.mlp.up_proj"] = config["layers"][LAYER]


def of_other_sizes(tensors, config):
    config["layers"][LAYER] = {**config["layers"][LAYER], "in_features": 63}


def of_other_groups(tensors, config):
    config["layers"][LAYER] = {**config["layers"][LAYER], "group_size": 48}


def of_the_future(tensors, config):
    config["format_version"] = 2


def of_nothing(tensors, config):
    del config["layers"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_format, rf"{LAYER}.format says .*'group_size': 64.*config.json says .*'group_size': 32"),
        (no_format, rf"{LAYER}.format holds"),
        *((lost(part), rf"{LAYER}.{part} is in no file") for part in ("qweight", "scales", "zeros", "format")),
        (no_order, rf"{LAYER}.perm is no permutation of 0 to 63"),
        (put("bias", torch.ones(160)), rf"{LAYER}.bias in .*model.safetensors is there, .* has no bias"),
        (put("perm", torch.arange(64).int()), rf"{LAYER}.perm in .*model.safetensors is there, .* has no perm"),
        (
            put("scales", torch.ones(3, 3)),
            rf"{LAYER}.scales in .*model.safetensors has shape \(3, 3\); the model takes \(160, 2\)",
        ),
        (no_entry, rf"{LAYER}.(format|qweight) in .*model.safetensors is .* which config.json does not name"),
        (of_uint8, rf"{LAYER}.qweight is torch.uint8; expected torch.int8"),
        (of_the_embedding, "model.embed_tokens is quantized in config.json; the model has a Embedding there"),
        (of_no_layer, "model.layers.7.mlp.up_proj is quantized in config.json; LlamaForCausalLM has no such layer"),
        (of_other_sizes, f"{LAYER} has 63 inputs in config.json, and 64 in the model"),
        (of_other_groups, f"{LAYER}: group_size is 48; it must be -1 or a divisor of K = 64"),
        (of_the_future, "format_version is 2; this bitblas knows versions up to 1"),
        (of_nothing, "does not say what is quantized"),
    ],
)
def test_a_folder_that_is_not_what_it_says(spoiled, change, message):
    with pytest.raises(bitblas.CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(spoiled(change), dtype=torch.float32)


@pytest.mark.parametrize("more", [{}, {"ignore_mismatched_sizes": True}])
def test_a_weight_of_another_shape(spoiled, more):
    def change(tensors, config):
        tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"][1:].contiguous()

    with pytest.raises(bitblas.CheckpointError, match=rf"{LAYER}.qweight in .*model.safetensors has shape \(159, 32\)"):
        AutoModelForCausalLM.from_pretrained(spoiled(change), dtype=torch.float32, **more)


@pytest.mark.parametrize("part", ["scales", "zeros", "bias"])
def test_values_beyond_the_dtype(spoiled, part):
    """They are finite in the folder, and in bfloat16."""
    name, layer = ("llama", LAYER) if part != "bias" else ("gpt2", "transformer.h.0.attn.c_attn")

    def change(tensors, config):
        if part == "zeros":
            config["layers"][layer]["zeros_mode"] = "original"
            tensors[f"{layer}.format"] = format_tensor("uint4", 32, "original")
            tensors[f"{layer}.zeros"] = torch.full(tensors[f"{layer}.scales"].shape, 1e8)
        else:
            tensors[f"{layer}.{part}"] = tensors[f"{layer}.{part}"].float() * 0 + 1e8

    folder = spoiled(change, name)
    for load in (AutoModelForCausalLM.from_pretrained, functools.partial(bitblas.load_model, device="cpu")):
        with pytest.raises(bitblas.CheckpointError, match=rf"{layer}.{part} holds values beyond torch.float16"):
            load(folder, dtype=torch.float16)
        load(folder, dtype=torch.bfloat16)


def test_files_that_are_damaged(spoiled):
    folder = spoiled(lambda tensors, config: None)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for load in (AutoModelForCausalLM.from_pretrained, bitblas.load_model):
        with pytest.raises(bitblas.CheckpointError, match=rf"{path} is truncated"):
            load(folder)
    path.unlink()
    with pytest.raises(bitblas.CheckpointError, match="has no weights"):
        bitblas.load_model(folder)


# -- folders of other projects ---------------------------------------------------------------------------------------------

FOREIGN = {
    "gptq": (foreign.gptq_layer, {}, foreign.gptq_config()),
    "gptq, act-order": (foreign.gptq_layer, {"act_order": True}, foreign.gptq_config(act_order=True)),
    "awq": (foreign.awq_layer, {}, foreign.awq_config()),
    "compressed-tensors": (foreign.compressed_layer, {}, foreign.compressed_config()),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_repacked_and_loaded_and_unpacked(tmp_path, kind):
    """A whole model of each kind, packed from its documentation, beside float64, and the dense folder that it is unpacked to.

    The bound is what the dense model, in float32, is off by; with weights as large as these, about 5e-6 of the largest logit.
    """
    pack, options, said = FOREIGN[kind]
    exact = tiny_models.dense("llama")
    tensors = {key: tensor.half() for key, tensor in exact.state_dict().items()}
    for seed, (name, (k, n, _)) in enumerate(tiny_models.linears(exact).items()):
        parts, weight = pack(n, k, seed=seed, **options)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        exact.get_submodule(name).weight.data = torch.from_numpy(weight)
    config = {**exact.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    folder = foreign.write(tmp_path / "theirs", tensors, said, shards=2, config=config)
    repack(folder, tmp_path / "ours")
    unpack(tmp_path / "ours", tmp_path / "dense", dtype="float32")

    ids = tiny_models.tokens()
    model = bitblas.load_model(tmp_path / "ours", dtype=torch.float32, device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.inference_mode():
        wanted = exact(ids).logits
        most = 3 * (dense(ids).logits.double() - wanted).abs().max()  # as in test_transformers.py
        assert most <= 5e-5 * wanted.abs().max()
        assert (model(ids).logits.double() - wanted).abs().max() <= most
    assert len(layers(model)) == 14


# -- load_model ------------------------------------------------------------------------------------------------------------


def test_load_model(tiny):
    model = bitblas.load_model(tiny("llama").folder, dtype=torch.float32, device="cpu")
    assert type(model) is transformers.LlamaForCausalLM
    assert not model.training
    assert {layer.bitblas_matmul.origin for layer in layers(model).values()} <= {"compiled", "loaded"}
    ids = tiny_models.tokens()
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(tiny("llama").folder, dtype=torch.float32)(ids).logits
        assert torch.equal(model(ids).logits, wanted)
    model = bitblas.load_model(str(tiny("llama").folder), device="cpu", attn_implementation="eager")
    assert model.dtype is torch.float16
    assert model.config._attn_implementation == "eager"


def test_load_model_for_the_cpu_needs_no_accelerate(tiny, monkeypatch):
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    folder = tiny("llama").folder
    with pytest.raises(ValueError, match="requires `accelerate`"):  # what transformers says where it does need it
        bitblas.load_model(folder, device_map="cpu")
    assert bitblas.load_model(folder, device="cpu").device.type == "cpu"
    with torch.device("meta"), pytest.raises(ValueError, match="requires `accelerate`"):  # another default than asked
        bitblas.load_model(folder, device="cpu")


def test_load_model_without_a_dense_tensor(spoiled):
    folder = spoiled(lambda tensors, config: tensors.pop("model.norm.weight"))
    with pytest.raises(bitblas.CheckpointError, match=rf"model.norm.weight is in no file of {folder}"):
        bitblas.load_model(folder, device="cpu")


def test_load_model_with_a_dense_tensor_of_another_shape(spoiled):
    folder = spoiled(lambda tensors, config: tensors.update({"model.norm.weight": torch.ones(63)}))
    message = r"model.norm.weight in .*model.safetensors has shape \(63,\); the model takes \(64,\)"
    with pytest.raises(bitblas.CheckpointError, match=message):
        bitblas.load_model(folder, device="cpu")
    model, report = bitblas.load_model(folder, device="cpu", ignore_mismatched_sizes=True, output_loading_info=True)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert report["mismatched_keys"]


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "opt"])
def test_load_model_of_tied_weights(tiny, name):
    assert layers(bitblas.load_model(tiny(name).folder, device="cpu"))


def test_load_model_takes_one_place(tiny):
    with pytest.raises(bitblas.ArgumentError, match="device is cpu and device_map is 'auto': give one of them"):
        bitblas.load_model(tiny("llama").folder, device="cpu", device_map="auto")


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_load_model_says_how_a_foreign_folder_is_converted(spoiled, method):
    folder = spoiled(lambda tensors, config: config.update(quant_method=method))
    message = rf"quant_method is '{method}'.*bitblas repack {folder} DESTINATION"
    with pytest.raises(bitblas.CheckpointError, match=message):
        bitblas.load_model(folder)


def test_load_model_of_what_is_no_quantized_folder(dense, tmp_path):
    with pytest.raises(bitblas.CheckpointError, match=r"config\.json cannot be read"):
        bitblas.load_model(tmp_path / "nowhere")
    with pytest.raises(bitblas.CheckpointError, match=r"the model is dense.*bitblas\.quantize_"):
        bitblas.load_model(dense()[1])


def test_load_model_without_transformers(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(bitblas.UnsupportedError, match=r"pip install 'bitblas\[transformers\]'"):
        bitblas.load_model(tiny("llama").folder)


def test_transformers_is_imported_where_it_is_needed():
    script = "import sys, bitblas; bitblas.load_model; assert not {'transformers', 'bitblas_transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": str(ROOT / "python")}, timeout=60)


def test_a_warm_store_is_enough(tiny, tmp_path):
    """A second process loads the same operators, and imports no TVM."""
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    script = (
        "import sys, bitblas, torch\n"
        f"model = bitblas.load_model({str(tiny('llama').folder)!r}, dtype='float32', device='cpu')\n"
        "model(torch.ones(1, 3, dtype=torch.long))\n"
        "print({m.bitblas_matmul.origin for m in model.modules() if isinstance(m, bitblas.Linear)}, 'tvm' in sys.modules)"
    )
    paths = f"{ROOT / 'python'}:{ROOT / 'integration' / 'transformers'}"
    environment = {
        "PYTHONPATH": paths,
        "PATH": os.environ["PATH"],
        env.CACHE_DIR.name: str(store),
        env.TARGET.name: "llvm",
    }
    said = [
        subprocess.run(
            [sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True, timeout=300
        ).stdout.split("\n")[-2]
        for _ in range(2)
    ]
    assert said == ["{'compiled'} True", "{'loaded'} False"]


# -- the config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [0, -2, 32.0, "32", True, None])
def test_groups_that_are_none(group_size):
    with pytest.raises(
        bitblas.ConfigError, match=rf"group_size is {group_size!r}; it must be -1 or a positive integer"
    ):
        BitBLASConfig(group_size=group_size)


def test_a_config_survives_its_json():
    asked = BitBLASConfig("uint3", 64, True, ["lm_head"])
    assert BitBLASConfig.from_dict(asked.to_dict()).to_dict() == asked.to_dict()
    read = BitBLASConfig(layers={"a.b": UINT4}, modules_to_not_convert=["lm_head"])
    assert read.to_dict() == {
        "quant_method": "bitblas",
        "format_version": 1,
        "modules_to_not_convert": ["lm_head"],
        "layers": {"a.b": UINT4},
    }
    assert BitBLASConfig.from_dict(read.to_dict()).layers == read.layers
    assert transformers.AutoConfig.for_model("llama", quantization_config=read.to_dict()).quantization_config
    assert bitblas_transformers.BitBLASHfQuantizer(read).is_serializable()


# -- documents and the benchmark -------------------------------------------------------------------------------------------


def test_the_readme_does_what_it_says(tiny, dense, tmp_path, monkeypatch):
    shutil.copytree(tiny("llama").folder, tmp_path / "ours")
    dense("llama")
    tiny_bitnet.make("bitlinear", tied=True).write(tmp_path / "bitnet")
    monkeypatch.chdir(tmp_path)
    path = ROOT / "integration" / "transformers" / "README.md"
    namespace = {}
    for line, language, text in blocks(path):
        assert language in (PYTHON, CONSOLE)
        if language == PYTHON:
            exec(compile("\n" * line + text, str(path), "exec"), namespace)
    assert namespace["tokens"].shape == (1, 11)
    for saved in ("again", "rounded", "bitnet-ours"):
        assert layers(AutoModelForCausalLM.from_pretrained(tmp_path / saved))
    for name in ("transformers", "accelerate", "safetensors"):
        pinned = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert not pinned or f"{name} {pinned[1]}" in path.read_text()


@pytest.mark.slow
def test_the_benchmark_of_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(map(str, (ROOT / "python", ROOT / "integration" / "transformers")))
    )
    monkeypatch.chdir(ROOT)
    sizes = ["--blocks", "1", "--hidden", "128", "--heads", "2", "--intermediate", "256", "--vocab", "64"]
    benchmark_of_models.main(
        [*sizes, "--starts", "1", "--rounds", "1", "--out", str(tmp_path)]
    )  # so small a one reaches no goals
    found = json.loads((tmp_path / "model.json").read_text())
    assert set(found["starts"]) == {"bitblas, cold", "bitblas, warm", "torch float32"}
    assert found["starts"]["bitblas, cold"]["load"] > found["starts"]["bitblas, warm"]["load"]
    assert found["errors"]["bitblas float32"] < 1e-5
    assert found["errors"]["bitblas bfloat16"] < 0.1
    assert 0.25 < found["ratio"] < 0.3
