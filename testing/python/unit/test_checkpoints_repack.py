"""Folders repacked and unpacked: values, files, what is refused, and that nothing half-made is left."""

import errno
import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint_folders as folders
from bitblas import ArgumentError, CheckpointError
from bitblas.checkpoints import convert, open_shards, read_layers, read_weights, repack, unpack, writing
from bitblas.checkpoints.spec import LayerSpec
from bitblas.codecs import parse_format_tensor
from bitblas.formats import FORMATS

#: Kinds of source: (layer's packer, its options, what is said in config.json, format of the result).
KINDS = {
    "gptq": (folders.gptq_layer, {}, folders.gptq_config(), "uint4"),
    "gptq sym": (folders.gptq_layer, {"sym": True}, folders.gptq_config(sym=True), "int4"),
    "gptq v2": (folders.gptq_layer, {"version": 2, "bias": True}, folders.gptq_config(version=2), "uint4"),
    "gptq act-order": (folders.gptq_layer, {"act_order": True}, folders.gptq_config(act_order=True), "uint4"),
    "gptq 2": (folders.gptq_layer, {"bits": 2}, folders.gptq_config(bits=2), "uint2"),
    "gptq 3": (folders.gptq_layer, {"bits": 3, "act_order": True}, folders.gptq_config(bits=3), "uint3"),
    "gptq 3 v2": (folders.gptq_layer, {"bits": 3, "version": 2}, folders.gptq_config(bits=3, version=2), "uint3"),
    "gptq 8": (folders.gptq_layer, {"bits": 8}, folders.gptq_config(bits=8), "uint8"),
    "gptq 8 sym": (folders.gptq_layer, {"bits": 8, "sym": True}, folders.gptq_config(bits=8, sym=True), "int8"),
    "awq": (folders.awq_layer, {"bias": True}, folders.awq_config(), "uint4"),
    "awq sym": (folders.awq_layer, {"sym": True}, folders.awq_config(), "int4"),
    "compressed": (folders.compressed_layer, {}, folders.compressed_config(), "int4"),
    "compressed asym": (folders.compressed_layer, {"sym": False}, folders.compressed_config(sym=False), "uint4"),
    "compressed bf16": (folders.compressed_layer, {"dtype": torch.bfloat16}, folders.compressed_config(), "int4"),
    "compressed channel": (folders.compressed_layer, {"group": -1}, folders.compressed_config(group=-1), "int4"),
    "compressed act-order": (
        folders.compressed_layer,
        {"act_order": True, "bias": True},
        folders.compressed_config(act_order=True),
        "int4",
    ),
    "compressed 8": (folders.compressed_layer, {"bits": 8}, folders.compressed_config(bits=8), "int8"),
    "compressed int8 zeros": (
        folders.compressed_layer,
        {"sym": False, "signed_zeros": True},
        folders.compressed_config(sym=False),
        "uint4",
    ),
    "compressed tensor": (
        folders.compressed_layer,
        {"group": -1, "whole": True},
        folders.compressed_config(group=-1),
        "int4",
    ),
    "compressed tensor asym": (
        folders.compressed_layer,
        {"group": -1, "whole": True, "sym": False},
        folders.compressed_config(group=-1, sym=False),
        "uint4",
    ),
    "compressed 3": (
        folders.compressed_layer,
        {"bits": 3, "sym": False},
        folders.compressed_config(bits=3, sym=False),
        "uint3",
    ),
}
#: Where the other parts of a layer than its codes are in the next file.
SPLIT = {"weight": 0, "qweight": 0, "weight_packed": 0, "scales": 1, "weight_scale": 1, "qzeros": 1, "bias": 1}


def source(path, kind="gptq", shards=1, split=None, change=None, **more):
    """A folder of a kind: (its path, dense weights). `change` gets the tensors before they are written."""
    layer, options, quantization, _ = KINDS[kind]
    tensors, dense = folders.model(layer, **options, **more)
    if change is not None:
        change(tensors)
    return folders.write(path, tensors, quantization, shards, split), dense


def config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# -- values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_those_of_the_source(tmp_path, kind):
    src, dense = source(tmp_path / "src", kind)
    summary = repack(src, tmp_path / "dst")
    layers = read_layers(tmp_path / "dst")
    assert {spec.W_dtype for spec in layers.values()} == {KINDS[kind][3]}
    assert summary.formats == {KINDS[kind][3]: len(dense)}
    assert summary.layers == len(dense) == len(layers)
    assert summary.verified
    found = dict(read_weights(tmp_path / "dst"))
    assert set(found) == set(dense)
    before = open_shards(src)
    for name, wanted in dense.items():
        ours = found[name].dequantize().double().numpy()
        assert np.array_equal(ours, wanted.astype(np.float32)), name
        bias = before.find(f"{name}.bias")
        assert (found[name].bias is None) == (bias is None)
        assert bias is None or torch.equal(found[name].bias, bias)


