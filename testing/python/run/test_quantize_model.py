"""Dense layers and models that are quantized, and layers repacked from GPTQ's."""

import copy
import sys

import pytest
import torch

import bitblas
import foreign
from bitblas import ArgumentError, ConfigError, logs
from bitblas.ops import operator
from layers import config


def dense(k=64, n=32, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(k, n, bias, dtype=dtype)


class Block(torch.nn.Module):
    """Part of a model: nested layers, one of them in two places, one of another shape."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.ModuleDict({"q": dense(seed=1, n=64), "k": dense(seed=2, n=64)})
        self.mlp = torch.nn.Sequential(dense(seed=3), torch.nn.ReLU(), dense(32, 64, seed=4))
        self.tied = self.mlp[0]
        self.norm = torch.nn.LayerNorm(64)
        self.lm_head = dense(64, 10, seed=5)

    def forward(self, x):
        x = x + torch.tanh(self.attention["q"](x)) * self.attention["k"](x)
        return self.lm_head(self.norm(self.mlp(x) + self.mlp[2](self.tied(x))))


def kinds(model):
    return {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}


# -- one layer -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group", "symmetric"),
    [("uint4", 16, None), ("uint4", -1, True), ("int4", 32, None), ("int8", -1, None), ("nf4", 16, None), ("uint2", 8, None),
     ("int4", 16, False), ("float8_e4m3", -1, None)],
)  # fmt: skip
def test_a_layer(name, group, symmetric):
    linear = dense()
    layer = bitblas.Linear.from_linear(linear, name, group, symmetric, opt_M=[1])
    assert (layer.W_dtype, layer.group_size) == (name, group)
    assert (layer.A_dtype, layer.out_dtype, layer.accum_dtype) == ("float32", "float32", "float32")
    weight = layer.to_quantized().dequantize().double()
    groups = linear.weight.detach().double().view(32, -1, 64 if group == -1 else group)
    step = {"uint4": 15, "int4": 15, "int8": 255, "uint2": 3, "nf4": 6, "float8_e4m3": 8}[name]
    allowed = (2 * groups.abs().amax(2, keepdim=True) / step).expand_as(groups).reshape(32, 64)
    assert ((weight - linear.weight.double()).abs() <= 1.01 * allowed).all()
    x = torch.randn(5, 64)
    exact = x.double() @ weight.T + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_the_layer(dtype):
    linear = dense(dtype=dtype, bias=False)
    layer = bitblas.Linear.from_linear(linear, opt_M=[1])
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype is dtype
    assert layer.scales.dtype is dtype
    assert layer.bias is None
    wide = bitblas.Linear.from_linear(linear, A_dtype="float32", out_dtype="float32", opt_M=[1])
    torch.testing.assert_close(wide.to_quantized().dequantize(), layer.to_quantized().dequantize())


def test_int8_activations():
    layer = bitblas.Linear.from_linear(dense(), "int4", A_dtype="int8", opt_M=[1])
    assert layer.out_dtype == "float32"
    a = torch.randint(-128, 128, (3, 64), dtype=torch.int8)
    exact = a.double() @ layer.to_quantized().dequantize().double().T + layer.bias.double()
    torch.testing.assert_close(layer(a).double(), exact, rtol=1e-5, atol=1e-3)


def test_what_cannot_be_quantized():
    linear = dense()
    with pytest.raises(ArgumentError, match="group_size is 48"):
        bitblas.Linear.from_linear(linear, group_size=48)
    with pytest.raises(ConfigError, match="uint9"):
        bitblas.Linear.from_linear(linear, "uint9")
    with pytest.raises(ArgumentError, match="float16"):
        bitblas.Linear.from_linear(linear, "float16")
    linear.weight.data[3, 4] = torch.nan
    with pytest.raises(ArgumentError, match="nan"):
        bitblas.Linear.from_linear(linear)


# -- a model ---------------------------------------------------------------------------------------------------------------


def test_a_model():
    model = Block().eval()
    model.mlp.train()
    reference = copy.deepcopy(model)
    assert bitblas.quantize_(model, "uint8", 16, opt_M=[1]) is model
    assert kinds(model) == {
        "attention.q": "Linear", "attention.k": "Linear", "mlp.0": "Linear", "mlp.2": "Linear", "lm_head": "Linear"
    }  # fmt: skip
    for name, module in model.named_modules():
        if name.startswith(("attention.", "mlp.")) and "Linear" in type(module).__name__:
            assert type(module) is bitblas.Linear
            assert module.training == name.startswith("mlp.")
            assert (module.W_dtype, module.group_size) == ("uint8", 16)
    assert model.tied is model.mlp[0]
    assert type(model.lm_head) is torch.nn.Linear
    for name in ("attention.q", "attention.k", "mlp.0", "mlp.2"):  # what the model would be with these weights
        reference.get_submodule(name).weight.data = model.get_submodule(name).to_quantized().dequantize()
    x = torch.randn(7, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), set()),
        (("lm_head",), {"lm_head"}),
        (("attention.*", "*head"), {"attention.q", "attention.k", "lm_head"}),
        (["*.?"], {"attention.q", "attention.k", "mlp.0", "mlp.2"}),
        (("*",), {"attention.q", "attention.k", "mlp.0", "mlp.2", "lm_head", "tied"}),
    ],
    ids=["none", "head", "several", "characters", "all"],
)
def test_layers_are_left_out_by_pattern(exclude, left):
    model = bitblas.quantize_(Block(), group_size=-1, exclude=exclude, build=False)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name for name, module in modules.items() if type(module) is torch.nn.Linear}
    assert found == left


def test_operators_of_equal_shape_are_built_once(monkeypatch, store):
    built, real = [], operator.provide
    monkeypatch.setattr(operator, "provide", lambda plan: (built.append(plan), real(plan))[1])
    model = torch.nn.Sequential(*(dense(24, 24, bias=False, seed=i) for i in range(5)), dense(24, 48, bias=False))
    bitblas.quantize_(model, group_size=8, opt_M=[1])
    assert sorted(plan.config.N for plan in built) == [24, 48]
    assert model[0].bitblas_matmul is model[4].bitblas_matmul
    assert model[0].bitblas_matmul.origin == "compiled"
    model(torch.randn(2, 24))
    assert len(built) == 2
    later = bitblas.quantize_(torch.nn.Sequential(dense(24, 72)), group_size=8, opt_M=[1], build=False)
    assert len(built) == 2
    assert later[0].bitblas_matmul.origin == "not built"


def test_a_shape_that_does_not_fit_changes_nothing():
    model = Block()
    before = kinds(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for group, name in ((64, r"mlp\.2 has 32 in_features"), (48, r"attention\.q has 64 in_features")):
        with pytest.raises(ArgumentError, match=f"{name}, which group_size {group} does not divide"):
            bitblas.quantize_(model, group_size=group)
    assert kinds(model) == before
    assert all(type(m) is not bitblas.Linear for m in model.modules())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("group", [0, -2, 2.0, "16", None, True])
def test_a_group_size_that_is_none(group):
    model = Block()
    with pytest.raises(ArgumentError, match="group_size"):
        bitblas.quantize_(model, group_size=group)
    assert all(type(m) is not bitblas.Linear for m in model.modules())


def test_errors_name_the_layer():
    model = Block()
    model.mlp[2].weight.data[0, 0] = torch.inf
    with pytest.raises(ArgumentError, match=r"^mlp\.2: .*inf"):
        bitblas.quantize_(model, group_size=-1, build=False)
    with pytest.raises(ConfigError, match=r"^attention\.q: .*uint9"):
        bitblas.quantize_(Block(), "uint9", group_size=-1)


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="exclude is 'lm_head'; it must be a sequence of patterns"):
        bitblas.quantize_(Block(), exclude="lm_head")
    with pytest.raises(ArgumentError, match=r"model is a torch\.nn\.Linear itself"):
        bitblas.quantize_(dense())


def test_weights_are_freed_as_they_are_replaced(monkeypatch):
    """While a layer is quantized, no more than its own dense weight is there beside those still to come."""
    import weakref

    model = torch.nn.Sequential(*(dense(seed=i) for i in range(4)))
    seen, alive = [weakref.ref(layer.weight) for layer in model], []
    real = bitblas.Linear.from_linear
    monkeypatch.setattr(
        bitblas.Linear, "from_linear",
        lambda *a, **k: (alive.append(sum(ref() is not None for ref in seen)), real(*a, **k))[1],
    )  # fmt: skip
    bitblas.quantize_(model, group_size=-1, build=False)
    assert alive == [4, 3, 2, 1]
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(monkeypatch, capsys, terminal):
    monkeypatch.setattr(logs, "_PATIENCE_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    bitblas.quantize_(Block(), group_size=-1, opt_M=[1])
    shown = capsys.readouterr().err
    assert ("quantizing" in shown) == terminal
    assert terminal or not shown


# -- repacking -------------------------------------------------------------------------------------------------------------


def quant_linear(codes, zeros, scales, bits, version, g_idx=None, bias=None):
    """A module such as AutoGPTQ's, packed from the format's documentation."""
    module = torch.nn.Module()
    for name, tensor in foreign.pack_gptq(codes, zeros, scales, bits, version, g_idx).items():
        module.register_buffer(name, tensor)
    module.bits, module.bias = bits, bias
    return module


@pytest.mark.parametrize("mode", ["quantized", "original", "rescale"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_repacking(version, act_order, mode):
    codes, zeros, scales, g_idx = foreign.draw(32, 64, 4, 4, act_order)
    bias = torch.randn(32).half()
    module = quant_linear(codes, zeros, scales, 4, version, g_idx, bias)
    cfg = config(A_dtype="float16", out_dtype="float32", zeros_mode=mode)
    layer = bitblas.Linear(
        64, 32, True, "float16", "uint4", "float32", "float32", 16, True, True, mode, opt_M=list(cfg.M), act_order=False
    )
    (layer.repack_from_gptq if version == 1 else layer.repack_from_gptq_v2)(module)
    assert (layer.perm is not None) == act_order
    q, z = torch.from_numpy(codes).double(), torch.from_numpy(zeros).double()
    s = torch.from_numpy(scales).half().double()
    groups = torch.arange(64) // 16 if g_idx is None else torch.from_numpy(g_idx).long()
    weight = (q - z[:, groups]) * s[:, groups]
    x = torch.randn(5, 64).half()
    exact = x.double() @ weight.T + bias.double()
    size = x.double().abs() @ ((q + z[:, groups]) * s[:, groups]).abs().T
    rounding = 2.0**-11 if mode == "rescale" else 2.0**-20  # w·s - z holds the product z·s in float16
    assert ((layer(x).double() - exact).abs() <= rounding * size).all()
    other = bitblas.Linear(64, 32, True, "float16", "uint4", "float32", "float32", 16, True, True, mode, opt_M=[1])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_repacking_what_does_not_fit():
    codes, zeros, scales, _ = foreign.draw(32, 64, 4, 4, False)
    module = quant_linear(codes, zeros, scales, 4, 1)
    layer = bitblas.Linear(64, 32, False, "float16", "uint4", "float32", "float32", 32, True, True, "quantized")
    with pytest.raises(ArgumentError, match=r"groups of 16.*takes.*groups of 32"):
        layer.repack_from_gptq(module)
    del module.scales
    with pytest.raises(ArgumentError, match="scales"):
        layer.repack_from_gptq(module)
