"""What BitLinear is given: errors of its constructors and calls, ready codes, and whole models. Nothing is built here."""

import copy

import pytest
import torch

import bitblas
import reference
from bitblas import ArgumentError, BitLinear, ConfigError
from bitblas.codecs import QuantizedWeight
from ternary import SCHEMES, make, same, state_of


def named(*cases):
    """Cases with their messages for names."""
    return [pytest.param(*case, id=case[-1]) for case in cases]


# -- the constructor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features is 0"),
        ({"in_features": 2.0}, "in_features is 2.0"),
        ({"out_features": -1}, "out_features is -1"),
        ({"out_features": True}, "out_features is True"),
        ({"bias": "yes"}, "bias is 'yes'"),
        *(
            ({"eps": eps}, f"^eps is {eps!r}; it must be a number from")
            for eps in (None, "1e-6", True, 0.0, -1.0, 1e-40)
        ),
        ({"eps": float("nan")}, "^eps is nan"),
        ({"eps": float("inf")}, "^eps is inf"),
        ({"eps": 2.0**127}, "^eps is 1.7"),
        ({"quant_type": "wpt"}, "quant_type is 'wpt'; allowed: 'ai8pc_wpt'"),
        ({"quant_type": None}, "quant_type is None; allowed"),
        ({"quant_type": "ai8pc_wpg0"}, "quant_type is 'ai8pc_wpg0'; allowed"),
        ({"quant_type": "ai8pc_wpg-1"}, "quant_type is 'ai8pc_wpg-1'; allowed"),
        ({"quant_type": "ai8pc_wpc "}, "quant_type is 'ai8pc_wpc '; allowed"),
        ({"quant_type": "ai8pc_wpg3"}, "quant_type is 'ai8pc_wpg3'; its groups of 3 do not divide in_features 64"),
        ({"quant_type": "ai8pc_wpg"}, "quant_type is 'ai8pc_wpg'; its groups of 128 do not divide in_features 64"),
        ({"dtype": torch.float64}, "dtype is torch.float64; allowed: float16, bfloat16, float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
    ids=str,
)
def test_the_constructor_names_what_is_wrong(options, message):
    with pytest.raises(ConfigError, match=message):
        BitLinear(**{"in_features": 64, "out_features": 32, **options})


def test_devices_and_dtypes_are_torchs_where_none_are_given():
    with torch.device("meta"):
        layer = BitLinear(64, 32)
        assert layer.weight.is_meta
        assert layer.bias.is_meta
        assert BitLinear(64, 32, device="cpu").device.type == "cpu"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert BitLinear(64, 32).weight.dtype is torch.bfloat16
        assert BitLinear(64, 32, dtype=torch.float16).bias.dtype is torch.float16
        torch.set_default_dtype(torch.float64)
        with pytest.raises(ConfigError, match=r"dtype is torch\.float64"):
            BitLinear(64, 32)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_eps": "x"}, "activation_eps is 'x'"),
        ({"activation_eps": -1.0}, "activation_eps is -1.0"),
        ({"activation_eps": 1e-40}, "activation_eps is 1e-40; it must be a number from 2\\^-119"),
        ({"dynamic_quantization": None}, "activation_eps is 1e-06, but nothing is quantized"),
    ],
    ids=str,
)
def test_the_eps_of_other_layers(options, message):
    given = {"W_dtype": "int4", "activation_eps": 1e-6, "dynamic_quantization": "row", **options}
    with pytest.raises(ConfigError, match=message):
        bitblas.Linear(64, 32, **given)
    assert (
        bitblas.Linear(64, 32, **{**given, "activation_eps": 1e-3, "dynamic_quantization": "row"}).config.activation_eps
        == 1e-3
    )