@pytest.mark.parametrize("kind", ["gptq act-order", "awq", "compressed bf16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_round_trip(tmp_path, kind, dtype):
    src, dense = source(tmp_path / "src", kind, shards=2)
    repack(src, tmp_path / "ours")
    summary = unpack(tmp_path / "ours", tmp_path / "back", dtype=dtype)
    assert summary.layers == len(dense)
    back, before = open_shards(tmp_path / "back"), open_shards(src)
    for name, wanted in dense.items():
        ours = back.get(f"{name}.weight")
        assert torch.equal(ours, torch.from_numpy(wanted.astype(np.float32)).to(getattr(torch, dtype)))
    others = {name for name in before.infos if name.endswith(".weight")}
    assert set(back.infos) >= others
    assert all(torch.equal(back.get(name), before.get(name)) for name in others)
    assert "quantization_config" not in config(tmp_path / "back")
    assert config(tmp_path / "back")["torch_dtype"] == dtype
    assert not [name for name in back.infos if name.endswith(("qweight", "format", "perm", "scales"))]


# -- files -----------------------------------------------------------------------------------------------------------------


def test_the_files(tmp_path):
    src, dense = source(tmp_path / "src", shards=3)
    (src / "generation_config.json").write_text("{}", encoding="utf-8")
    (src / "quantize_config.json").write_text("{}", encoding="utf-8")
    (src / "pytorch_model.bin").write_text("x", encoding="utf-8")
    (src / ".git").mkdir()
    (src / ".git" / "HEAD").write_text("x", encoding="utf-8")
    (src / "extra").mkdir()
    (src / "extra" / "config.json").write_text("{1}", encoding="utf-8")
    repack(src, tmp_path / "dst")
    names = {f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)}
    copied = {"tokenizer.json", "modeling_own.py", "generation_config.json", "extra/config.json"}
    ours = folders.tree(tmp_path / "dst")
    assert set(ours) == names | copied | {"config.json", "model.safetensors.index.json"}
    assert all(ours[name] == (src / name).read_bytes() for name in copied)
    before, after = config(src), config(tmp_path / "dst")
    quantization = after.pop("quantization_config")
    assert quantization["modules_to_not_convert"] == ["lm_head"]
    assert set(quantization["layers"]) == set(dense)
    before.pop("quantization_config")
    assert after == before


def test_the_index_and_the_tensors(tmp_path):
    src, dense = source(tmp_path / "src", "gptq act-order", shards=3)
    repack(src, tmp_path / "dst")
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors = {}
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "dst" / file)  # the library's own reader
        assert all(index["weight_map"][name] == file for name in held)
        tensors |= held
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    before = open_shards(src)
    for name in dense:
        assert parse_format_tensor(tensors[f"{name}.format"])["W_dtype"] == "uint4"
        assert tensors[f"{name}.perm"].dtype is torch.int32
        at = index["weight_map"][f"{name}.qweight"]
        assert at == before.infos[f"{name}.qweight"].file
    others = [name for name in before.infos if name.endswith(".weight")]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(others)
    assert all(torch.equal(tensors[name], before.get(name)) for name in others)


@pytest.mark.parametrize("kind", ["gptq", "compressed asym"])
def test_a_layer_in_two_files(tmp_path, kind):
    src, dense = source(tmp_path / "src", kind, 2, lambda name: SPLIT.get(name.rpartition(".")[2], 0))
    whole, _ = source(tmp_path / "whole", kind)
    repack(src, tmp_path / "dst")
    repack(whole, tmp_path / "dst_whole")
    first, only = (
        load_file(tmp_path / f / n)
        for f, n in (("dst", "model-00001-of-00002.safetensors"), ("dst_whole", "model.safetensors"))
    )
    assert first.keys() == only.keys()  # the second file has nothing of its own, and is not there
    assert all(torch.equal(first[name], only[name]) for name in only)
    assert not (tmp_path / "dst" / "model-00002-of-00002.safetensors").exists()
    assert len(dense) == len(read_layers(tmp_path / "dst"))


def test_odd_sizes_stay_aligned(tmp_path):
    """Rows of an odd number of bytes, and tensors that are copied, of all kinds."""
    tensors, dense = {}, {}
    for number, (n, k) in enumerate([(3, 5), (1, 1), (7, 13), (5, 9)]):
        parts, dense[f"m.{number}"] = folders.compressed_layer(n, k, group=-1, seed=number, bias=True)
        tensors |= {f"m.{number}.{part}": tensor for part, tensor in parts.items()}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "bytes": torch.arange(3, dtype=torch.uint8)}
    tensors |= {
        "flags": torch.tensor([True]),
        "eight": torch.zeros(3).to(torch.float8_e4m3fn),
        "half": torch.ones(1).half(),
    }
    src = folders.write(tmp_path / "src", tensors, folders.compressed_config(group=-1))
    repack(src, tmp_path / "dst")
    found = load_file(tmp_path / "dst" / "model.safetensors")
    for name in ("scalar", "empty", "bytes", "flags", "eight", "half"):
        assert found[name].dtype == tensors[name].dtype
        assert torch.equal(found[name].float(), tensors[name].float())
        assert found[name].shape == tensors[name].shape
    weights = dict(read_weights(tmp_path / "dst"))
    for name, wanted in dense.items():
        assert np.array_equal(weights[name].dequantize().double().numpy(), wanted.astype(np.float32))
    unpack(tmp_path / "dst", tmp_path / "back", dtype="float32")
    assert np.array_equal(open_shards(tmp_path / "back").get("m.2.weight").numpy(), dense["m.2"].astype(np.float32))


