"""BitNet models: repacked and loaded, or with transformers' own layers replaced, beside transformers and float64.

transformers compiles parts of its layers by decorators, which would take seconds for each shape: here they run as written.

In float32 layers round activations as float64 does, unless one is nearer to a tie than float32 is off; and a single code that
is another changes all that follows by a thousandth. The models here are drawn until float64 has no such activation.
"""

import copy
import functools
import gc
import importlib
import json
import math
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitblas
import tiny_bitnet
import tiny_models
from bitblas.cache.models import configs_of_model
from bitblas.checkpoints import read_layers, repack, unpack
from tiny_bitnet import Exact

transformers = pytest.importorskip("transformers", minversion="5", reason="pip install 'bitblas[transformers]'")
theirs = pytest.importorskip("transformers.integrations.bitnet")
bitblas_transformers = importlib.import_module("bitblas_transformers")
NormedLinear = importlib.import_module("bitblas_transformers.layers").NormedLinear
replace_bitnet_ = bitblas_transformers.replace_bitnet_
AutoModelForCausalLM = transformers.AutoModelForCausalLM

IDS = tiny_models.tokens(1, 8)
#: How far from float64 logits in float32 may be, beside the largest one: measured were 2e-7 to 4e-7, of transformers' layers as
#: well. Without rounding of activations it is 5e-3 at least, which `test_the_comparison_notices` holds.
BOUND = 2e-6
#: How near to a tie activations may come, in steps of their rounding: float32 is off by a tenth of it.
MARGIN = 1e-4
#: How many times as far from float64 as a model in bfloat16 with exact layers, which round their results only, logits may be:
#: measured were 0.8 to 1.5 times; transformers' layers, which round activations and products as well, 0.9 to 1.7 times.
FACTOR = 3.0
CASES = {
    "bitlinear": ("bitlinear", {"tied": True}),
    "bitlinear, norms": ("bitlinear", {"norms": True, "bias": True}),
    "offline": ("offline", {"tied": True}),
    "offline, norms": ("offline", {"norms": True, "bias": True}),
    "online": ("online", {"tied": True}),
    "online, norms": ("online", {"norms": True, "bias": True}),
    "1bitLLM": ("1bitLLM", {"tied": True}),
    "1bitLLM, bias": ("1bitLLM", {"bias": True}),
}
OF_TRANSFORMERS = [name for name in CASES if "1bitLLM" not in name]


@pytest.fixture(autouse=True)
def _as_written():
    with torch._dynamo.config.patch(disable=True):
        yield


@torch.inference_mode()
def logits(model, ids=IDS):
    return model(ids).logits.double()


@functools.cache
def drawn(name):
    """(the folder, its model in float64, that one's logits) of a case."""
    kind, options = CASES[name]
    for seed in range(100):
        folder = tiny_bitnet.make(kind, **options, seed=seed)
        exact = folder.exact()
        wanted = logits(exact)
        if min(layer.margin for layer in exact.modules() if isinstance(layer, Exact)) > MARGIN:
            return folder, exact, wanted
    raise AssertionError("of 100 models every one has an activation near a tie")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """``folders(case, dtype)``: (what another project would have written, what `repack` made of it), once each."""

    @functools.cache
    def make(name, dtype=torch.float32):
        path = tmp_path_factory.mktemp("bitnet")
        src = drawn(name)[0].write(path / "theirs", dtype)
        repack(src, path / "ours")
        return src, path / "ours"

    return make


def check(model, name, dtype=torch.float32):
    folder, _, wanted = drawn(name)
    found, size = logits(model), wanted.abs().max()
    assert found.shape == wanted.shape
    most = BOUND * size if dtype is torch.float32 else FACTOR * (logits(folder.exact(dtype)) - wanted).abs().max()
    assert (found - wanted).abs().max() <= most, f"{(found - wanted).abs().max() / size:.1e} > {most / size:.1e}"
    return found


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bitblas.Linear)}


def load_theirs(folders, name, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folders(name, dtype)[0], dtype=dtype)


# -- repacked --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_repacked_folder(folders, name, dtype):
    model = bitblas.load_model(folders(name)[1], dtype=dtype, device="cpu")
    assert type(model) is transformers.BitNetForCausalLM
    assert set(layers(model)) == set(drawn(name)[0].layers)
    for layer in layers(model).values():
        config = layer.bitblas_matmul.config
        assert (config.W_dtype, config.dynamic_quantization, config.activation_eps) == ("int2", "row", 1e-5)
        assert isinstance(layer, NormedLinear) == ("norms" in name)
    found = check(model, name, dtype)
    again = AutoModelForCausalLM.from_pretrained(folders(name)[1], dtype=dtype)
    assert torch.equal(logits(again), found)