# -- from_linear, calls in training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((torch.nn.Conv2d(1, 1, 1),), ArgumentError, "linear is a Conv2d; it must be a torch.nn.Linear"),
        ((None,), ArgumentError, "linear is a NoneType"),
        ((torch.nn.Linear(4, 4, dtype=torch.float64),), ConfigError, "dtype is torch.float64"),
        ((torch.nn.Linear(4, 4), "wpt"), ConfigError, "quant_type is 'wpt'"),
        ((torch.nn.Linear(4, 4), "ai8pc_wpt", 0), ConfigError, "eps is 0"),
    ],
    ids=str,
)
def test_linear_layers_that_it_is_not_made_of(given, error, message):
    with pytest.raises(error, match=message):
        BitLinear.from_linear(*given)


@pytest.mark.parametrize(
    ("given", "message"),
    named(
        ((torch.zeros(3, 63),), r"A is \(3, 63\); it must be a tensor whose last dimension is K = 64"),
        ((torch.zeros(()),), "K = 64"),
        (([[0.0] * 64],), "A is list"),
        ((None,), "A is NoneType"),
        ((torch.zeros(3, 64, dtype=torch.float16),), "A is torch.float16 on cpu; the layer takes torch.float32 on cpu"),
        ((torch.zeros(3, 64, dtype=torch.int64),), "A is torch.int64"),
        ((torch.zeros(3, 64, device="meta"),), "A is torch.float32 on meta"),
        ((torch.zeros(3, 64), torch.zeros(3, 32)), "output was given; a layer fills it when it is deployed"),
    ),
)
def test_wrong_activations_in_training(given, message):
    with pytest.raises(ArgumentError, match=message):
        make()(*given)


@pytest.mark.parametrize("name", ["to_quantized", "load_packed_", "warmup"])
def test_what_a_layer_in_training_has_not(name):
    with pytest.raises(ArgumentError, match=r"the layer is in training; deploy\(\) packs its weight"):
        getattr(make(), name)()


def test_what_a_deployed_layer_has_not():
    layer = make().deploy()
    with pytest.raises(ArgumentError, match="the layer is deployed: it has no parameters"):
        layer.reset_parameters()
    with pytest.raises(ArgumentError, match=r"weight of a quantized layer was asked for sum"):
        layer.weight.sum()
    assert (layer.weight.shape, layer.weight.dtype) == ((32, 64), torch.float32)


# -- from_ternary ----------------------------------------------------------------------------------------------------------


def ready_codes(N=32, K=64):
    return torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(3))


KINDS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", [*KINDS, torch.float8_e4m3fn], ids=str)
def test_codes_of_any_dtype(dtype):
    codes = ready_codes(17, 33)
    layer = BitLinear.from_ternary(codes.to(dtype), 0.5)
    assert layer.deployed
    assert torch.equal(layer.state_dict()["w_packed"], reference.pack_bits(codes + 2, 2))
    assert (layer.in_features, layer.out_features, layer.bias) == (33, 17, None)
    for unsigned in (torch.uint8, torch.bool):
        layer = BitLinear.from_ternary(codes.abs().to(unsigned))
        assert torch.equal(layer.state_dict()["w_packed"], reference.pack_bits(codes.abs() + 2, 2))