def test_symbolic_links_are_followed(tmp_path):
    """As in the cache of Hugging Face, whose snapshots are links to blobs."""
    src, _ = source(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in src.iterdir():
        (links / path.name).symlink_to(path)
    repack(links, tmp_path / "dst")
    assert not any(path.is_symlink() for path in (tmp_path / "dst").iterdir())
    assert (tmp_path / "dst" / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()


def test_a_config_of_its_own(tmp_path):
    """AutoGPTQ's older folders: one file of another name, and quantize_config.json."""
    tensors, dense = folders.model(folders.gptq_layer)
    src = folders.write(tmp_path / "src", tensors)
    (src / "model.safetensors").rename(src / "gptq_model-4bit-32g.safetensors")
    text = json.dumps({"bits": 4, "group_size": 32, "desc_act": False, "sym": False})
    (src / "quantize_config.json").write_text(text, encoding="utf-8")
    repack(src, tmp_path / "dst")
    assert set(read_layers(tmp_path / "dst")) == set(dense)
    assert (tmp_path / "dst" / "model.safetensors").exists()


def test_a_config_by_its_older_name(tmp_path):
    tensors, dense = folders.model(folders.compressed_layer)
    src = folders.write(tmp_path / "src", tensors, config={"compression_config": folders.compressed_config()})
    repack(src, tmp_path / "dst")
    assert set(read_layers(tmp_path / "dst")) == set(dense)
    assert "compression_config" not in config(tmp_path / "dst")


def test_bits_that_differ(tmp_path):
    """GPTQModel's "dynamic": layers of other bits, which their tensors tell; without it they are refused."""
    tensors, dense = folders.model(folders.gptq_layer)
    parts, dense["model.more"] = folders.gptq_layer(64, 64, bits=8)
    tensors |= {f"model.more.{part}": tensor for part, tensor in parts.items()}
    quantization = folders.gptq_config()
    src = folders.write(tmp_path / "src", tensors, quantization)
    with pytest.raises(CheckpointError, match=r"model.more.qweight in .* has codes of 8 bits; config.json says 4"):
        repack(src, tmp_path / "dst")
    src = folders.write(tmp_path / "src", tensors, {**quantization, "dynamic": {"+:more": {"bits": 8}}})
    repack(src, tmp_path / "dst")
    found = dict(read_weights(tmp_path / "dst"))
    assert found["model.more"].W_dtype == "uint8"
    assert np.array_equal(found["model.more"].dequantize().numpy(), dense["model.more"].astype(np.float32))


def test_groups_of_a_config_that_differ(tmp_path):
    tensors, dense = folders.model(folders.compressed_layer, blocks=1)
    parts, dense["model.more"] = folders.compressed_layer(64, 64, bits=8)
    tensors |= {f"model.more.{part}": tensor for part, tensor in parts.items()}
    quantization = folders.compressed_config()
    quantization["config_groups"] |= {"more": folders.compressed_config(bits=8)["config_groups"]["group_0"]}
    repack(folders.write(tmp_path / "src", tensors, quantization), tmp_path / "dst")
    found = dict(read_weights(tmp_path / "dst"))
    assert found["model.more"].W_dtype == "int8"
    for name, wanted in dense.items():
        assert np.array_equal(found[name].dequantize().numpy(), wanted.astype(np.float32))


# -- damage ----------------------------------------------------------------------------------------------------------------

Q = "model.layers.0.mlp.up_proj"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def poison(name):
    def change(tensors):
        tensors[name].view(-1)[3] = float("nan")

    return change


DAMAGE = {
    "qzeros missing": (
        "gptq",
        drop(f"{Q}.qzeros"),
        rf"has no tensor {Q}.qzeros, which belongs to {Q}.qweight in .*model",
    ),
    "qweight missing": ("gptq", drop(f"{Q}.qweight"), rf"{Q}.(qzeros|g_idx) in .*model.* is there without {Q}.qweight"),
    "shape missing": ("compressed", drop(f"{Q}.weight_shape"), rf"has no tensor {Q}.weight_shape"),
    "scales NaN": ("gptq", poison(f"{Q}.scales"), rf"{Q}.scales in .*model.safetensors holds nan"),
    "scales NaN awq": ("awq", poison(f"{Q}.scales"), rf"{Q}.scales in .*model.safetensors holds nan"),
    "scale NaN": ("compressed", poison(f"{Q}.weight_scale"), rf"{Q}.weight_scale in .*model.safetensors holds nan"),
    "scales short": (
        "gptq",
        put(f"{Q}.scales", torch.ones(2, 64).half()),
        rf"{Q}.scales in .*model.safetensors is torch.float16 \(2, 64\); expected .* \(G, 128\)",
    ),
    "qweight short": (
        "gptq",
        put(f"{Q}.qweight", torch.zeros(7, 128, dtype=torch.int32)),
        rf"{Q}.g_idx in .*model.safetensors is torch.int32 \(64,\); expected .* \(56,\)",
    ),
    "qweight of bytes": (
        "gptq",
        put(f"{Q}.qweight", torch.zeros(8, 128, dtype=torch.uint8)),
        rf"{Q}.qweight in .* is U8",
    ),
    "qzeros short": (
        "gptq",
        put(f"{Q}.qzeros", torch.zeros(2, 15, dtype=torch.int32)),
        rf"{Q}.qweight in .*: qzeros has shape \(2, 15\), which goes with no number of bits",
    ),
    "g_idx too large": (
        "gptq",
        put(f"{Q}.g_idx", torch.full((64,), 2, dtype=torch.int32)),
        rf"{Q}.g_idx in .*model.safetensors holds 2; allowed: 0 to 1",
    ),
    "none at all": (
        "awq",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "_proj" in name],
        "has no tensor that ends in .qweight",
    ),
    "global scale": (
        "compressed",
        put(f"{Q}.weight_global_scale", torch.ones(1)),
        rf"{Q}.weight_global_scale in .* is not known",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(tmp_path, damage):
    kind, change, message = DAMAGE[damage]
    src, _ = source(tmp_path / "src", kind, change=change)
    with pytest.raises(CheckpointError, match=message):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_damage_of_a_later_file_leaves_whole_ones(tmp_path):
    """The last file has scales that are no numbers: what was made before stays, is continued, and nothing else is there."""
    src, _ = source(tmp_path / "src", shards=3, change=poison("model.layers.1.mlp.down_proj.scales"))
    with pytest.raises(CheckpointError, match=r"down_proj.scales in .*model-00003-of-00003.safetensors holds nan"):
        repack(src, tmp_path / "dst")
    left = set(folders.tree(tmp_path / "dst"))
    assert left == {".repack.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"}
    mended, _ = source(tmp_path / "mended", shards=3)
    shutil.copyfile(mended / "model-00003-of-00003.safetensors", src / "model-00003-of-00003.safetensors")
    summary = repack(src, tmp_path / "dst")
    assert 0 < summary.converted_bytes < summary.bytes_in
    repack(mended, tmp_path / "fresh")
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "fresh")


def test_a_file_that_is_truncated_or_missing(tmp_path):
    src, _ = source(tmp_path / "src", shards=2)
    path = src / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{path} is truncated.*(model|lm_head)\.[\w.]+ ends at"):
        repack(src, tmp_path / "dst")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"is in model-00002-of-00002.safetensors, and there is no such file"):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method is 'bitsandbytes'; expected one of gptq, awq, compressed-tensors",
        ),
        ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
        ({}, "not quantized|quant_method is None"),
        ({"quant_method": "bitblas"}, "it has been repacked already"),
        ([1], r"quantization_config is \[1\]"),
        ({**folders.gptq_config(), "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**folders.gptq_config(), "bits": 5}, "bits is 5; expected one of 2, 3, 4, 8"),
        ({**folders.gptq_config(), "bits": "4"}, "bits is '4'"),
        ({**folders.awq_config(), "version": "gemv"}, "version is 'gemv'; expected 'gemm'"),
        ({**folders.awq_config(), "bits": 8}, "bits is 8; expected one of 4"),
        (
            {**folders.compressed_config(), "format": "float-quantized"},
            "format is 'float-quantized'; expected 'pack-quantized'",
        ),
        ({**folders.compressed_config(), "config_groups": {}}, "config_groups is {}"),
        ({**folders.compressed_config(), "config_groups": {"a": {}}}, "config_groups.a has no weights"),
        (
            {
                **folders.compressed_config(),
                "config_groups": {
                    "a": {"weights": {"num_bits": 4, "type": "int"}, "input_activations": {"num_bits": 8}}
                },
            },
            "config_groups.a has input_activations",
        ),
        (
            {**folders.compressed_config(), "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}},
            "config_groups.a: type is 'float'",
        ),
    ],
)
def test_models_of_other_kinds(tmp_path, quantization, message):
    src, _ = source(tmp_path / "src")
    (src / "config.json").write_text(json.dumps({"quantization_config": quantization}), encoding="utf-8")
    with pytest.raises((CheckpointError, ArgumentError), match=message):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


SPOILED = {
    "transforms": (
        "compressed",
        {"transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"]}]}}}},
        None,
        "config.json: transform_config is given; rotations",
    ),
    "format": ("gptq", {"checkpoint_format": None, "format": "marlin"}, None, "format is 'marlin'; expected 'gptq' or"),
    "two formats": (
        "gptq",
        {"format": "gptq_v2"},
        None,
        "checkpoint_format is 'gptq', and format 'gptq_v2'",
    ),
    "adapter": ("gptq", {"adapter": {"name": "eora", "rank": 32}}, None, "adapter is {.*eora.*}; what is added to"),
    "lora": ("gptq", {"dynamic": {"+:up": {"lora": {"rank": 4}}}}, None, "lora is {'rank': 4}; what is added to"),
    "dynamic": ("gptq", {"dynamic": [3]}, None, r"dynamic is \[3\]; expected an object"),
    "no order": (
        "gptq act-order",
        {},
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")],
        r"down_proj.qweight in .*model.safetensors: it has no g_idx, and desc_act is true",
    ),
    "sym": ("gptq", {"sym": True}, None, r"down_proj.qzeros in .*model.safetensors holds zero points that are not 8"),
    "groups": (
        "gptq",
        {"group_size": 64},
        None,
        r"down_proj.qweight in .*: its scales are of 4 groups of its 128 columns; group_size is 64 in config.json",
    ),
    "one group": ("gptq", {"group_size": -1}, None, "group_size is -1 in config.json"),
    "no groups": ("gptq", {"group_size": 0}, None, "group_size is 0; expected -1 or a positive integer"),
    "groups awq": ("awq", {"group_size": 128}, None, "group_size is 128 in config.json"),
    "groups awq by their other name": ("awq", {"q_group_size": 16}, None, "group_size is 16 in config.json"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_a_config_asks_for(tmp_path, case):
    """What is not known, or not so in the tensors, is refused, and nothing is left."""
    kind, asked, change, message = SPOILED[case]
    src, _ = source(tmp_path / "src", kind, change=change)
    found = config(src)
    found["quantization_config"] |= asked
    (src / "config.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("compressed", {"transform_config": {"config_groups": {}}}),
        ("compressed", {"transform_config": None}),
        ("gptq v2", {"checkpoint_format": None, "format": "gptq_v2"}),
        ("gptq v2", {"format": "gptq_v2", "adapter": None, "lora": {}}),
        ("gptq", {"group_size": 128, "sym": True, "dynamic": {"+:proj": {"group_size": 32, "sym": False}}}),
        ("gptq sym", {"group_size": None}),
    ],
)
def test_what_a_config_may_say(tmp_path, kind, asked):
    src, dense = source(tmp_path / "src", kind)
    found = config(src)
    found["quantization_config"] |= asked
    (src / "config.json").write_text(json.dumps(found), encoding="utf-8")
    repack(src, tmp_path / "dst")
    made = dict(read_weights(tmp_path / "dst"))
    for name, wanted in dense.items():
        assert np.array_equal(made[name].dequantize().numpy(), wanted.astype(np.float32))


