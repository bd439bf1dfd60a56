"""Folders of BitNet models repacked: values, what config.json says, what is refused, and that a wrong value is noticed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint_folders as folders
import tiny_bitnet
from bitblas import ArgumentError, CheckpointError, cli
from bitblas.checkpoints import bitnet, read_layers, read_weights, repack, unpack, verify, writing
from bitblas.checkpoints.spec import LayerSpec, parse_config
from bitblas.codecs.bitnet import from_bitnet, ternary
from foreign import row_bytes
from tiny_bitnet import KINDS

#: What each entry of a layer says, but for norms.
ENTRY = {
    "W_dtype": "int2",
    "group_size": -1,
    "zeros_mode": None,
    "act_order": False,
    "dynamic_quantization": "row",
    "activation_eps": 1e-5,
}
DOWN = "model.layers.0.mlp.down_proj"
#: (kind, options) of folders.
CASES = [
    *((kind, {}) for kind in KINDS),
    ("bitlinear", {"bias": True, "tied": True}),
    ("offline", {"bias": True, "norms": True}),
    ("online", {"bias": True, "norms": True, "tied": True}),
    ("1bitLLM", {"bias": True, "tied": True}),
]


def config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change_config(folder, change):
    said = config(folder)
    change(said)
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")


def source(path, kind, change=None, **options):
    """A folder, whose tensors get a change first."""
    folder = tiny_bitnet.make(kind, **options)
    if change is not None:
        change(folder.tensors)
    return folder.write(path)


# -- values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_values_are_those_of_the_source(tmp_path, kind, options):
    drawn = tiny_bitnet.make(kind, **options)
    src = drawn.write(tmp_path / "src")
    summary = repack(src, tmp_path / "dst")
    assert (summary.layers, summary.formats, summary.verified) == (14, {"int2": 14}, True)
    found = dict(read_weights(tmp_path / "dst"))
    assert set(found) == set(drawn.layers)
    for name, wanted in drawn.layers.items():
        ours = found[name]
        assert torch.equal(ours.packed, row_bytes(wanted.values.long().numpy() + 2, 2)), name
        assert ours.scales.dtype is (torch.bfloat16 if kind == "offline" else torch.float32)
        assert torch.equal(ours.scales.float(), torch.full((ours.out_features, 1), wanted.scale)), name
        assert (ours.bias is None) == (wanted.bias is None)
        if wanted.bias is not None:
            assert torch.equal(ours.bias.double(), wanted.bias.float().double()), name
    spec = {**ENTRY, **({"rms_norm_eps": 1e-6} if options.get("norms") else {})}
    said = config(tmp_path / "dst")["quantization_config"]
    assert said["layers"] == {name: spec for name in drawn.layers}  # noqa: C420 - one for each
    assert said["modules_to_not_convert"] == ([] if options.get("tied") else ["lm_head"])


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_other_tensors_are_copied(tmp_path, kind, options):
    drawn = tiny_bitnet.make(kind, **options)
    repack(drawn.write(tmp_path / "src"), tmp_path / "dst")
    found = load_file(tmp_path / "dst" / "model.safetensors")
    parts = ("qweight", "scales", "bias", "format")
    others = {name: t for name, t in found.items() if name.rpartition(".")[2] not in parts}
    wanted = dict(drawn.others)
    if options.get("norms"):
        wanted |= {f"{name}.rms_norm.weight": layer.norm for name, layer in drawn.layers.items()}
    assert set(others) == set(wanted)
    assert all(torch.equal(others[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "1bitLLM"])
def test_what_else_a_config_says_is_kept(tmp_path, kind):
    src = source(tmp_path / "src", kind)
    repack(src, tmp_path / "dst")
    before, after = config(src), config(tmp_path / "dst")
    assert after.pop("quantization_config")["quant_method"] == "bitblas"
    before.pop("quantization_config")
    assert after == before


def test_a_model_of_1bitllm_becomes_one_of_transformers(tmp_path):
    src = source(tmp_path / "src", "1bitLLM", tied=True)
    repack(src, tmp_path / "dst")
    before, after = config(src), config(tmp_path / "dst")
    assert after.pop("architectures") == ["BitNetForCausalLM"]
    assert after.pop("model_type") == "bitnet"
    after.pop("quantization_config")
    gone = {"architectures", "model_type", "input_bits", "weight_bits", "pretraining_tp", "rope_scaling"}
    assert after == {key: value for key, value in before.items() if key not in gone}


def test_what_its_config_leaves_out_is_written(tmp_path):
    """A Llama's defaults are not those of transformers' BitNet."""
    src = source(tmp_path / "src", "1bitLLM")
    for key in ("hidden_act", "rope_theta", "rms_norm_eps", "bos_token_id", "eos_token_id"):
        change_config(src, lambda said, key=key: said.pop(key))
    repack(src, tmp_path / "dst")
    after = config(tmp_path / "dst")
    assert (after["hidden_act"], after["rope_theta"], after["rms_norm_eps"]) == ("silu", 10000.0, 1e-6)
    assert (after["bos_token_id"], after["eos_token_id"]) == (1, 2)


def test_ternary_values_that_are_not_packed(tmp_path):
    """What transformers saves of a model that it loaded: its values as floats, beside the scale."""
    drawn = tiny_bitnet.make("offline")
    for name, layer in drawn.layers.items():
        drawn.tensors[f"{name}.weight"] = layer.values.to(torch.bfloat16)
    repack(drawn.write(tmp_path / "src"), tmp_path / "dst")
    for name, weight in read_weights(tmp_path / "dst"):
        assert torch.equal(weight.dequantize(torch.float64), drawn.layers[name].dense())


@pytest.mark.parametrize("n", [9, 10, 12])
@pytest.mark.parametrize("kind", ["bitlinear", "offline"])
def test_rows_that_do_not_fill_bytes(tmp_path, kind, n):
    """As transformers packs them, though it cannot load them; the bias tells how many there are."""
    layer = tiny_bitnet.draw(kind, n, 7, torch.Generator().manual_seed(0), bias=True)
    tensors = {f"a.b.{part}": tensor for part, tensor in layer.tensors.items()}
    src = folders.write(tmp_path / "src", tensors, {"quant_method": "bitnet", **KINDS[kind]})
    repack(src, tmp_path / "dst")
    ((name, weight),) = read_weights(tmp_path / "dst")
    assert name == "a.b"
    assert torch.equal(weight.packed, row_bytes(layer.values.numpy() + 2, 2))
    assert torch.equal(weight.bias.double(), layer.bias.float().double())
    assert read_layers(tmp_path / "dst")["a.b"].in_features == 7


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_mode_is_of_no_account_to_packed_layers(tmp_path, mode):
    """`linear_class` alone tells what "bitlinear" does, and is its default."""
    src = source(tmp_path / "src", "bitlinear")
    repack(src, tmp_path / "whole")
    change_config(
        src, lambda said: said.update(quantization_config={"quant_method": "bitnet", "quantization_mode": mode})
    )
    repack(src, tmp_path / "dst")
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "whole")


def test_layers_that_stay_dense(tmp_path):
    for kind in ("online", "offline"):
        drawn = tiny_bitnet.make(kind)
        dense = [name for name in drawn.layers if name.endswith("k_proj") or ".1." in name]
        for name in dense if kind == "offline" else ():
            drawn.tensors[f"{name}.weight"] = drawn.layers[name].dense().bfloat16()
            del drawn.tensors[f"{name}.weight_scale"]
        src = drawn.write(tmp_path / kind)
        left_out = ["lm_head", "k_proj", r"model.layers.1"]
        change_config(
            src, lambda said, names=left_out: said["quantization_config"].update(modules_to_not_convert=names)
        )
        repack(src, tmp_path / f"{kind} dst")
        assert set(read_layers(tmp_path / f"{kind} dst")) == {name for name in drawn.layers if name not in dense}
        assert config(tmp_path / f"{kind} dst")["quantization_config"]["modules_to_not_convert"] == sorted(
            [*dense, "lm_head"]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked(tmp_path, kind):
    drawn = tiny_bitnet.make(kind, bias=True)
    repack(drawn.write(tmp_path / "src"), tmp_path / "ours")
    unpack(tmp_path / "ours", tmp_path / "dense", dtype="float32")
    found = load_file(tmp_path / "dense" / "model.safetensors")
    for name, layer in drawn.layers.items():
        assert torch.equal(found[f"{name}.weight"], (layer.values * np.float32(layer.scale)).float())
    assert set(found) == {f"{name}.weight" for name in drawn.layers} | set(drawn.others) | {
        f"{name}.bias" for name, layer in drawn.layers.items() if layer.bias is not None
    }
    said = config(tmp_path / "dense")
    assert (said["model_type"], said["torch_dtype"]) == ("bitnet", "float32")
    assert "quantization_config" not in said


def test_norms_have_no_place_in_a_dense_model(tmp_path):
    repack(source(tmp_path / "src", "offline", norms=True), tmp_path / "ours")
    with pytest.raises(
        CheckpointError, match=r"down_proj has an RMSNorm in front of it, for which a dense model has no place"
    ):
        unpack(tmp_path / "ours", tmp_path / "dense")


@pytest.mark.parametrize(("kind", "count"), [("offline", 25), ("1bitLLM", 40)])
def test_an_interrupt_is_continued(tmp_path, monkeypatch, kind, count):
    """In files of their own: the result has the bytes of one run."""
    drawn = tiny_bitnet.make(kind)
    said = drawn.config.pop("quantization_config", None)
    src = folders.write(tmp_path / "src", drawn.tensors, said, shards=3, config=drawn.config)
    repack(src, tmp_path / "whole")
    append, left = writing.ShardWriter._append, [count]

    def interrupted(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return append(*arguments)

    monkeypatch.setattr(writing.ShardWriter, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst" / "config.json").exists()
    assert (tmp_path / "dst" / ".repack.json").exists()
    summary = repack(src, tmp_path / "dst")
    assert summary.layers == 14
    assert 0 < summary.converted_bytes < summary.bytes_in
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "whole")


def test_the_command(tmp_path, capsys):
    src = source(tmp_path / "src", "1bitLLM")
    assert cli.main(["repack", str(src), str(tmp_path / "dst")]) == 0
    assert "14 layers (14 int2)" in capsys.readouterr().out
    for option in (["--format", "uint4"], ["--exclude", "*.k_proj"]):
        assert cli.main(["repack", str(src), str(tmp_path / "other"), *option]) == 2
        assert "which is quantized already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["repack", "--help"])
    assert "BitNet-b1.58" in capsys.readouterr().out


# -- damage ----------------------------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def three(tensors):
    tensors[f"{DOWN}.weight"][3, 5] = 0b01110001


def poison(tensors):
    tensors[f"{DOWN}.weight"][3, 5] = float("nan")


NORM = "model.layers.0.mlp.ffn_layernorm.weight"
DAMAGE = {
    "code 3": (
        "offline",
        three,
        rf"{DOWN}.weight in .*model.safetensors holds the code 3, a value of 2, in its byte \(3, 5\)",
    ),
    "scale missing": (
        "offline",
        drop(f"{DOWN}.weight_scale"),
        rf"has no tensor {DOWN}.weight_scale, which belongs to {DOWN}.weight in .*model.safetensors",
    ),
    "scale missing, values": (
        "offline",
        lambda tensors: (drop(f"{DOWN}.weight_scale")(tensors), put(f"{DOWN}.weight", torch.ones(64, 160))(tensors)),
        rf"has no tensor {DOWN}.weight_scale",
    ),
    "weight missing": (
        "bitlinear",
        drop(f"{DOWN}.weight"),
        rf"{DOWN}.weight_scale in .* is there without {DOWN}.weight",
    ),
    "scale of 0": (
        "bitlinear",
        put(f"{DOWN}.weight_scale", torch.zeros(1)),
        rf"{DOWN}.weight_scale in .* holds 0; expected a number to divide by",
    ),
    "scales of rows": (
        "offline",
        put(f"{DOWN}.weight_scale", torch.ones(64)),
        rf"{DOWN}.weight_scale in .* is .*\(64,\)",
    ),
    "not packed": (
        "bitlinear",
        put(f"{DOWN}.weight", torch.ones(64, 160)),
        rf"{DOWN}.weight in .* is BF16 \(64, 160\); expected U8 with",
    ),
    "words": (
        "offline",
        put(f"{DOWN}.weight", torch.ones(64, 10, dtype=torch.int32)),
        rf"{DOWN}.weight in .* is I32 \(64, 10\); expected U8, I8 or floats",
    ),
    "no value": ("offline", put(f"{DOWN}.weight", torch.full((64, 160), 0.5)), rf"{DOWN}.weight in .* holds 0.5; "),
    "packed, but online": (
        "online",
        put(f"{DOWN}.weight_scale", torch.ones(1)),
        rf"{DOWN}.weight in .* is packed; config.json says that weights are not",
    ),
    "NaN": ("online", poison, rf"{DOWN}.weight in .* holds nan; expected finite numbers"),
    "norm of nobody": (
        "offline",
        put(f"{DOWN}.rms_norm.weight", torch.ones(160)),
        rf"{DOWN}.rms_norm.weight in .* is there, and use_rms_norm is not true",
    ),
    "latent NaN": ("1bitLLM", poison, rf"{DOWN}.weight in .* holds nan; expected finite numbers"),
    "latent missing": ("1bitLLM", drop(f"{DOWN}.weight"), rf"has no tensor {DOWN}.weight"),
    "latent packed": (
        "1bitLLM",
        put(f"{DOWN}.weight", torch.zeros(16, 160, dtype=torch.uint8)),
        rf"{DOWN}.weight in .* is U8 \(16, 160\); expected floats",
    ),
    "norm missing": ("1bitLLM", drop(NORM), rf"has no tensor {NORM}"),
    "another layer": (
        "1bitLLM",
        put("model.layers.0.mlp.more_proj.weight", torch.ones(4, 4)),
        "more_proj.weight in .* is no weight of a BitNet model with 2 blocks",
    ),
    "a block too many": (
        "1bitLLM",
        put("model.layers.2.mlp.up_proj.weight", torch.ones(4, 4)),
        "layers.2.mlp.up_proj.weight in .* is no weight of a BitNet model with 2 blocks",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(tmp_path, damage):
    kind, change, message = DAMAGE[damage]
    src = source(tmp_path / "src", kind, change)
    with pytest.raises(CheckpointError, match=message):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def asks(**more):
    return lambda said: said["quantization_config"].update(more)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("offline", asks(linear_class="linear"), r"config.json: linear_class is 'linear'; expected 'bitlinear' or"),
        (
            "offline",
            asks(quantization_mode="maybe"),
            r"config.json: quantization_mode is 'maybe'; expected 'offline' or",
        ),
        (
            "offline",
            asks(use_rms_norm=True, rms_norm_eps=0),
            r"config.json: rms_norm_eps is 0; expected a positive number",
        ),
        ("offline", asks(use_rms_norm=True), r"has no tensor .*_proj.rms_norm.weight, and use_rms_norm is true"),
        (
            "offline",
            asks(modules_to_not_convert="lm_head"),
            "modules_to_not_convert is 'lm_head'; expected null or a list",
        ),
        (
            "online",
            asks(modules_to_not_convert=["("]),
            r"modules_to_not_convert is \['\('\], of which one is no expression",
        ),
        ("online", asks(modules_to_not_convert=["k_proj"]), "expected lm_head to be in it, or null"),
        ("online", asks(modules_to_not_convert=["model", "lm_head"]), "has no layer to convert"),
        (
            "1bitLLM",
            lambda said: said.update(weight_bits=2),
            "config.json: weight_bits is 2; .* whose weight_bits is 1",
        ),
        (
            "1bitLLM",
            lambda said: said.pop("weight_bits"),
            "config.json: weight_bits is None; .* whose weight_bits is 1",
        ),
        ("1bitLLM", lambda said: said.update(input_bits=4), "config.json: input_bits is 4; .* whose input_bits is 8"),
        (
            "1bitLLM",
            lambda said: said.update(model_type="bert"),
            "model_type is 'bert'; .* whose model_type is 'llama'",
        ),
        (
            "1bitLLM",
            lambda said: said.update(architectures=["LlamaForCausalLM"]),
            r"architectures is \['LlamaForCausalLM'\]; .* whose architectures is \['BitnetForCausalLM'\]",
        ),
        (
            "1bitLLM",
            lambda said: said.update(rope_scaling={"factor": 2}),
            "rope_scaling is .*; BitNet models with float",
        ),
        (
            "1bitLLM",
            lambda said: said.update(num_hidden_layers=3),
            "has no tensor model.layers.2.self_attn.inner_attn_ln",
        ),
        ("1bitLLM", lambda said: said.update(num_hidden_layers=None), "num_hidden_layers is None; expected a positive"),
    ],
)
def test_configs_that_are_refused(tmp_path, kind, change, message):
    src = source(tmp_path / "src", kind)
    change_config(src, change)
    with pytest.raises(CheckpointError, match=message):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_options_are_for_dense_models(tmp_path):
    for kind in ("offline", "1bitLLM"):
        src = source(tmp_path / kind, kind)
        with pytest.raises(ArgumentError, match="which is quantized already: a format and patterns"):
            repack(src, tmp_path / "dst", W_dtype="uint4")


def test_other_models_are_no_bitnet():
    assert not bitnet.has_latent_weights({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert not bitnet.has_latent_weights({})
    assert not bitnet.has_latent_weights({"packed": True})


def test_folders_of_the_integration_say_who_reads_them():
    config = {"architectures": ["BitnetForCausalLM"], "model_type": "anything", "packed": True, "weight_bits": 1}
    with pytest.raises(
        CheckpointError, match=r"integration/BitNet: load the folder with its BitnetForCausalLM\.from_quantized"
    ):
        bitnet.has_latent_weights(config)


# -- verification ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["qweight", "scales"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_value_is_noticed(tmp_path, monkeypatch, kind, part):
    """One bit of what is written is another: a file is not given its name."""
    src, add = source(tmp_path / "src", kind), writing.ShardWriter.add

    def wrong(self, name, tensor, info=None):
        if name == f"{DOWN}.{part}":
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[1] ^= 8
        add(self, name, tensor, info)

    monkeypatch.setattr(writing.ShardWriter, "add", wrong)
    with pytest.raises(
        CheckpointError, match=rf"{DOWN}: (what was written differs from the source|a scale that was written)"
    ):
        repack(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("n", [8, 64])
def test_every_code_of_a_packed_layer_is_compared(n):
    values = np.random.default_rng(0).integers(-1, 2, (n, 24))
    packed, scale = tiny_bitnet.pack_bitnet(values), torch.tensor([0.5])
    weight, reference = from_bitnet(packed, scale), verify.bitnet_reference(packed, scale, False, n)
    verify.check_weight("x", reference, weight)
    for row in range(n):
        weight.packed[row, row % 6] ^= 1 << 2 * (row % 4)
        with pytest.raises(CheckpointError, match=rf"x: what was written differs .* at \({row}, "):
            verify.check_weight("x", reference, weight)
        weight.packed[row, row % 6] ^= 1 << 2 * (row % 4)
    with pytest.raises(CheckpointError, match="the scale at"):
        verify.check_weight("x", verify.bitnet_reference(packed, torch.tensor([0.7]), True, n), weight)


def test_every_code_of_a_rounded_layer_is_compared():
    dense = torch.randn(16, 24)
    weight = ternary(dense)
    verify.check_ternary("x", dense, weight, 1e-5)
    for row in range(16):
        for code in range(4):  # of which one is what is there
            held, place = weight.packed.view(torch.uint8), row % 4
            before = int(held[row, 2])
            held[row, 2] = before & ~(3 << 2 * place) | code << 2 * place
            if before == int(held[row, 2]):
                continue
            with pytest.raises(CheckpointError, match=rf"x: what was written differs .* at \({row}, {8 + place}\) is"):
                verify.check_ternary("x", dense, weight, 1e-5)
            held[row, 2] = before
    weight.scales[7] *= 1 + 1e-6
    with pytest.raises(CheckpointError, match="x: a scale that was written is not the mean magnitude"):
        verify.check_ternary("x", dense, weight, 1e-5)


# -- config.json -----------------------------------------------------------------------------------------------------------


def test_an_entry_survives_its_json():
    spec = LayerSpec("int2", -1, None, False, 63, "row", 1e-5, 1e-6)
    entry = {**ENTRY, "in_features": 63, "rms_norm_eps": 1e-6}
    assert spec.to_json() == entry
    assert LayerSpec.from_json("x", json.loads(json.dumps(entry))) == spec
    assert LayerSpec("int2", -1).to_json() == {
        key: ENTRY[key] for key in ("W_dtype", "group_size", "zeros_mode", "act_order")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dynamic_quantization": "column"}, r"layer x: dynamic_quantization is 'column'; expected \('row', 'group'\)"),
        ({"activation_eps": 0}, "layer x: activation_eps is 0; expected a positive number"),
        ({"activation_eps": True}, "layer x: activation_eps is True; "),
        ({"activation_eps": float("inf")}, "layer x: activation_eps is inf; "),
        ({"rms_norm_eps": "1e-6"}, "layer x: rms_norm_eps is '1e-6'; "),
        ({"dynamic_quantization": None}, "layer x has 'activation_eps', and its activations are not quantized"),
        ({"more": 1}, "layer x has 'more', which is not known"),
    ],
)
def test_entries_that_are_refused(change, message):
    said = {"quant_method": "bitblas", "format_version": 1, "layers": {"x": {**ENTRY, **change}}}
    with pytest.raises(CheckpointError, match=message):
        parse_config(said)
