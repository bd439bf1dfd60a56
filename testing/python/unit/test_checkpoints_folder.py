"""Our folder format, read: the config, the tensors of a layer, and what is wrong with a folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bitblas import CheckpointError
from bitblas.checkpoints import LayerSpec, make_config, open_shards, parse_config, read_layers, read_weights, unpack
from bitblas.codecs import QuantizedWeight, format_tensor

SPECS = {
    "a": LayerSpec("uint4", 32, "quantized"),
    "b": LayerSpec("int3", -1, None, act_order=True),
    "c": LayerSpec("nf4", -1, in_features=5),
}
ENTRY = SPECS["a"].to_json()


def weight(name):
    """A weight of each of SPECS."""
    torch.manual_seed(0)
    if name == "a":
        zeros = torch.randint(-128, 128, (2, 8), dtype=torch.int8)
        return QuantizedWeight(
            "uint4", bytes_of(16, 32), 64, torch.rand(16, 2).half(), zeros, "quantized", bias=torch.rand(16)
        )
    if name == "b":
        return QuantizedWeight("int3", bytes_of(16, 24), 64, torch.rand(16, 1), perm=torch.randperm(64).int())
    return QuantizedWeight("nf4", bytes_of(2, 3) & 15, 5, torch.rand(2, 1))


def bytes_of(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def tensors(name):
    """The tensors of a layer as they lie in a file."""
    made = weight(name)
    mode = None if made.zeros is None else made.zeros_mode
    parts = {"qweight": made.packed, "scales": made.scales, "zeros": made.zeros, "perm": made.perm, "bias": made.bias}
    parts["format"] = format_tensor(made.W_dtype, made.group_size, mode)
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def write(folder, changed=None, config=None):
    """A folder of all three; `changed` tensors replaced, or left out where None."""
    found = {key: value for name in SPECS for key, value in tensors(name).items()} | (changed or {})
    save_file({key: value for key, value in found.items() if value is not None}, folder / "model.safetensors")
    text = json.dumps({"quantization_config": make_config(SPECS) if config is None else config})
    (folder / "config.json").write_text(text, encoding="utf-8")


def test_a_config_is_read_as_it_was_written():
    config = json.loads(json.dumps(make_config(SPECS, dense=["lm_head", "a_head"])))
    assert config["modules_to_not_convert"] == ["a_head", "lm_head"]
    assert parse_config(config) == SPECS
    assert ENTRY == {"W_dtype": "uint4", "group_size": 32, "zeros_mode": "quantized", "act_order": False}


@pytest.mark.parametrize("name", SPECS)
def test_the_spec_of_a_weight(name):
    assert LayerSpec.of(weight(name)) == SPECS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; expected 'bitblas'"),
        ({"format_version": 2}, "format_version is 2; this bitblas knows versions up to 1"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": True}, "format_version is True"),
        ({"layers": []}, r"layers is \[\]"),
        ({"layers": {"x": 3}}, "layer x is 3"),
        ({"layers": {"x": {}}}, "layer x has no 'W_dtype'"),
        ({"layers": {"x": {**ENTRY, "more": 1}}}, "layer x has 'more'"),
        ({"layers": {"x": {**ENTRY, "W_dtype": "uint9"}}}, "layer x: W_dtype is 'uint9'"),
        ({"layers": {"x": {**ENTRY, "W_dtype": "float16"}}}, "layer x: W_dtype is 'float16', which is not quantized"),
        ({"layers": {"x": {**ENTRY, "group_size": 0}}}, "layer x: group_size is 0"),
        ({"layers": {"x": {**ENTRY, "zeros_mode": "some"}}}, "layer x: zeros_mode is 'some'"),
        ({"layers": {"x": {**ENTRY, "act_order": 1}}}, "layer x: act_order is 1"),
        ({"layers": {"x": {**ENTRY, "in_features": -1}}}, "layer x: in_features is -1"),
    ],
)
def test_a_config_that_is_not_ours(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config({**make_config(SPECS), **change})


def test_a_folder_is_read(tmp_path):
    write(tmp_path)
    assert read_layers(tmp_path) == SPECS
    found = dict(read_weights(tmp_path))
    assert list(found) == list(SPECS)
    for name, ours in found.items():
        wanted = weight(name)
        assert ours.in_features == wanted.in_features
        assert ours.group_size == wanted.group_size
        assert torch.equal(ours.dequantize(), wanted.dequantize())
        assert (ours.bias is None) == (wanted.bias is None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a.scales": None}, "has no tensor a.scales"),
        ({"a.zeros": None}, "has no tensor a.zeros"),
        ({"b.perm": None}, "has no tensor b.perm"),
        ({"a.format": None}, "has no tensor a.format"),
        (
            {"a.qweight": bytes_of(16, 31)},
            r"a.qweight in .*model.safetensors: packed is torch.int8 \(16, 31\); expected",
        ),
        ({"a.qweight": bytes_of(16)}, "a.qweight in .*model.safetensors: "),
        ({"a.scales": torch.rand(16)}, "a.qweight in .*model.safetensors: "),
        ({"b.perm": torch.zeros(64, dtype=torch.int32)}, "perm is no permutation"),
        (
            {"a.format": format_tensor("uint4", 32)},
            "format tensor says that zeros_mode is None, and config.json 'quantized'",
        ),
        ({"a.format": format_tensor("uint4", 64, "quantized")}, "says that group_size is 64, and config.json 32"),
        ({"a.format": format_tensor("int4", 32, "quantized")}, "says that W_dtype is 'int4', and config.json 'uint4'"),
        ({"a.format": torch.zeros(128, dtype=torch.uint8)}, "a.qweight in .*model.safetensors: "),
    ],
)
def test_tensors_that_are_wrong(tmp_path, changed, message):
    write(tmp_path, changed)
    with pytest.raises(CheckpointError, match=message):
        list(read_weights(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d.qweight": bytes_of(16, 31)}, r"d.qweight in .*model.safetensors is .* config.json has no layer d$"),
        ({"x.d.format": bytes_of(16)}, r"x.d.format in .*model.safetensors is .* config.json has no layer x.d$"),
        ({"c.qweight": None}, "has no tensor c.qweight, which config.json says is there"),
        ({"b.zeros": bytes_of(1, 8)}, r"b.zeros in .*model.safetensors is there, and config.json says .* has none"),
        ({"a.perm": torch.arange(64).int()}, r"a.perm in .*model.safetensors is there, and config.json says"),
    ],
)
def test_tensors_and_entries_that_do_not_go_together(tmp_path, changed, message):
    src = tmp_path / "src"
    src.mkdir()
    write(src, changed)
    for read in (read_layers, lambda folder: list(read_weights(folder)), lambda folder: unpack(folder, tmp_path / "u")):
        with pytest.raises(CheckpointError, match=message):
            read(src)


def test_an_entry_that_is_missing(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    write(src, config=make_config({name: spec for name, spec in SPECS.items() if name != "b"}))
    with pytest.raises(CheckpointError, match=r"b.(qweight|format) in .*model.safetensors .* has no layer b$"):
        unpack(src, tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_one_group_by_either_name(tmp_path):
    write(tmp_path, {"c.format": format_tensor("nf4", 5)})
    assert dict(read_weights(tmp_path))["c"].group_size == -1


def test_folders_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        read_layers(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.json has no quantization_config"):
        read_layers(tmp_path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.json holds no object"):
        read_layers(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights: no model.safetensors"):
        open_shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        open_shards(tmp_path)


def index(folder, weight_map):
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "one.safetensors", "y": "two.safetensors"}, "y is in two.safetensors, and there is no such file"),
        ({"x": "one.safetensors", "y": "one.safetensors"}, "y is in one.safetensors, which has no such tensor"),
        ({"x": "../one.safetensors"}, r"names '../one.safetensors'; expected the name of a .safetensors file"),
        ({"x": "one.bin"}, "names 'one.bin'"),
        ({"x": 3}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, weight_map, message):
    save_file({"x": torch.zeros(3)}, tmp_path / "one.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_shards(tmp_path)


def test_a_file_that_is_damaged(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(300), "y": torch.zeros(300)}, path)
    whole = path.read_bytes()
    for kept, message in (
        (-4, "truncated.*y ends at"),
        (1300, "truncated.*x ends at"),
        (50, "truncated"),
        (3, "truncated"),
    ):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=f"{path} is {message}"):
            open_shards(tmp_path)
    path.write_bytes(whole[:8] + b"?" + whole[9:])
    with pytest.raises(CheckpointError, match=f"{path} is damaged.*header"):
        open_shards(tmp_path)
    path.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match=f"{path} cannot be read"):
        open_shards(tmp_path)


def header(folder, text):
    """A file with a header of somebody's own, and 16 bytes of data."""
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(16))
    return path