def test_pickled_weights(tmp_path):
    src, _ = source(tmp_path / "src")
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model.bin\)"):
        repack(src, tmp_path / "dst")


# -- places ----------------------------------------------------------------------------------------------------------------


def test_places_that_are_refused(tmp_path):
    src, _ = source(tmp_path / "src")
    for dst in (src, src / "inside", tmp_path, src / ".." / "src"):
        with pytest.raises(ArgumentError, match="neither may be or hold the other"):
            repack(src, dst)
    (tmp_path / "link").symlink_to(src)
    with pytest.raises(ArgumentError, match="neither may be or hold the other"):
        repack(src, tmp_path / "link")
    with pytest.raises(ArgumentError, match="which is no directory"):
        repack(tmp_path / "nothing", tmp_path / "dst")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep", encoding="utf-8")
    with pytest.raises(CheckpointError, match="which holds mine and no unfinished repack"):
        repack(src, full)
    assert folders.tree(full) == {"mine": b"keep"}
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="file"):
        repack(src, tmp_path / "file")
    with pytest.raises(CheckpointError, match="file"):
        repack(src, tmp_path / "file" / "below")


def test_a_finished_folder_is_not_touched(tmp_path):
    src, _ = source(tmp_path / "src")
    repack(src, tmp_path / "dst")
    before = folders.tree(tmp_path / "dst")
    with pytest.raises(CheckpointError, match=r"which holds config.json and no unfinished repack"):
        repack(src, tmp_path / "dst")
    assert folders.tree(tmp_path / "dst") == before