def test_the_comparison_notices(folders):
    """One weight of 86000; a norm that is left out; activations that are not rounded."""
    for name in ("bitlinear, norms", "1bitLLM"):
        _, exact, wanted = drawn(name)
        model = bitblas.load_model(folders(name)[1], dtype=torch.float32, device="cpu")
        layer = model.model.layers[1].mlp.down_proj
        state = layer.state_dict()
        state["qweight"].view(torch.uint8)[5, 5] ^= 1
        layer.load_state_dict(state)
        with pytest.raises(AssertionError, match="e-"):
            check(model, name)
        plain = copy.deepcopy(exact)
        for each in plain.modules():
            each.rounds = False
        assert (logits(plain) - wanted).abs().max() > 2000 * BOUND * wanted.abs().max()
    model = bitblas.load_model(folders("offline, norms")[1], dtype=torch.float32, device="cpu")
    model.model.layers[1].mlp.up_proj.rms_norm = torch.nn.Identity()
    with pytest.raises(AssertionError, match="e-"):
        check(model, "offline, norms")


def test_rows_that_are_nearly_0(folders):
    """They are divided by the eps of BitNet, not by their own magnitude."""
    model = bitblas.load_model(folders("1bitLLM")[1], dtype=torch.float32, device="cpu")
    name = "model.layers.0.mlp.up_proj"
    steps = torch.randint(-120, 121, (5, 64)) + 0.25  # of 1e-5 / 127: far from ties
    steps[:, 0] = torch.tensor([127e3, 127.0, 40.0, 0.25, 0.0])
    steps[0], steps[3], steps[4] = steps[0] * 1000, steps[3] / 500, 0
    x = steps * (1e-5 / 127)
    with torch.inference_mode():
        wanted, found = Exact(drawn("1bitLLM")[0].layers[name])(x.double()), model.get_submodule(name)(x).double()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=0)
    assert not found[3:].any()  # less than half a step of 1e-5 / 127
    assert bool(found[2].any())


def test_the_frequencies_of_a_llama(folders):
    """1bitLLM's models have a base of 10000, and transformers' BitNet one of 500000 where nothing is said."""
    wanted = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    model = bitblas.load_model(folders("1bitLLM")[1], dtype=torch.float32, device="cpu")
    assert torch.allclose(model.model.rotary_emb.inv_freq, wanted)


@pytest.mark.parametrize("name", ["offline", "1bitLLM", "bitlinear, norms"])
def test_greedy_tokens(folders, name):
    """Of each token float64 has no other that is likelier by more than a flipped code explains."""
    _, exact, wanted = drawn(name)
    model = bitblas.load_model(folders(name)[1], dtype=torch.float32, device="cpu")
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False)
    assert tokens.shape == (1, 20)
    scores = logits(exact, tokens)[0, 7:-1]
    chosen = scores.gather(1, tokens[0, 8:, None])[:, 0]
    assert bool((chosen >= scores.amax(1) - 0.01 * wanted.abs().max()).all())


def test_a_folder_without_a_norm_of_its_layers(folders, tmp_path):
    ours = folders("offline, norms")[1]
    tensors = load_file(ours / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.rms_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((ours / "config.json").read_bytes())
    message = r"model.layers.1.mlp.up_proj.rms_norm.weight"
    with pytest.raises(bitblas.CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(bitblas.CheckpointError, match=message):
        read_layers(tmp_path)


def test_copies_of_a_model_with_norms(folders):
    model = bitblas.load_model(folders("offline, norms")[1], dtype=torch.float32, device="cpu")
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
    halved = copy.deepcopy(model).bfloat16()
    assert {layer.config.activation_eps for layer in layers(halved).values()} == {1e-5}
    assert {tensor.dtype for tensor in halved.parameters()} == {torch.bfloat16}
    check(halved, "offline, norms", torch.bfloat16)


@pytest.mark.parametrize("name", ["bitlinear", "1bitLLM, bias"])
def test_an_unpacked_model_does_not_round_its_activations(folders, tmp_path, name):
    _, exact, wanted = drawn(name)
    unpack(folders(name)[1], tmp_path / "dense", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert not layers(dense)
    plain = copy.deepcopy(exact)
    for each in plain.modules():
        each.rounds = False
    assert (logits(dense) - logits(plain)).abs().max() <= BOUND * wanted.abs().max()


def test_a_bundle_has_the_operators_of_the_model(folders):
    model = bitblas.load_model(folders("offline, norms")[1], dtype=torch.float32, device="cpu")
    wanted = {layer.config for layer in layers(model).values()}
    assert set(configs_of_model(folders("offline, norms")[1], "float32")) == wanted


def test_load_model_says_how_folders_are_converted(folders):
    for name in ("1bitLLM", "offline", "online"):
        src = folders(name)[0]
        with pytest.raises(
            bitblas.CheckpointError, match=f"Convert the folder first: bitblas repack {src} DESTINATION"
        ):
            bitblas.load_model(src)


# -- replaced --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_logits_of_replaced_layers(folders, name, dtype):
    """Those of transformers' layers, of float64, and of the same model repacked."""
    model = load_theirs(folders, name, dtype)
    before = check(model, name, dtype)
    assert replace_bitnet_(model) is model
    assert not any(isinstance(module, (theirs.BitLinear, theirs.AutoBitLinear)) for module in model.modules())
    assert set(layers(model)) == set(drawn(name)[0].layers)
    found = check(model, name, dtype)
    if dtype is torch.float32:
        assert (found - before).abs().max() <= 2 * BOUND * before.abs().max()
    ours = AutoModelForCausalLM.from_pretrained(folders(name, dtype)[1], dtype=dtype)
    assert torch.equal(found, logits(ours))


@pytest.mark.parametrize("name", ["bitlinear, norms", "offline"])
def test_a_model_that_is_not_loaded_but_made(name):
    """By transformers' own `replace_with_bitnet_linear`, and filled."""
    folder = drawn(name)[0]
    fields = {key: value for key, value in folder.config.items() if key in tiny_bitnet.FIELDS}
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**fields)).eval()
    said = {key: value for key, value in folder.config["quantization_config"].items() if key != "quant_method"}
    theirs.replace_with_bitnet_linear(model, ["lm_head"], transformers.BitNetQuantConfig(**said))
    state = {key: t.float() if t.is_floating_point() else t for key, t in folder.tensors.items()}
    if name == "offline":
        for key, layer in folder.layers.items():
            state[f"{key}.weight"] = layer.values.float()
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, assign=True)
    replace_bitnet_(model)
    check(model, name)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_replaced_model_is_saved_as_ours(folders, tmp_path, name):
    model = replace_bitnet_(load_theirs(folders, name))
    model.save_pretrained(tmp_path / "saved")
    ours = folders(name)[1]
    assert read_layers(tmp_path / "saved") == read_layers(ours)
    kept = [
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (tmp_path / "saved", ours)
    ]
    assert kept[0]["layers"] == kept[1]["layers"]
    found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", ours))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key].float(), wanted[key].float()) for key in wanted)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), bitblas.load_model(tmp_path / "saved")):
        assert torch.equal(logits(again), logits(model))