@pytest.mark.parametrize(
    ("scale", "quant_type", "shape"),
    [
        (None, "ai8pc_wpt", (1,)),
        (2, "ai8pc_wpt", (1,)),
        (-0.25, "ai8pc_wpt", (1,)),
        (torch.tensor(0.5), "ai8pc_wpt", (1,)),
        (torch.tensor([0.5], dtype=torch.float64), "ai8pc_wpt", (1,)),
        (torch.tensor([[2]]), "ai8pc_wpt", (1,)),
        (torch.full((32, 1), 0.5), "ai8pc_wpt", (1,)),
        (torch.arange(1.0, 33), "ai8pc_wpc", (32, 1)),
        (torch.arange(1.0, 33)[:, None], "ai8pc_wpc", (32, 1)),
        (torch.arange(1.0, 33, dtype=torch.float64), "ai8pc_wpc", (32, 1)),
        (torch.rand(32, 4), "ai8pc_wpg16", (32, 4)),
        (torch.rand(32, 64), "ai8pc_wpg1", (32, 64)),
        (torch.nn.Parameter(torch.rand(4, 32).T), "ai8pc_wpg16", (32, 4)),
    ],
    ids=range(13),
)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_scales_of_every_shape(scale, quant_type, shape, dtype):
    layer = BitLinear.from_ternary(ready_codes(), scale, torch.ones(32), eps=1e-3, dtype=dtype)
    assert (layer.quant_type, layer.eps) == (quant_type, 1e-3)
    assert tuple(layer.w_scale.shape) == shape
    dtype = dtype or torch.float32
    held = torch.float32 if quant_type == "ai8pc_wpt" else dtype
    assert (layer.w_scale.dtype, layer.bias.dtype, layer.weight.dtype) == (held, dtype, dtype)
    given = torch.as_tensor(1.0 if scale is None else scale).detach()
    assert torch.equal(
        layer.w_scale, given.reshape(-1)[: shape[0] if len(shape) == 1 else None].reshape(shape).to(held)
    )
    assert not any(tensor.requires_grad for tensor in layer.buffers())


def test_the_dtype_is_that_of_the_scale():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert BitLinear.from_ternary(ready_codes(), torch.rand(32).to(dtype)).config.A_dtype == str(dtype)[6:]
    assert BitLinear.from_ternary(ready_codes(), torch.rand(32).double()).config.A_dtype == "float32"
    codes = ready_codes()
    with torch.device("meta"):  # of no account
        assert BitLinear.from_ternary(codes, 1.0).device.type == "cpu"
    assert BitLinear.from_ternary(ready_codes(), device="meta").w_packed.is_meta


def test_what_is_given_is_copied():
    scale, bias = torch.rand(32), torch.rand(32)
    layer = BitLinear.from_ternary(ready_codes(), scale, bias)
    before = state_of(layer)
    scale.zero_()
    bias.zero_()
    assert same(state_of(layer), before)


def wrong_codes():
    codes = ready_codes()
    bad = codes.clone()
    bad[31, 63] = 2
    return [
        (codes.tolist(), "codes is a list; it must be a torch.Tensor or a QuantizedWeight"),
        (None, "codes is a NoneType"),
        (codes[0], r"codes have shape \(64,\); expected \(out_features, in_features\)"),
        (codes[None], r"codes have shape \(1, 32, 64\)"),
        (codes[:0], r"codes have shape \(0, 64\)"),
        (bad, "codes hold other values than -1, 0 and 1"),
        (-bad, "codes hold other values"),
        (bad * 127, "codes hold other values"),
        (codes / 2, "codes hold other values"),
        (codes * torch.nan, "codes hold other values"),
        (codes.to(torch.uint8), "codes hold other values"),  # 255 is no -1
        (codes.cfloat(), "codes are torch.complex64"),
        (codes.to_sparse(), "codes are torch.int64, torch.sparse_coo"),
        (codes.to("meta"), "codes are torch.int64, torch.strided on meta"),
    ]


@pytest.mark.parametrize(("codes", "message"), [pytest.param(*row, id=row[1]) for row in wrong_codes()])
def test_codes_that_are_not_ternary(codes, message):
    with pytest.raises(ArgumentError, match=message):
        BitLinear.from_ternary(codes)


