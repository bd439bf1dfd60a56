"""Deploying a BitLinear, and what it saves, loads, and becomes when it is moved or copied. Nothing is built here."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

import bitblas
import reference
import ternary
from bitblas import ArgumentError, BitLinear, ConfigError
from bitblas.codecs.weight import parse_format_tensor
from bitblas.nn import portable
from bitblas.target import resolve_target
from layers import COPIES, saved
from ternary import DTYPES, SCHEMES, make, same, state_of

#: Targets with layouts of their own, which need not be this machine.
TARGETS = ("llvm -mcpu=x86-64-v2", "llvm -mcpu=cascadelake", "cuda -arch=sm_80", "cuda -arch=sm_90")


@pytest.fixture
def machine(monkeypatch):
    """Lets this machine be another, for layers that are deployed or moved from then on."""
    real, chosen = portable.target_of, [None]
    monkeypatch.setattr(portable, "target_of", lambda device: resolve_target(chosen[0]) if chosen[0] else real(device))
    return lambda target: chosen.__setitem__(0, target)


def kind_of(layer):
    """What says whether it is deployed, and what it holds."""
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    return layer.deployed, list(parameters), sorted(buffers), layer.config


# -- deploy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "quant_type"), [(32, 64, name) for name in SCHEMES] + [(17, 33, "ai8pc_wpg11"), (1, 1, "ai8pc_wpc")]
)
def test_what_is_packed(N, K, quant_type, dtype, bias):
    layer = make(N, K, quant_type, dtype, bias=bias)
    codes = torch.from_numpy(ternary.codes(layer.weight, quant_type, layer.eps)).long()
    scale = torch.from_numpy(ternary.held(layer.weight, quant_type, layer.eps))
    theirs = None if layer.bias is None else layer.bias.detach().clone()
    assert layer.deploy() is layer
    assert layer.deployed
    state = layer.state_dict()
    assert list(layer.parameters()) == []
    assert set(state) == {"w_packed", "w_scale", "format"} | ({"bias"} if bias else set())
    assert torch.equal(state["w_packed"], reference.pack_bits(codes + 2, 2))  # value + 2, little-endian
    assert (state["w_packed"].dtype, tuple(state["w_packed"].shape)) == (torch.int8, (N, -(-K // 4)))
    shape, held = ((1,), torch.float32) if quant_type == "ai8pc_wpt" else (tuple(scale.shape), dtype)
    assert (tuple(layer.w_scale.shape), layer.w_scale.dtype) == (shape, held)
    torch.testing.assert_close(layer.w_scale.double(), scale.view(shape), rtol=4 * ternary.unit(held), atol=0)
    assert layer.bias is None if theirs is None else torch.equal(layer.bias, theirs)
    group = {"ai8pc_wpg16": 16, "ai8pc_wpg11": 11}.get(quant_type, -1)
    assert parse_format_tensor(state["format"]) == {"W_dtype": "int2", "group_size": group, "zeros_mode": None}
    assert repr(layer).endswith(f"quant_type='{quant_type}', deployed)")


def test_deploying_twice_changes_nothing():
    layer = make().deploy()
    before, buffer = state_of(layer), layer.w_packed
    assert layer.deploy() is layer
    assert layer.w_packed is buffer
    assert same(state_of(layer), before)


def test_a_layer_without_a_bias():
    for layer in (BitLinear(64, 32, False), BitLinear.from_linear(torch.nn.Linear(64, 32, False))):
        assert set(layer.deploy().state_dict()) == {"w_packed", "w_scale", "format"}
        assert layer.bias is None


def test_ties_are_packed_to_the_even_number():
    layer = BitLinear(4, 1, False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5, 1.5, -1.5]]))
    assert layer.deploy().state_dict()["w_packed"].tolist() == [[2 + 2 * 4 + 3 * 16 + 1 * 64]]
    assert layer.w_scale.item() == 1


def test_eps_is_the_least_scale():
    layer = make(eps=1e-3)
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.deploy().w_scale.tolist() == [torch.tensor(1e-3).item()]
    assert not (layer.state_dict()["w_packed"].view(torch.uint8) - 0b10101010).any()


def test_parameters_are_freed():
    layer = BitLinear(1024, 1024)
    kept = [weakref.ref(layer.weight), weakref.ref(layer.bias), weakref.ref(layer.weight.untyped_storage())]
    layer.deploy()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_resident_bytes():
    layer = BitLinear(1024, 1024).deploy()
    held = [*layer.parameters(), *layer.buffers()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) <= 270_000


def test_training_and_evaluation_are_kept():
    assert make().eval().deploy().training is False
    layer = make().deploy()
    assert layer.training
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train().training


def test_in_a_model_it_stays_the_same_object():
    model = torch.nn.Sequential(make(), torch.nn.ReLU())
    layer, calls = model[0], []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    layer.note = "kept"
    layer.deploy()
    assert model[0] is layer
    assert (layer.note, len(layer._forward_pre_hooks)) == ("kept", 1)
    assert set(model.state_dict()) == {"0.w_packed", "0.w_scale", "0.bias", "0.format"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_a_weight_that_is_not_finite(quant_type, bad):
    layer = make(quant_type=quant_type)
    with torch.no_grad():
        layer.weight[31, 63] = bad
    kind, weight = kind_of(layer), layer.weight
    with pytest.raises(ArgumentError, match="the weight holds a NaN or an infinity"):
        layer.deploy()
    assert kind_of(layer) == kind
    assert layer.weight is weight


def failing(layer, monkeypatch, way):
    """Let the deployment of a layer fail."""
    if way == "bias":
        layer.bias.data = torch.full((32,), 1e6)
        return ArgumentError, r"bias holds 1e\+06, which torch\.float16 does not"
    if way == "shape":
        layer.bias.data = torch.zeros(31)
        return ArgumentError, r"bias is torch.float32 \(31,\)"
    if way == "dtype":
        layer.double()
        return ConfigError, "float64"
    if way == "device":
        monkeypatch.setattr(
            portable, "target_of", lambda _: (_ for _ in ()).throw(bitblas.UnsupportedError("no kernels"))
        )
        return bitblas.UnsupportedError, "no kernels"

    def transform(*_):
        raise MemoryError("no more of it")

    monkeypatch.setattr(bitblas.Matmul, "transform_weight", transform)
    return MemoryError, "no more of it"


@pytest.mark.parametrize("way", ["bias", "shape", "dtype", "device", "memory"])
def test_a_deployment_that_fails_changes_nothing(monkeypatch, way):
    layer = make(dtype=torch.float16)
    error, message = failing(layer, monkeypatch, way)
    weight, bias, before = layer.weight, layer.bias, state_of(layer)
    with pytest.raises(error, match=message):
        layer.deploy()
    assert not layer.deployed
    assert layer.weight is weight
    assert layer.bias is bias
    assert same(state_of(layer), before)
    assert layer.bitblas_matmul is None
    assert list(layer.buffers()) == []


def test_parametrized_layers_are_refused():
    layer = torch.nn.utils.parametrizations.weight_norm(make())
    with pytest.raises(ArgumentError, match="the layer is parametrized"):
        layer.deploy()
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert layer.deploy().deployed


def test_parameters_that_others_hold_stay_theirs():
    linear = torch.nn.Linear(64, 32)
    before = linear.weight.detach().clone()
    first, second = BitLinear.from_linear(linear), BitLinear.from_linear(linear)
    first.deploy()
    assert torch.equal(linear.weight, before)
    assert second.weight is linear.weight
    assert same(state_of(second.deploy()), state_of(first))
    assert first.w_packed.data_ptr() != second.w_packed.data_ptr()


def test_a_layer_without_data():
    layer = BitLinear(64, 32, device="meta").deploy()
    assert layer.deployed
    assert all(tensor.is_meta for tensor in layer.buffers())
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "w_packed": (32, 16), "w_scale": (1,), "bias": (32,), "format": (128,),
    }  # fmt: skip


# -- saved and loaded ------------------------------------------------------------------------------------------------------


def files(tmp_path):
    """Ways to a file and back."""

    def save(state):
        torch.save(state, tmp_path / "state.pt")
        return torch.load(tmp_path / "state.pt", weights_only=True)

    def safetensors(state):
        save_file(state, tmp_path / "state.safetensors")
        return load_file(tmp_path / "state.safetensors")

    return {"as it is": dict, "torch": save, "safetensors": safetensors}


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_a_deployed_state_loads_into_any_layer(tmp_path, quant_type):
    source = make(quant_type=quant_type).deploy()
    for way in files(tmp_path).values():
        state = way(source.state_dict())
        fresh, ready = make(quant_type=quant_type, seed=1), make(quant_type=quant_type, seed=2).deploy()
        empty = BitLinear(64, 32, quant_type=quant_type, device="meta")
        ready_empty = BitLinear(64, 32, quant_type=quant_type, device="meta").deploy()
        for layer in (fresh, ready, empty, ready_empty):
            on_meta = layer.device.type == "meta"
            found = layer.load_state_dict(state, assign=on_meta)
            assert not found.missing_keys
            assert not found.unexpected_keys
            assert kind_of(layer) == kind_of(source)
            assert same(state_of(layer), state_of(source))
            assert torch.equal(layer.w_packed, source.w_packed)
            assert layer.bitblas_matmul is source.bitblas_matmul


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", SCHEMES)
@pytest.mark.parametrize("how", ["training", "deployed", "meta"])
def test_a_layer_keeps_its_dtype(quant_type, dtype, how):
    source = make(quant_type=quant_type).deploy()
    layer = BitLinear(64, 32, quant_type=quant_type, dtype=dtype, device="meta" if how == "meta" else None)
    layer = layer.deploy() if how == "deployed" else layer
    layer.load_state_dict(source.state_dict(), assign=how == "meta")
    held = torch.float32 if quant_type == "ai8pc_wpt" else dtype
    assert (layer.config.A_dtype, layer.bias.dtype, layer.w_scale.dtype) == (str(dtype)[6:], dtype, held)
    assert torch.equal(layer.w_scale, source.w_scale.to(held))
    assert torch.equal(layer.bias, source.bias.to(dtype))
    assert torch.equal(layer.state_dict()["w_packed"], source.state_dict()["w_packed"])


def test_a_layer_that_was_changed_keeps_what_it_became():
    layer = make(seed=1).half()
    layer.load_state_dict(make().deploy().state_dict())
    assert (layer.config.A_dtype, layer.bias.dtype, layer.w_scale.dtype) == ("float16", torch.float16, torch.float32)


def test_states_of_training():
    source, layer = make(), make(seed=1)
    layer.load_state_dict(source.state_dict())
    assert same(state_of(layer), state_of(source))
    assert not layer.deployed
    empty = BitLinear(64, 32, device="meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    assert same(state_of(empty.deploy()), state_of(make().deploy()))
    linear = torch.nn.Linear(64, 32)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)


def other_states():
    """States that do not fit a layer (32, 64) of ai8pc_wpt with a bias, and what is said."""
    good = make().deploy().state_dict()
    packed = good["w_packed"]
    both = r"w_packed is that of another layer, with .*{}.*; this one takes w_packed \(32, 16\), w_scale \(1,\), bias \(32,\)"
    yield "N", make(31).deploy().state_dict(), both.format(r"w_packed \(31, 16\)")
    yield "K", make(32, 60).deploy().state_dict(), both.format(r"w_packed \(32, 15\)")
    yield "wpc", make(quant_type="ai8pc_wpc").deploy().state_dict(), both.format(r"w_scale \(32, 1\)")
    yield "wpg", make(quant_type="ai8pc_wpg16").deploy().state_dict(), both.format(r"w_scale \(32, 4\)")
    for K in (61, 62, 63):  # as many bytes
        yield f"K{K}", make(32, K).deploy().state_dict(), "w_packed does not hold 64 of -1, 0 and 1 in each row"
    yield "zeros", {**good, "w_packed": packed * 0}, "w_packed does not hold 64 of -1, 0 and 1"
    one = packed.clone()
    one[31, 15] &= 0x3F
    yield "one", {**good, "w_packed": one}, "w_packed does not hold 64 of -1, 0 and 1"
    yield "float", {**good, "w_packed": packed.float()}, "w_packed is torch.float32.*takes torch.int8"
    yield "scale", {**good, "w_scale": torch.ones(1, dtype=torch.int32)}, "w_scale is torch.int32.*takes torch.float32"
    yield "format", {**good, "format": good["format"] + 1}, "format holds"
    yield (
        "group",
        {**good, "format": make(quant_type="ai8pc_wpg16").deploy().format},
        "'group_size': 16.*takes.*'group_size': -1",
    )


OTHERS = [pytest.param(state, message, id=name) for name, state, message in other_states()]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("deployed", [True, False])
@pytest.mark.parametrize(("state", "message"), OTHERS)
def test_the_state_of_another_layer_is_refused(state, message, deployed, strict):
    """… and named beside the layer, which is as it was, in the midst of a model."""
    layer = make(seed=1)
    layer = layer.deploy() if deployed else layer
    model = torch.nn.ModuleDict({"up": layer, "down": torch.nn.Linear(2, 2)})
    kind, before = kind_of(layer), state_of(layer)
    given = {
        **{f"up.{name}": tensor for name, tensor in state.items()},
        **{f"down.{n}": t for n, t in model["down"].state_dict().items()},
    }
    with pytest.raises(RuntimeError, match=f"(?s)up\\..*{message}"):
        model.load_state_dict(given, strict=strict)
    assert kind_of(layer) == kind
    assert same(state_of(layer), before)
    layer.load_state_dict(make().deploy().state_dict())  # and takes the next one


@pytest.mark.parametrize("K", [64, 63, 62, 61])
def test_pad_bits_are_looked_at(K):
    good = make(32, K).deploy().state_dict()
    layer = make(32, K, seed=1)
    if K < 64:
        bad = good["w_packed"].clone()
        bad[3, 15] |= -128  # the pad bits of the last code
        with pytest.raises(RuntimeError, match=f"w_packed does not hold {K} of"):
            layer.load_state_dict({**good, "w_packed": bad})
    layer.load_state_dict({**good, "w_packed": good["w_packed"].view(torch.uint8)})
    assert same(state_of(layer), good)


@pytest.mark.parametrize("name", ["w_scale", "bias"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_layer_in_training_takes_no_part_of_a_deployed_one(name, strict):
    state, layer = make().deploy().state_dict(), make(seed=1)
    del state[name]
    kind, before = kind_of(layer), state_of(layer)
    with pytest.raises(RuntimeError, match="w_packed is that of another layer, with"):
        layer.load_state_dict(state, strict=strict)
    assert kind_of(layer) == kind
    assert same(state_of(layer), before)


@pytest.mark.parametrize("deployed", [True, False])
def test_a_bias_that_the_layer_has_not(deployed):
    layer = make(bias=False, seed=1)
    layer = layer.deploy() if deployed else layer
    before = state_of(layer)
    with pytest.raises(RuntimeError, match=r"with .*bias \(32,\); this one takes w_packed \(32, 16\), w_scale \(1,\)$"):
        layer.load_state_dict(make().deploy().state_dict())
    assert same(state_of(layer), before)


def test_what_is_missing_or_too_much():
    layer, state = make(seed=1).deploy(), make().deploy().state_dict()
    found = layer.load_state_dict({"bias": state["bias"], "other": state["bias"]}, strict=False)
    assert sorted(found.missing_keys) == ["w_packed", "w_scale"]
    assert found.unexpected_keys == ["other"]
    assert torch.equal(layer.bias, state["bias"])
    with pytest.raises(RuntimeError, match=r'Unexpected.*"w_scale", "format"'):
        make().load_state_dict({name: tensor for name, tensor in state.items() if name != "w_packed"})
    del state["format"]  # as another library writes it
    layer.load_state_dict(state)
    assert same(state_of(layer), state_of(make().deploy()))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_training_is_refused_by_a_deployed_layer(strict):
    layer = make().deploy()
    before = state_of(layer)
    with pytest.raises(RuntimeError, match=r"0\.weight is that of a layer in training, and this layer is deployed"):
        torch.nn.Sequential(layer).load_state_dict(
            {f"0.{n}": t for n, t in make(seed=1).state_dict().items()}, strict=strict
        )
    assert same(state_of(layer), before)


def test_buffers_of_a_subclass_survive_what_is_refused():
    class Own(BitLinear):
        def __init__(self):
            super().__init__(64, 32)
            self.register_buffer("steps", torch.zeros(3))

    layer, state = Own(), make().deploy().state_dict()
    with pytest.raises(RuntimeError, match="format holds"):
        layer.load_state_dict({**state, "steps": torch.ones(3), "format": state["format"] + 1})
    assert set(layer.state_dict()) == {"weight", "bias", "steps"}
    assert set(layer.deploy().state_dict()) == {"w_packed", "w_scale", "bias", "format", "steps"}
    assert type(copy.deepcopy(layer)) is Own


def test_safetensors_saves_and_loads_models(tmp_path):
    model = torch.nn.Sequential(make(64, 64), torch.nn.ReLU(), make(8, 64, seed=1))
    bitblas.deploy(model, build=False)
    save_model(model, tmp_path / "model.safetensors")
    other = torch.nn.Sequential(make(64, 64, seed=2), torch.nn.ReLU(), make(8, 64, seed=3))
    load_model(other, tmp_path / "model.safetensors")
    assert same(state_of(other), state_of(model))


def test_a_loaded_state_is_not_the_source():
    source = state_of(make().deploy())
    layer = make(seed=1)
    layer.load_state_dict(source)
    expected = state_of(layer)
    for tensor in source.values():
        tensor.zero_()
    assert same(state_of(layer), expected)


# -- machines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 128), (17, 48)], ids=str)
def test_every_machine_saves_the_same_and_loads_it(machine, shape, quant_type):
    expected, layouts = state_of(make(*shape, quant_type).deploy()), set()
    for target in TARGETS:
        machine(target)
        there = make(*shape, quant_type).deploy()
        layouts.add(there.bitblas_matmul.layout.name)
        assert same(state_of(there), expected)
        other = make(*shape, quant_type, seed=1)
        other.load_state_dict(expected)
        assert torch.equal(other.w_packed, there.w_packed)
        moved = pickle.loads(pickle.dumps(there))
        machine(None)
        back = pickle.loads(pickle.dumps(moved))
        assert same(state_of(back), expected)
        assert torch.equal(back.w_packed, make(*shape, quant_type).deploy().w_packed)
    assert len(layouts) > 1 or shape == (17, 48)


def test_packed_buffers_that_others_have_filled(machine):
    source = make(64, 128).deploy()
    for target in TARGETS:
        machine(target)
        other = BitLinear(128, 64, device="meta").deploy()
        for name, tensor in source.state_dict().items():
            setattr(other, name, tensor.clone())
        assert other.load_packed_() is other
        assert same(state_of(other), state_of(source))
        machine(None)


# -- moved and copied ------------------------------------------------------------------------------------------------------

CHANGES = {
    "half": (lambda layer: layer.half(), torch.float16),
    "bfloat16": (lambda layer: layer.bfloat16(), torch.bfloat16),
    "float": (lambda layer: layer.float(), torch.float32),
    "to": (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
    "both": (lambda layer: layer.to("cpu", torch.float16), torch.float16),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_another_dtype(quant_type, change):
    apply, dtype = CHANGES[change]
    layer = make(quant_type=quant_type)
    assert apply(layer) is layer
    assert (layer.weight.dtype, layer.bias.dtype, layer.config.A_dtype) == (dtype, dtype, str(dtype)[6:])
    layer.deploy()
    assert (layer.config.A_dtype, layer.config.out_dtype) == (str(dtype)[6:], str(dtype)[6:])
    layer = make(quant_type=quant_type).deploy()
    before = state_of(layer)
    assert apply(layer) is layer
    held = torch.float32 if quant_type == "ai8pc_wpt" else dtype
    assert (layer.config.A_dtype, layer.bias.dtype, layer.w_scale.dtype) == (str(dtype)[6:], dtype, held)
    assert torch.equal(layer.w_scale, before["w_scale"].to(held))
    assert torch.equal(layer.bias, before["bias"].to(dtype))
    assert torch.equal(layer.state_dict()["w_packed"], before["w_packed"])
    assert torch.equal(layer.format, before["format"])
    assert layer.quant_type == quant_type


def test_the_scale_of_all_weights_loses_nothing_on_its_way():
    layer = make().deploy()
    scale = layer.w_scale.clone()
    assert torch.equal(layer.half().bfloat16().half().float().w_scale, scale)


def test_dtypes_that_there_are_no_kernels_for():
    layer = make().deploy()
    before = state_of(layer)
    for change in (torch.nn.Module.double, lambda layer: layer.type(torch.int8), lambda layer: layer.to(torch.float64)):
        with pytest.raises(ArgumentError, match="allowed: float16, bfloat16, float32"):
            change(layer)
    assert same(state_of(layer), before)
    with pytest.raises(ArgumentError, match=r"parameters are torch.float64; allowed"):
        make().double()(torch.zeros(2, 64, dtype=torch.float64))


def test_to_meta_and_to_empty():
    for layer in (make().deploy(), make()):
        before = {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}
        layer.to("meta")
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        assert {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} == before
        layer.to_empty(device="cpu")
        layer.load_state_dict(make().deploy().state_dict())
        assert same(state_of(layer), state_of(make().deploy()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("deployed", [True, False])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_copies(quant_type, how, deployed, bias):
    layer = make(quant_type=quant_type, bias=bias).eval()
    layer = layer.deploy() if deployed else layer
    layer.note, before = "kept", state_of(layer)
    other = COPIES[how](layer)
    assert type(other) is BitLinear
    assert kind_of(other) == kind_of(layer)
    assert same(state_of(other), before)
    assert (other.note, other.training, other.eps, other.quant_type) == ("kept", False, layer.eps, layer.quant_type)
    assert other.bitblas_matmul is layer.bitblas_matmul
    if how != "copy":
        with torch.no_grad():
            for tensor in (*other.buffers(), *other.parameters()):
                tensor.zero_()
        assert same(state_of(layer), before)
    if not deployed and how != "copy":
        other.load_state_dict(before)
        assert same(state_of(other.deploy()), state_of(copy.deepcopy(layer).deploy()))
        assert not layer.deployed


def test_a_deployed_copy_leaves_the_one_in_training():
    layer = make()
    weight = layer.weight
    other = copy.copy(layer).deploy()
    assert other.deployed
    assert layer.weight is weight
    assert not layer.deployed


def test_layers_that_stand_twice_or_share_a_weight():
    first, second = make(), make()
    second.weight = first.weight
    model = torch.nn.ModuleList([first, first, second])
    for other in (copy.deepcopy(model), saved(model)):
        assert other[0] is other[1]
        assert other[2].weight is other[0].weight
    bitblas.deploy(model, build=False)
    assert all(layer.deployed for layer in model)
    assert same(state_of(first), state_of(make().deploy()))
    assert torch.equal(second.state_dict()["w_packed"], first.state_dict()["w_packed"])
    for other in (copy.deepcopy(model), saved(model)):
        assert other[0] is other[1]
        assert same(state_of(other), state_of(model))