@pytest.mark.parametrize(
    "changed",
    [
        {"data_offsets": ["a", "b"]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0, True]},
        {"data_offsets": [0, 8, 16]},
        {"data_offsets": [0, 10**40]},
        {"data_offsets": 8},
        {"shape": "ab"},
        {"shape": [-2, -2]},
        {"dtype": 16},
        {"dtype": "Q5"},
    ],
    ids=str,
)
def test_a_header_that_is_damaged(tmp_path, changed):
    entry = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8], **changed}
    path = header(tmp_path, json.dumps({"x": entry}))
    with pytest.raises(CheckpointError, match=f"^{path} "):
        open_shards(tmp_path)


def test_json_that_is_nested_too_deeply(tmp_path):
    deep = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"
    path = header(tmp_path, deep)
    with pytest.raises(CheckpointError, match=f"{path} is damaged.*header"):
        open_shards(tmp_path)
    (tmp_path / "config.json").write_text(deep, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        read_layers(tmp_path)


def test_a_tensor_that_is_there_twice(tmp_path):
    for file in ("one.safetensors", "two.safetensors"):
        save_file({"x": torch.zeros(3), file: torch.zeros(1)}, tmp_path / file)
    index(tmp_path, {"x": "one.safetensors", "two.safetensors": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"x is in one.safetensors and in two.safetensors"):
        open_shards(tmp_path)