def test_an_empty_folder_is_taken(tmp_path):
    src, _ = source(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    repack(src, tmp_path / "dst")
    assert read_layers(tmp_path / "dst")


def test_another_process_at_work(tmp_path):
    import fcntl

    src, _ = source(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    held = os.open(tmp_path / "dst", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match="another process is writing to"):
            repack(src, tmp_path / "dst")
    finally:
        os.close(held)
    repack(src, tmp_path / "dst")


def test_too_little_room(tmp_path, monkeypatch):
    src, _ = source(tmp_path / "src")
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert, "disk_usage", lambda _: free)
    with pytest.raises(CheckpointError, match=r"MB are to be written to .*dst, and its disk has 0 MB free"):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses(tmp_path, monkeypatch, code):
    """While the second file is written: the first stays, the second is removed, and a second run goes on."""
    src, _ = source(tmp_path / "src", shards=2)
    synced = []

    def refuse(descriptor):
        synced.append(descriptor)
        if len(synced) == 4:  # journal, a file, journal
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing, "sync", refuse)
    message = "is full: make room, and run it again" if code == errno.ENOSPC else os.strerror(code)
    with pytest.raises(CheckpointError, match=message):
        repack(src, tmp_path / "dst")
    assert set(folders.tree(tmp_path / "dst")) == {".repack.json", "model-00001-of-00002.safetensors"}
    monkeypatch.undo()
    repack(src, tmp_path / "dst")
    repack(src, tmp_path / "fresh")
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "fresh")