def test_a_replaced_model_generates(folders):
    model = replace_bitnet_(load_theirs(folders, "offline"))
    ours = bitblas.load_model(folders("offline")[1], dtype=torch.float32, device="cpu")
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), ours.generate(IDS, **options))


def test_weights_are_freed_and_operators_shared(folders):
    model = load_theirs(folders, "bitlinear, norms")
    gc.collect()  # what loading left
    packed = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, theirs.BitLinear)]
    norms = {name: module for name, module in model.named_modules() if name.endswith("rms_norm")}
    replace_bitnet_(model)
    assert len(packed) == 14
    assert not any(weight() is not None for weight in packed)
    assert {name: module for name, module in model.named_modules() if name.endswith("rms_norm")} == norms
    operators = {id(layer.bitblas_matmul): layer.bitblas_matmul for layer in layers(model).values()}
    assert len(operators) == 4  # shapes
    assert {operator.origin for operator in operators.values()} <= {"compiled", "loaded"}


def test_a_layer_with_two_names_and_its_mode():
    model = torch.nn.Module()
    model.one = theirs.AutoBitLinear(16, 8, online_quant=True).train()
    model.other = torch.nn.ModuleList([model.one, torch.nn.Linear(4, 4)])
    replace_bitnet_(model, build=False)
    assert isinstance(model.one, bitblas.Linear)
    assert model.other[0] is model.one
    assert model.one.training
    assert type(model.other[1]) is torch.nn.Linear
    assert model.one.bitblas_matmul.provided is None or model.one.bitblas_matmul.origin


def damaged(change, kind=theirs.BitLinear, **options):
    model = torch.nn.Sequential(torch.nn.ReLU(), kind(16, 8, bias=False, dtype=torch.float32, **options))
    with torch.no_grad():
        change(model[1])
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)),
            "model is a Sequential without layers of the classes BitLinear and",
        ),
        (lambda: theirs.BitLinear(16, 8, False), "model is a BitLinear itself; expected a model that has such layers"),
        (
            lambda: damaged(lambda layer: layer.weight.fill_(0b11)),
            r"1: weight holds the code 3, a value of 2, in its byte",
        ),
        (
            lambda: damaged(lambda layer: layer.weight_scale.zero_()),
            "1: weight_scale holds 0; expected a number to divide by",
        ),
        (lambda: damaged(lambda layer: layer.to("meta")), "1: weight is on the device meta; expected one with data"),
        (
            lambda: damaged(lambda layer: layer.weight.fill_(0.5), theirs.AutoBitLinear),
            "1: weight holds 0.5; allowed for int2: whole numbers",
        ),
        (
            lambda: damaged(lambda layer: layer.weight.fill_(math.nan), theirs.AutoBitLinear, online_quant=True),
            "1: weight holds nan; expected finite numbers",
        ),
        (
            lambda: damaged(lambda layer: layer.double(), theirs.AutoBitLinear, online_quant=True),
            "1: A_dtype is 'float64'",
        ),
    ],
)
def test_what_cannot_be_replaced(model, message):
    with pytest.raises(bitblas.BitBLASError, match=f"^{message}"):
        replace_bitnet_(model())