@pytest.mark.parametrize(
    ("options", "message"),
    named(
        ({"scale": "x"}, "scale is a str; it must be a number or a torch.Tensor"),
        ({"scale": True}, "scale is a bool"),
        ({"scale": [1.0] * 32}, "scale is a list"),
        ({"scale": float("nan")}, "scale holds a NaN"),
        ({"scale": 1e300}, "a number that float32 does not"),
        ({"scale": torch.full((32, 4), float("inf"))}, "an infinity"),
        (
            {"scale": torch.rand(31)},
            r"scale has shape \(31,\); expected one number, \(32,\), \(32, 1\), or \(32, a divisor of 64\)",
        ),
        ({"scale": torch.rand(64)}, r"scale has shape \(64,\)"),
        ({"scale": torch.rand(32, 3)}, r"scale has shape \(32, 3\)"),
        ({"scale": torch.rand(32, 0)}, r"scale has shape \(32, 0\)"),
        ({"scale": torch.rand(0)}, r"scale has shape \(0,\)"),
        ({"scale": torch.rand(32, 1, 1)}, r"scale has shape \(32, 1, 1\)"),
        ({"scale": torch.arange(32)}, "w_scale is torch.int64"),
        (
            {"scale": torch.arange(32) * 1e4, "dtype": torch.float16},
            "w_scale holds 70000, which torch.float16 does not",
        ),
        ({"bias": torch.rand(31)}, r"bias is torch.float32 \(31,\); expected torch.float32 \(32,\)"),
        ({"bias": torch.arange(32)}, "bias is torch.int64"),
        ({"bias": [0.0] * 32}, "bias is a list; it must be a torch.Tensor or None"),
        ({"bias": torch.full((32,), 1e6), "dtype": torch.float16}, r"bias holds 1e\+06"),
    ),
)
def test_what_does_not_go_with_codes(options, message):
    with pytest.raises(ArgumentError, match=message):
        BitLinear.from_ternary(ready_codes(), **options)


def test_values_of_the_constructor_beside_codes():
    for options, message in (({"eps": None}, "eps is None"), ({"dtype": torch.float64}, r"dtype is torch\.float64")):
        with pytest.raises(ConfigError, match=message):
            BitLinear.from_ternary(ready_codes(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_to_the_canonical_form_and_back(quant_type, dtype):
    layer = make(quant_type=quant_type, dtype=dtype).deploy()
    weight = layer.to_quantized()
    assert (weight.W_dtype, weight.zeros, weight.perm) == ("int2", None, None)
    assert torch.equal(weight.packed, layer.state_dict()["w_packed"])
    assert torch.equal(weight.bias, layer.bias)
    again = BitLinear.from_ternary(weight, dtype=dtype)
    assert (again.quant_type, again.config) == (layer.quant_type, layer.config)
    assert same(state_of(again), state_of(layer))
    assert again.bias.data_ptr() != layer.bias.data_ptr()
    other = BitLinear.from_ternary(weight, 3.0, torch.zeros(32), dtype=dtype)
    assert (other.quant_type, other.w_scale.item(), float(other.bias.abs().sum())) == ("ai8pc_wpt", 3.0, 0.0)


def test_canonical_weights_that_are_not_ternary():
    packed = reference.pack_bits(ready_codes() + 2, 2)
    with pytest.raises(ArgumentError, match="codes hold other values than -1, 0 and 1"):
        BitLinear.from_ternary(QuantizedWeight("int2", packed & 0, 64, torch.ones(32, 1)))
    for changed in (
        QuantizedWeight("uint2", packed, 64, torch.ones(32, 1)),
        QuantizedWeight("uint2", packed, 64, torch.ones(32, 1), torch.ones(32, 1)),
        QuantizedWeight("int2", packed, 64, torch.ones(32, 1), perm=torch.arange(64, dtype=torch.int32)),
    ):
        with pytest.raises(ArgumentError, match="it must be int2, without zero points and order"):
            BitLinear.from_ternary(changed)


# -- whole models ----------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Nested layers, one that stands twice, a tied weight, and a head."""

    def __init__(self, K=64):
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64, bias=False))
        self.again = self.block[0]
        self.tied = torch.nn.Linear(64, 64)
        self.tied.weight = self.block[2].weight
        self.lm_head = torch.nn.Linear(K, 8)