# -- continued -------------------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, count):
    """Ctrl-C at the renaming of the `count`-th file."""
    renamed = []

    def sync_directory(folder):
        renamed.append(folder)
        if len(renamed) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(writing, "sync_directory", sync_directory)


@pytest.mark.parametrize("count", range(1, 11))
def test_an_interrupt_is_continued(tmp_path, monkeypatch, count):
    """Renamed are: the journal, a file and the journal three times over, the others, the index, the config."""
    src, _ = source(tmp_path / "src", shards=3)
    interrupt_at(monkeypatch, count)
    with pytest.raises(KeyboardInterrupt):
        repack(src, tmp_path / "dst")
    monkeypatch.undo()
    left = folders.tree(tmp_path / "dst") if (tmp_path / "dst").exists() else {}
    assert "config.json" not in left
    assert not [name for name in left if name.endswith(".partial")]
    summary = repack(src, tmp_path / "dst")
    if count >= 5:
        assert summary.converted_bytes < summary.bytes_in
    assert summary.layers == 10
    repack(src, tmp_path / "fresh")
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "fresh")


def unfinished(tmp_path, monkeypatch, **more):
    src, _ = source(tmp_path / "src", shards=3)
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        repack(src, tmp_path / "dst", **more)
    monkeypatch.undo()
    return src


def test_another_run_is_not_continued(tmp_path, monkeypatch):
    src = unfinished(tmp_path, monkeypatch)
    before = folders.tree(tmp_path / "dst")
    with pytest.raises(CheckpointError, match="holds an unfinished repack that differs in its options"):
        repack(src, tmp_path / "dst", verify=False)
    other, _ = source(tmp_path / "other", "gptq v2", shards=3)
    with pytest.raises(CheckpointError, match=r"holds an unfinished repack that differs in its config.json"):
        repack(other, tmp_path / "dst")
    assert folders.tree(tmp_path / "dst") == before
    repack(src, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"which holds .repack.json and no unfinished unpack"):
        unpack(tmp_path / "ours", tmp_path / "dst")


def test_a_finished_file_that_was_damaged_is_made_again(tmp_path, monkeypatch):
    src = unfinished(tmp_path, monkeypatch)
    path = tmp_path / "dst" / "model-00001-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    summary = repack(src, tmp_path / "dst")
    assert summary.converted_bytes > 0
    repack(src, tmp_path / "fresh")
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "fresh")


@pytest.mark.parametrize("done", [{"model-00001-of-00003.safetensors": {}}, {"model-00001-of-00003.safetensors": [1]}])
def test_a_journal_that_is_damaged(tmp_path, monkeypatch, done):
    src = unfinished(tmp_path, monkeypatch)
    path = tmp_path / "dst" / ".repack.json"
    journal = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**journal, "done": done}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{path} is damaged: remove .*dst to begin anew"):
        repack(src, tmp_path / "dst")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{path} cannot be read"):
        repack(src, tmp_path / "dst")


def test_what_a_killed_run_was_writing_is_removed(tmp_path, monkeypatch):
    src, _ = source(tmp_path / "src")
    (src / "extra").mkdir()
    (src / "extra" / "text.txt").write_text("text", encoding="utf-8")
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        repack(src, tmp_path / "dst")
    monkeypatch.undo()
    (tmp_path / "dst" / "extra").mkdir()
    for name in (".model.safetensors.partial", "extra/.text.txt.partial"):
        (tmp_path / "dst" / name).write_text("half", encoding="utf-8")
    repack(src, tmp_path / "dst")
    repack(src, tmp_path / "fresh")
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "fresh")


def test_a_source_that_changes_meanwhile(tmp_path, monkeypatch):
    src, _ = source(tmp_path / "src", shards=2)
    written = []

    def sync_directory(folder):
        written.append(folder)
        if len(written) == 4:
            path = src / "model-00001-of-00002.safetensors"
            os.utime(path, ns=(1, 1))

    monkeypatch.setattr(writing, "sync_directory", sync_directory)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors has changed meanwhile"):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst" / "config.json").exists()


# -- verified --------------------------------------------------------------------------------------------------------------


