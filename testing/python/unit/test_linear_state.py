"""What a layer saves and loads, and what moves and copies of it are. Nothing is built here, nor has to run."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

import bitblas
import layers
import reference
from bitblas.codecs.weight import format_tensor, parse_format_tensor
from bitblas.errors import ArgumentError
from bitblas.nn import portable
from bitblas.target import resolve_target
from layers import COPIES, config, layer_and_problem, saved

#: Targets with layouts of their own, which need not be this machine.
TARGETS = ("llvm -mcpu=x86-64-v2", "llvm -mcpu=cascadelake", "cuda -arch=sm_80", "cuda -arch=sm_90")
KINDS = {
    "floats": {"N": 64, "K": 128, "group_size": 64, "A_dtype": "float16", "out_dtype": "float16"},
    "bytes": {"N": 64, "K": 128, "group_size": 64, "A_dtype": "int8", "W_dtype": "int3", "with_zeros": False},
    "int8": {"N": 64, "K": 128, "group_size": 64, "A_dtype": "int8", "W_dtype": "int8", "with_zeros": False},
    "odd": {"N": 17, "K": 33, "group_size": 11, "W_dtype": "uint3"},
    "nf4": {"N": 64, "K": 128, "group_size": 64, "A_dtype": "float16", "W_dtype": "nf4", "with_zeros": False},
    "native": {"N": 64, "K": 128, "group_size": -1, "A_dtype": "float16", "W_dtype": "float16", "with_zeros": False},
}


@pytest.fixture
def machine(monkeypatch):
    """Lets this machine be another, for layers that are made or moved from then on."""
    real, chosen = portable.target_of, [None]
    monkeypatch.setattr(portable, "target_of", lambda device: resolve_target(chosen[0]) if chosen[0] else real(device))
    return lambda target: chosen.__setitem__(0, target)


def state_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype is second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


# -- what is saved ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["quantized", "original", "rescale"])
def test_keys_dtypes_and_bytes(mode):
    layer, problem = layer_and_problem(zeros_mode=mode)
    state = layer.state_dict()
    zeros = torch.int8 if mode == "quantized" else torch.float32
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "qweight": torch.int8, "scales": torch.float32, "zeros": zeros, "bias": torch.float32, "format": torch.uint8,
    }  # fmt: skip
    assert torch.equal(state["qweight"], reference.pack_bits(problem.codes, 4))
    assert torch.equal(state["scales"], problem.scale)
    assert torch.equal(state["zeros"], problem.zeros)
    assert torch.equal(state["bias"], problem.bias)
    assert parse_format_tensor(state["format"]) == {"W_dtype": "uint4", "group_size": 16, "zeros_mode": mode}
    assert layer.bitblas_matmul.layout.name == "packed" or not torch.equal(layer.qweight, state["qweight"])


@pytest.mark.parametrize("name", [name for name in bitblas.formats.FORMATS if reference.width(name) <= 8])
def test_every_format_is_packed(name):
    for N, K in ((16, 64), (5, 13)):
        layer, problem = layer_and_problem(N=N, K=K, W_dtype=name, with_zeros=False, group_size=-1)
        state = layer.state_dict()
        assert torch.equal(state["qweight"], reference.pack_bits(problem.codes, reference.width(name)))
        assert torch.equal(state["format"], format_tensor(name, -1))


def test_no_more_is_saved_than_there_is():
    layer = bitblas.Linear(64, 32, W_dtype="int4")
    assert set(layer.state_dict()) == {"qweight", "format"}
    assert set(bitblas.Linear(64, 32).state_dict()) == {"weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_machine_saves_the_same(machine, kind):
    cfg, found, layouts = config(**KINDS[kind]), [], set()
    for target in (None, *TARGETS):
        machine(target)
        layer, problem = layer_and_problem(cfg=cfg)
        layouts.add(layer.bitblas_matmul.layout.name)
        found.append(state_of(layer))
    assert all(same(found[0], state) for state in found)
    assert layouts >= {"floats": {"mma16", "lanes"}, "bytes": {"dots", "mma8"}, "odd": {"packed"}}.get(kind, {"lanes"})
    if kind == "native":
        assert torch.equal(found[0]["weight"], problem.weights)


def test_through_a_file(tmp_path):
    layer, _ = layer_and_problem()
    layer.perm = torch.randperm(64, dtype=torch.int32)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    save_file(layer.state_dict(), tmp_path / "state.safetensors")
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), load_file(tmp_path / "state.safetensors")):
        other = layers.build(config())
        assert not other.load_state_dict(state).missing_keys
        assert same(state_of(other), state_of(layer))
        assert torch.equal(other.qweight, layer.qweight)


def test_safetensors_saves_and_loads_models(tmp_path):
    model = torch.nn.Sequential(layer_and_problem()[0], torch.nn.ReLU(), layer_and_problem(seed=1, N=16, K=32)[0])
    save_model(model, tmp_path / "model.safetensors")
    other = torch.nn.Sequential(layers.build(config()), torch.nn.ReLU(), layers.build(config(N=16, K=32)))
    load_model(other, tmp_path / "model.safetensors")
    assert same(state_of(other), state_of(model))


# -- what is loaded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_to_every_machine_and_back(machine, kind, assign):
    cfg = config(**KINDS[kind])
    layer, problem = layer_and_problem(cfg=cfg)
    saved = state_of(layer)
    for target in TARGETS:
        machine(target)
        there = layers.build(cfg)
        there.load_state_dict(saved, assign=assign)
        name = "weight" if kind in ("native", "int8") else "qweight"
        codes = there.bitblas_matmul.unpack_weight(getattr(there, name))
        wide = {torch.int16: 0xFFFF}.get(codes.dtype, 0xFF)
        assert torch.equal(codes.long() & wide, problem.codes)
        machine(None)
        back = layers.build(cfg)
        back.load_state_dict(there.state_dict(), assign=assign)
        assert torch.equal(getattr(back, name), getattr(layer, name))
        assert same(state_of(back), saved)


def damaged():
    layer, _ = layer_and_problem()
    saved = layer.state_dict()
    perm = torch.zeros(64, dtype=torch.int32)
    return [
        ({"format": format_tensor("nf4", 16)}, "nf4.*takes.*uint4"),
        ({"format": format_tensor("uint4", 32, "quantized")}, "'group_size': 32.*takes.*'group_size': 16"),
        ({"format": format_tensor("uint4", 16, "original")}, "'original'.*takes.*'quantized'"),
        ({"format": format_tensor("uint4", 16)}, "None.*takes.*'quantized'"),
        ({"format": saved["format"] + 1}, "format holds"),
        ({"format": saved["format"][:5]}, "format is"),
        ({"qweight": saved["qweight"][:, :31]}, r"qweight.*\(?32, 31\)?.*32, 32"),
        ({"qweight": saved["qweight"].float()}, "qweight is torch.float32.*takes torch.int8"),
        ({"qweight": saved["qweight"].int()}, "qweight is torch.int32.*takes torch.int8"),
        ({"scales": saved["scales"].int()}, "scales is torch.int32.*takes torch.float32"),
        ({"scales": saved["scales"][:, :2]}, "scales.*32, 2.*32, 4"),
        ({"zeros": saved["scales"].T[:, :16].contiguous()}, "zeros is torch.float32.*takes torch.int8"),
        ({"bias": saved["bias"].short()}, "bias is torch.int16"),
        ({"perm": perm}, "perm is no permutation of 0 to 63"),
        ({"perm": perm[1:]}, r"perm is torch.int32 \(63,\)"),
        ({"perm": torch.arange(64)}, "perm is torch.int64"),
    ]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("change", "message"), [pytest.param(*row, id=row[1]) for row in damaged()])
def test_another_format_or_shape_is_refused(change, message, strict):
    layer, _ = layer_and_problem()
    before = state_of(layer)
    model = torch.nn.ModuleDict({"up": layer})
    state = {f"up.{name}": tensor for name, tensor in {**layer_and_problem(seed=1)[0].state_dict(), **change}.items()}
    with pytest.raises(RuntimeError, match=f"(?s)up\\..*{message}"):
        model.load_state_dict(state, strict=strict)
    if not any(tensor.shape != before.get(name, tensor).shape for name, tensor in change.items()):
        assert same(state_of(layer), before)  # torch copies what has the right shape


def test_a_dense_weight_is_no_int8_weight():
    layer = bitblas.Linear(64, 32, A_dtype="int8", W_dtype="int8", out_dtype="int32", accum_dtype="int32")
    with pytest.raises(RuntimeError, match=r"weight is torch.float32.*takes torch.int8"):
        layer.load_state_dict(torch.nn.Linear(64, 32, bias=False).state_dict())


def test_a_dense_weight_for_a_dense_layer():
    linear = torch.nn.Linear(64, 32)
    layer = bitblas.Linear(64, 32, True, "float16", "float16")
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.state_dict()["weight"], linear.weight.half())
    assert torch.equal(layer.bias, linear.bias.half())


@pytest.mark.parametrize("name", ["scales", "zeros", "bias"])
@pytest.mark.parametrize("assign", [False, True])
def test_values_beyond_the_dtype_are_refused(name, assign):
    layer, _ = layer_and_problem(zeros_mode="original", A_dtype="float16", out_dtype="float16")
    state, before = layer.state_dict(), state_of(layer)
    assert before[name].dtype is torch.float16
    large = {**state, name: torch.full(state[name].shape, 1e8)}
    with pytest.raises(RuntimeError, match=f"{name} holds 1e\\+08, which torch.float16 does not"):
        layer.load_state_dict(large, assign=assign)
    assert same(state_of(layer), before)
    layer.load_state_dict({**state, name: torch.full(state[name].shape, 1e4)}, assign=assign)
    layer._buffers[name] = torch.full(state[name].shape, 1e8)
    with pytest.raises(bitblas.ArgumentError, match=f"{name} holds 1e\\+08, which torch.float16 does not"):
        layer.load_packed_()


def test_without_a_format_the_bytes_are_believed():
    layer, _ = layer_and_problem()
    state = state_of(layer)
    del state["format"]
    state["qweight"] = state["qweight"].view(torch.uint8)
    other = layers.build(config())
    assert not other.load_state_dict(state).missing_keys
    assert same(state_of(other), state_of(layer))


def test_what_is_missing_or_too_much():
    layer, _ = layer_and_problem()
    before, state = state_of(layer), layer_and_problem(seed=1)[0].state_dict()
    del state["qweight"]
    state["g_idx"] = torch.zeros(64)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*qweight.*Unexpected.*g_idx"):
        layers.build(config()).load_state_dict(state)
    found = layer.load_state_dict(state, strict=False)
    assert found.missing_keys == ["qweight"]
    assert found.unexpected_keys == ["g_idx"]
    assert torch.equal(layer.state_dict()["qweight"], before["qweight"])
    assert torch.equal(layer.scales, state["scales"])


def test_an_order_comes_and_is_missed():
    ordered, _ = layer_and_problem()
    ordered.perm = torch.randperm(64, dtype=torch.int32)
    layer, _ = layer_and_problem(seed=1)
    layer.load_state_dict(ordered.state_dict())
    assert torch.equal(layer.perm, ordered.perm)
    assert layer.perm is not ordered.perm
    with pytest.raises(RuntimeError, match=r"Missing.*perm"):
        layer.load_state_dict(layer_and_problem()[0].state_dict())
    assert layers.build(config(), act_order=True).load_state_dict(ordered.state_dict()).missing_keys == []


@pytest.mark.parametrize("act_order", [False, True])
def test_from_meta_by_assignment(act_order):
    layer, _ = layer_and_problem()
    if act_order:
        layer.perm = torch.randperm(64, dtype=torch.int32)
    empty = layers.build(config(), device="meta", act_order=act_order)
    assert all(t.is_meta for t in empty.buffers())
    model = torch.nn.Sequential(empty)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in layer.state_dict().items()}, assign=True)
    assert not any(t.is_meta for t in model.buffers())
    assert torch.equal(empty.qweight, layer.qweight)
    assert same(state_of(empty), state_of(layer))


def test_from_meta_by_assignment_of_other_floats():
    layer, _ = layer_and_problem(with_zeros=False)
    empty = layers.build(config(A_dtype="float16", out_dtype="float16", with_zeros=False), device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.scales, layer.scales.half())
    assert torch.equal(empty.bias, layer.bias.half())


def test_to_empty():
    layer, _ = layer_and_problem()
    for device in ("cpu", "meta", "cpu"):
        layer.to_empty(device=device)
        assert layer.qweight.shape == (32, 32)
    assert torch.equal(layer.format, format_tensor("uint4", 16, "quantized"))
    state = layer_and_problem(seed=1)[0].state_dict()
    layer.load_state_dict(state)
    assert same(state_of(layer), state)


def test_a_loaded_state_is_not_the_source():
    source, layer = state_of(layer_and_problem()[0]), layers.build(config())
    layer.load_state_dict(source)
    expected = state_of(layer)
    for tensor in source.values():
        tensor.zero_()
    assert same(state_of(layer), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_packed_buffers_that_others_have_filled(machine, target):
    layer, problem = layer_and_problem(cfg=config(**KINDS["floats"]))
    machine(target)
    other = layers.build(layer.config, device="meta")
    for name, tensor in layer.state_dict().items():
        setattr(other, name, tensor.clone())
    assert other.load_packed_() is other
    assert torch.equal(other.bitblas_matmul.unpack_weight(other.qweight).long(), problem.codes)
    assert same(state_of(other), state_of(layer))
    other.format = format_tensor("uint4", 32)
    with pytest.raises(ArgumentError, match=r"'group_size': 32.*takes.*64"):
        other.load_packed_()


# -- what moves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda layer: layer.half(), "float16"),
        (lambda layer: layer.bfloat16(), "bfloat16"),
        (lambda layer: layer.float(), "float32"),
        (lambda layer: layer.to(torch.bfloat16), "bfloat16"),
        (lambda layer: layer.to(dtype=torch.float16), "float16"),
        (lambda layer: layer.to("cpu", torch.float16), "float16"),
        (lambda layer: layer.type(torch.float16), "refused"),
    ],
    ids=["half", "bfloat16", "float", "to", "dtype", "both", "type"],
)
@pytest.mark.parametrize("mode", ["quantized", "original"])
def test_another_dtype(change, name, mode):
    layer, problem = layer_and_problem(zeros_mode=mode)
    packed = state_of(layer)["qweight"]
    if name == "refused":
        with pytest.raises(ArgumentError, match="its weight is packed in bytes"):
            change(layer)
        return
    assert change(layer) is layer
    dtype = getattr(torch, name)
    assert (layer.A_dtype, layer.out_dtype, layer.W_dtype) == (name, name, "uint4")
    assert (layer.scales.dtype, layer.bias.dtype) == (dtype, dtype)
    assert torch.equal(layer.scales, problem.scale.to(dtype))
    assert torch.equal(layer.zeros, problem.zeros if mode == "quantized" else problem.zeros.to(dtype))
    assert layer.bitblas_matmul.config == layer.config
    assert torch.equal(state_of(layer)["qweight"], packed)
    assert torch.equal(layer.bitblas_matmul.unpack_weight(layer.qweight).long(), problem.codes)


@pytest.mark.parametrize(
    "change",
    [torch.nn.Module.double, lambda layer: layer.to(torch.float64), lambda layer: layer.type(torch.int8)],
    ids=["double", "to", "type"],
)
def test_dtypes_that_there_are_no_kernels_for(change):
    layer, problem = layer_and_problem()
    before = state_of(layer)
    with pytest.raises(ArgumentError, match="allowed: float16, bfloat16, float32"):
        change(layer)
    assert layer.config == problem.config
    assert same(state_of(layer), before)


def test_integers_stay_what_they_are():
    fields = {"A_dtype": "int8", "W_dtype": "int8", "accum_dtype": "int32", "out_dtype": "int32", "with_zeros": False}
    layer, problem = layer_and_problem(**fields)
    before = state_of(layer)
    for change in ("half", "bfloat16", "float"):
        getattr(layer, change)()
        assert layer.config == problem.config
        assert same(state_of(layer), before)  # float32 scales lose nothing on their way


def test_a_native_weight_changes_with_the_layer():
    layer, problem = layer_and_problem(**KINDS["native"])
    layer.float()
    assert (layer.W_dtype, layer.A_dtype, layer.weight.dtype) == ("float32", "float32", torch.float32)
    assert torch.equal(layer.state_dict()["weight"], problem.weights.float())
    layer.half()
    assert torch.equal(layer.state_dict()["weight"], problem.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_to_meta_and_among_machines(machine, kind):
    layer, _ = layer_and_problem(cfg=config(**KINDS[kind]))
    before = state_of(layer)
    for target in (*TARGETS, None):
        machine(target)
        other = pickle.loads(pickle.dumps(layer))
        assert str(other.bitblas_matmul.target) == str(portable.target_of(torch.device("cpu")))
        assert same(state_of(other), before)
        layer = other
    layer.to("meta")
    assert all(tensor.is_meta for tensor in layer.buffers())
    assert {name: t.shape for name, t in layer.state_dict().items()} == {name: t.shape for name, t in before.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_moving_lays_out_again(machine, target):
    """A move from a machine to another is a change of device, from meta in this test: `to_empty` and filling."""
    cfg = config(**KINDS["floats"])
    machine(target)
    source = layers.build(cfg, device="meta").to_empty(device="cpu")
    layer, problem = layer_and_problem(cfg=cfg)
    assert source.bitblas_matmul is layer.bitblas_matmul
    source.load_state_dict(layer.state_dict())
    machine(None)
    for change in ("float", "bfloat16", "half"):  # each chooses the operator of this machine anew
        getattr(source, change)()
        assert source.bitblas_matmul.target == portable.target_of(torch.device("cpu"))
        assert torch.equal(source.bitblas_matmul.unpack_weight(source.qweight).long(), problem.codes)


def test_shared_memory():
    layer, _ = layer_and_problem()
    before = state_of(layer)
    layer.share_memory()
    assert all(tensor.is_shared() for tensor in layer.buffers())
    assert same(state_of(layer), before)


# -- copies ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["floats", "int8", "odd", "native"])
def test_copies(how, kind, parameter):
    layer, _ = layer_and_problem(cfg=config(**KINDS[kind]))
    name = "weight" if kind in ("native", "int8") else "qweight"
    layer.perm = torch.randperm(layer.in_features, dtype=torch.int32)
    if parameter:
        tensor = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    before = state_of(layer)
    model = torch.nn.Sequential(layer).eval()
    model[0].note = "kept"
    other = COPIES[how](model)[0] if how != "copy" else copy.copy(layer)
    assert same(state_of(other), before)
    assert same(state_of(layer), before)
    assert type(other) is bitblas.Linear
    assert other.bitblas_matmul is layer.bitblas_matmul
    assert (other.note, other.training) == ("kept", False)
    assert torch.equal(getattr(other, name), getattr(layer, name))
    if how != "copy":
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(other.buffers(), layer.buffers(), strict=True))
        for tensor in other.buffers():
            tensor.zero_()
        assert same(state_of(layer), before)


def test_a_layer_that_stands_twice_is_copied_once():
    layer, _ = layer_and_problem()
    for model in (copy.deepcopy(torch.nn.ModuleList([layer, layer])), saved(torch.nn.ModuleList([layer, layer]))):
        assert model[0] is model[1]