def test_a_model_is_made_ternary():
    net = Net().eval()
    net.block[2].train()
    weights = dict(net.named_parameters(remove_duplicate=False))
    assert bitblas.ternarize_(net, "ai8pc_wpg16", 1e-4) is net
    assert type(net.lm_head) is torch.nn.Linear
    assert all(type(layer) is BitLinear for layer in (net.block[0], net.block[2], net.again, net.tied))
    assert net.again is net.block[0]
    assert net.tied.weight is net.block[2].weight
    assert (net.tied.quant_type, net.tied.eps, net.tied.training, net.block[2].training) == (
        "ai8pc_wpg16",
        1e-4,
        False,
        True,
    )
    after = dict(net.named_parameters(remove_duplicate=False))
    assert after.keys() == weights.keys()
    assert all(after[name] is parameter for name, parameter in weights.items())


def test_layers_are_left_out_by_name():
    net = bitblas.ternarize_(Net(), exclude=["block.?"])
    assert [name for name, layer in net.named_modules() if type(layer) is BitLinear] == ["again", "tied", "lm_head"]
    assert [name for name, layer in net.named_modules() if type(layer) is torch.nn.Linear] == ["block.0", "block.2"]
    assert type(bitblas.ternarize_(Net(), exclude=()).lm_head) is BitLinear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant_type": "wpt"}, ConfigError, "quant_type is 'wpt'"),
        ({"eps": None}, ConfigError, "eps is None"),
        ({"exclude": "lm_head"}, ArgumentError, "exclude is 'lm_head'; it must be a sequence of patterns"),
        (
            {"quant_type": "ai8pc_wpg16", "exclude": ()},
            ConfigError,
            "^lm_head: quant_type is 'ai8pc_wpg16'; its groups of 16 do not",
        ),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_left_as_it_is(options, error, message):
    net = Net(K=40)
    with pytest.raises(error, match=message):
        bitblas.ternarize_(net, **options)
    assert not any(isinstance(layer, BitLinear) for layer in net.modules())


def test_a_layer_alone_is_no_model():
    with pytest.raises(ArgumentError, match=r"model is a torch\.nn\.Linear itself.*BitLinear\.from_linear"):
        bitblas.ternarize_(torch.nn.Linear(4, 4))


def test_a_model_is_deployed():
    net = bitblas.ternarize_(Net())
    names = ("block.0", "block.2", "tied")
    expected = {name: state_of(copy.deepcopy(net.get_submodule(name)).deploy()) for name in names}
    assert bitblas.deploy(net, build=False) is net
    assert net.again is net.block[0]
    assert all(same(state_of(net.get_submodule(name)), expected[name]) for name in names)
    assert [name for name, _ in net.named_parameters()] == ["lm_head.weight", "lm_head.bias"]
    assert net.block[0].bitblas_matmul is net.tied.bitblas_matmul
    assert bitblas.deploy(net, build=False) is net  # which changes nothing


def test_kernels_are_built_when_asked_for(monkeypatch):
    built = []
    monkeypatch.setattr("bitblas.nn.replace.build_operators", lambda operators: built.extend(operators))
    net = bitblas.ternarize_(Net())
    bitblas.deploy(net, build=False)
    assert not built
    bitblas.deploy(net)
    assert set(built) == {net.block[0].bitblas_matmul, net.block[2].bitblas_matmul, net.tied.bitblas_matmul}


def test_a_model_without_such_layers():
    with pytest.raises(ArgumentError, match="the ReLU has no BitLinear layer: ternarize_ makes some"):
        bitblas.deploy(torch.nn.ReLU())


def test_deploying_names_the_layer():
    net = bitblas.ternarize_(Net())
    with torch.no_grad():
        net.block[2].weight[3, 4] = torch.nan
    before = state_of(net.block[2])
    with pytest.raises(ArgumentError, match=r"^block\.2: the weight holds a NaN or an infinity"):
        bitblas.deploy(net, build=False)
    assert net.block[0].deployed
    assert not net.block[2].deployed
    assert not net.tied.deployed
    assert state_of(net.block[2]).keys() == before.keys()
    layer = make()
    assert bitblas.deploy(layer, build=False) is layer
    assert layer.deployed