PARTS = ("qweight", "scales", "zeros", "bias")


@pytest.mark.parametrize(
    ("kind", "part"),
    [*((kind, part) for kind in ("gptq", "awq", "compressed asym", "gptq 3") for part in PARTS), ("gptq 3", "perm")],
)
def test_a_wrong_value_is_noticed(tmp_path, monkeypatch, kind, part):
    """One bit of one tensor of one layer is flipped on its way to the disk."""
    src, _ = source(tmp_path / "src", kind, **({"bias": True} if kind != "awq" else {}), shards=2)
    add = writing.ShardWriter.add

    def flipped(self, name, tensor, info=None):
        if name == f"{Q}.{part}":
            tensor = tensor.clone()
            if part == "perm":
                first = tensor[0].clone()
                tensor[0], tensor[1] = tensor[1], first
            else:
                writing.as_bytes(tensor)[5] ^= 1
        add(self, name, tensor, info)

    monkeypatch.setattr(writing.ShardWriter, "add", flipped)
    with pytest.raises(CheckpointError, match=rf"{Q}"):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst" / "config.json").exists()
    assert not (tmp_path / "dst" / "model-00001-of-00002.safetensors").exists()
    summary = repack(src, tmp_path / "unverified", verify=False)
    assert not summary.verified


def test_a_wrong_copy_is_noticed(tmp_path, monkeypatch):
    src, _ = source(tmp_path / "src")
    add = writing.ShardWriter.add

    def flipped(self, name, tensor, info=None):
        add(self, name, tensor + 1 if name == "model.norm.weight" else tensor, info)

    monkeypatch.setattr(writing.ShardWriter, "add", flipped)
    with pytest.raises(CheckpointError, match=r"model.norm.weight in .* is not what model.norm.weight in .* is"):
        repack(src, tmp_path / "dst")


# -- dense models ----------------------------------------------------------------------------------------------------------

ROUNDED = [name for name, fmt in FORMATS.items() if not fmt.is_native]


@pytest.mark.parametrize("W_dtype", ROUNDED)
def test_a_dense_model_is_rounded(tmp_path, W_dtype):
    tensors, dense = folders.model(folders.dense_layer, blocks=1, bias=True)
    src = folders.write(tmp_path / "src", tensors, shards=2)
    summary = repack(src, tmp_path / "dst", W_dtype=W_dtype, group_size=32)
    assert summary.formats == {W_dtype: len(dense)}
    found = dict(read_weights(tmp_path / "dst"))
    assert set(found) == set(dense)
    for name, wanted in dense.items():
        scales = found[name].scales.double().numpy().repeat(32, axis=1)
        error = np.abs(found[name].dequantize().double().numpy() - wanted) / scales
        fmt = FORMATS[W_dtype]
        if fmt.is_integer and W_dtype != "int1":
            assert error.max() <= 0.5 + 1e-5
        elif fmt.codebook:
            nearest = np.abs(wanted[..., None] / scales[..., None] - np.array(fmt.codebook)).min(axis=-1)
            assert np.abs(error - nearest).max() < 1e-4
        assert error.mean() > 1e-5
        assert torch.equal(found[name].bias, tensors[f"{name}.bias"])
    unpack(tmp_path / "dst", tmp_path / "back", dtype="float32")
    back = open_shards(tmp_path / "back")
    for name, weight in found.items():
        assert torch.equal(back.get(f"{name}.weight"), weight.dequantize())


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"W_dtype": "uint4", "symmetric": True, "group_size": 64}, {LayerSpec("uint4", 64, "quantized")}),
        ({"W_dtype": "int4", "symmetric": False, "group_size": 32}, {LayerSpec("int4", 32, "original")}),
        ({"W_dtype": "int4", "group_size": -1}, {LayerSpec("int4", -1)}),
    ],
)
def test_options_of_rounding(tmp_path, options, layers):
    tensors, _ = folders.model(folders.dense_layer, blocks=1, dtype=torch.bfloat16)
    repack(folders.write(tmp_path / "src", tensors), tmp_path / "dst", **options)
    found = set(read_layers(tmp_path / "dst").values())
    if options["group_size"] == 64:  # which is all of K for most of the layers
        found = {LayerSpec(spec.W_dtype, 64, spec.zeros_mode) for spec in found}
    assert found == layers


def test_what_stays_dense(tmp_path):
    tensors, dense = folders.model(folders.dense_layer)
    others = [
        "transformer.wte",
        "model.layers.0.mlp.gate",
        "encoder.embed_positions",
        "q_norm",
        "lm_head",
        "moe.router",
    ]
    for name in others:
        tensors[f"{name}.weight"] = torch.ones(64, 64)
    tensors |= {
        "conv.weight": torch.ones(4, 4, 3),
        "experts.up": torch.ones(2, 64, 64),
        "ids.weight": torch.ones(64, 64).int(),
    }
    src = folders.write(tmp_path / "src", tensors)
    repack(src, tmp_path / "dst", W_dtype="nf4", group_size=64, exclude=["*.q_proj", "model.layers.1.*"])
    assert set(read_layers(tmp_path / "dst")) == {n for n in dense if "layers.1" not in n and "q_proj" not in n}
    kept = config(tmp_path / "dst")["quantization_config"]["modules_to_not_convert"]
    assert kept == sorted({"lm_head", *(n for n in dense if "layers.1" in n or "q_proj" in n)})


def test_dense_models_that_are_refused(tmp_path):
    tensors, _ = folders.model(folders.dense_layer)
    src = folders.write(tmp_path / "src", tensors)
    with pytest.raises(CheckpointError, match=r"_proj.weight in .* has 64 columns, which groups of 128 do not divide"):
        repack(src, tmp_path / "dst", W_dtype="uint4")
    with pytest.raises(ArgumentError, match=r"group_size is 0"):
        repack(src, tmp_path / "dst", W_dtype="uint4", group_size=0)
    with pytest.raises(ArgumentError, match="nf4 has to be symmetric"):
        repack(src, tmp_path / "dst", W_dtype="nf4", group_size=32, symmetric=False)
    with pytest.raises(CheckpointError, match="has no weight that would be rounded"):
        repack(src, tmp_path / "dst", W_dtype="uint4", group_size=32, exclude=["*"])
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("inf")
    folders.write(src, tensors)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.down_proj.weight in .*model.safetensors holds inf"):
        repack(src, tmp_path / "dst", W_dtype="uint4", group_size=32)
    folders.write(src, tensors, config={"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="model_type is 'gpt2', whose layers hold transposed weights"):
        repack(src, tmp_path / "dst", W_dtype="uint4", group_size=32)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("W_dtype", ["uint4", "int4", "int1", "nf4", "float8_e4m3", "int8"])
@pytest.mark.parametrize("part", ["qweight", "scales"])
def test_a_value_that_is_rounded_wrongly_is_noticed(tmp_path, monkeypatch, W_dtype, part):
    tensors, _ = folders.model(folders.dense_layer, blocks=1)
    src = folders.write(tmp_path / "src", tensors)
    add = writing.ShardWriter.add

    def changed(self, name, tensor, info=None):
        if name == f"{Q}.{part}":
            tensor = tensor.clone()
            if part == "scales" and W_dtype == "int1":
                tensor[0, 0] = float("nan")
            elif part == "scales":
                tensor[0, 0] *= 2
            else:
                writing.as_bytes(tensor)[5] ^= 255 if W_dtype == "float8_e4m3" else 16
        add(self, name, tensor, info)

    monkeypatch.setattr(writing.ShardWriter, "add", changed)
    with pytest.raises(CheckpointError, match=rf"{Q}: what was written differs from the source"):
        repack(src, tmp_path / "dst", W_dtype=W_dtype, group_size=32)
    assert not (tmp_path / "dst").exists()


# -- unpack ----------------------------------------------------------------------------------------------------------------


def test_unpack_refuses(tmp_path):
    src, _ = source(tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"config.json: quant_method is 'gptq'; expected 'bitblas'"):
        unpack(src, tmp_path / "back")
    repack(src, tmp_path / "ours")
    with pytest.raises(ArgumentError, match="dtype is 'int8'; allowed: float16, bfloat16, float32"):
        unpack(tmp_path / "ours", tmp_path / "back", dtype="int8")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != f"{Q}.scales"},
        tmp_path / "ours" / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=f"has no tensor {Q}.scales"):
        unpack(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("dtype", "part"), [("bfloat16", "scales"), ("float32", "scales"), ("float32", "bias")])
@pytest.mark.parametrize("verify", [True, False])
def test_values_that_a_dtype_cannot_hold(tmp_path, dtype, part, verify):
    packer = functools.partial(folders.dense_layer, dtype=getattr(torch, dtype))
    tensors, _ = folders.model(packer, bias=True)
    tensors[f"{Q}.{'weight' if part == 'scales' else 'bias'}"] *= 1e6
    src = folders.write(tmp_path / "src", tensors)
    repack(src, tmp_path / "ours", W_dtype="uint4", group_size=32)
    with pytest.raises(CheckpointError, match=rf"{Q}.{part} in .* float16 cannot hold: .*--dtype bfloat16"):
        unpack(tmp_path / "ours", tmp_path / "back", verify=verify)
    assert not (tmp_path / "back").exists()
    unpack(tmp_path / "ours", tmp_path / "back", dtype="bfloat16", verify=verify)
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_the_spec_is_what_json_says(tmp_path):
    src, _ = source(tmp_path / "src", "gptq act-order")
    repack(src, tmp_path / "dst")
    entry = config(tmp_path / "dst")["quantization_config"]["layers"][Q]
    assert entry == {"W_dtype": "uint4", "group_size": 32, "zeros_mode": "quantized", "act_order": True}
    assert read_layers(tmp_path / "dst")[Q] == LayerSpec("uint4", 32, "quantized", True)
