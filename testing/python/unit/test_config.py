"""`MatmulConfig`: the question, as callers ask it."""

import copy
import dataclasses
import inspect
import json
import pickle
import re

import numpy as np
import pytest
import torch

from bitblas.config import A_DTYPES, DEFAULT_BUCKETS, MatmulConfig
from bitblas.errors import ConfigError
from bitblas.formats import ALIASES, FORMATS

POSITIONS = [
    "M", "N", "K", "A_dtype", "W_dtype", "out_dtype", "accum_dtype", "layout", "with_bias", "group_size", "with_scaling",
    "with_zeros", "zeros_mode", "storage_dtype", "fast_decoding", "propagate_a", "propagate_b", "optimize_stratety",
]  # fmt: skip
HINTS = POSITIONS[13:]
FLOATS = ("float16", "bfloat16", "float32")


def config(**fields):
    return MatmulConfig(**{"M": 1, "N": 32, "K": 64, **fields})


def test_positional_order():
    assert list(inspect.signature(MatmulConfig).parameters)[: len(POSITIONS)] == POSITIONS
    values = (
        [1, 16], 32, 64, "bfloat16", "uint4", "float32", "float32", "nt",
        True, 16, True, True, "rescale", "int8", False, 0, 0, 0,
    )  # fmt: skip
    found = MatmulConfig(*values)
    assert [getattr(found, name) for name in POSITIONS] == [(1, 16), *values[1:]]


def test_defaults():
    found = MatmulConfig(N=32, K=64)
    assert (found.A_dtype, found.W_dtype, found.out_dtype, found.accum_dtype) == ("float16",) * 4
    assert (found.layout, found.group_size, found.zeros_mode) == ("nt", -1, "original")
    assert (found.with_bias, found.with_scaling, found.with_zeros) == (False, False, False)


@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32", "int8"])
def test_weights_are_as_the_activations_by_default(a_dtype):
    assert config(A_dtype=a_dtype).W_dtype == a_dtype
    assert config(A_dtype=a_dtype, W_dtype=None) == config(A_dtype=a_dtype, W_dtype=a_dtype)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_size", -1),
        ("with_bias", False),
        ("with_scaling", False),
        ("with_zeros", False),
        ("zeros_mode", "original"),
    ],
)
def test_none_is_the_default(name, value):
    found = config(**{name: None})
    assert getattr(found, name) == value
    assert type(getattr(found, name)) is type(value)
    assert found == config()
    assert hash(found) == hash(config())


def test_no_rows_named():
    assert DEFAULT_BUCKETS == (1, 16, 32, 64, 128, 256, 512, 1024)
    found = [config(M=None), MatmulConfig(N=32, K=64), config(M=list(DEFAULT_BUCKETS)), config(M=DEFAULT_BUCKETS)]
    assert all(f == found[0] and hash(f) == hash(found[0]) and f.M == DEFAULT_BUCKETS for f in found)
    assert found[0].is_dynamic


def test_rows():
    assert config(M=[64, 1, 64]).M == (64, 1, 64)
    assert config(M=[64, 1, 64]).buckets == (1, 64)
    assert config(M=[16]).is_dynamic
    assert config(M=(1, 16)) == config(M=[1, 16])
    assert config(M=16) != config(M=[16])
    assert not config(M=16).is_dynamic
    assert config(M=16).buckets == (16,)


@pytest.mark.parametrize("kind", [np.int64, np.int32, int])
def test_any_integer_becomes_an_int(kind):
    found = MatmulConfig(M=kind(4), N=kind(32), K=kind(64), group_size=kind(16))
    assert all(type(getattr(found, name)) is int for name in ("M", "N", "K", "group_size"))
    assert found == MatmulConfig(4, 32, 64, group_size=16)
    assert type(config(M=[kind(1), kind(2)]).M[0]) is int


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_name_the_same_config(alias):
    assert config(W_dtype=alias) == config(W_dtype=ALIASES[alias])


@pytest.mark.parametrize(
    ("alias", "name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("half", "float16")]
)
def test_aliases_of_activations(alias, name):
    short = config(A_dtype=alias, out_dtype=alias, accum_dtype=alias)
    assert short == config(A_dtype=name, out_dtype=name, accum_dtype=name)
    assert short.A_dtype == short.W_dtype == short.out_dtype == short.accum_dtype == name


def test_torch_dtypes_name_the_same_config():
    found = config(A_dtype=torch.bfloat16, W_dtype=torch.int8, out_dtype=torch.float32, accum_dtype=torch.float32)
    assert found == config(A_dtype="bfloat16", W_dtype="int8", out_dtype="float32", accum_dtype="float32")


def test_bias_is_another_name():
    assert config(bias=True) == config(with_bias=True)
    assert config(bias=True).with_bias is True
    assert config(bias=None) == config(bias=False) == config()


def test_flags_become_bools():
    found = config(with_bias=1, with_scaling=1, with_zeros=0)
    assert (found.with_bias, found.with_scaling, found.with_zeros) == (True, True, False)
    assert found == config(with_bias=True, with_scaling=True)


@pytest.mark.parametrize("name", HINTS)
def test_hints_do_not_shape_the_result(name):
    assert config(**{name: True}).fields() == config().fields()


def test_fields_are_json():
    found = config(M=[1, 16], W_dtype="uint4", with_scaling=True, group_size=16).fields()
    assert json.loads(json.dumps(found)) == found
    assert set(POSITIONS) - set(HINTS) <= set(found)


@pytest.mark.parametrize(
    "change",
    [{"M": 2}, {"N": 33}, {"K": 128}, {"A_dtype": "float32"}, {"W_dtype": "uint2"}, {"out_dtype": "float32"},
     {"accum_dtype": "float32"}, {"with_bias": True}, {"group_size": 32}, {"with_scaling": True}, {"with_zeros": True},
     {"zeros_mode": "rescale"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_each_field_tells_configs_apart(change):
    base = {"W_dtype": "uint4"}
    assert config(**{**base, **change}) != config(**base)
    assert config(**{**base, **change}).fields() != config(**base).fields()


@pytest.mark.parametrize("name", FORMATS)
def test_round_trips(name):
    found = config(M=[1, 16], W_dtype=name, with_bias=True)
    for twin in (pickle.loads(pickle.dumps(found)), copy.copy(found), copy.deepcopy(found), dataclasses.replace(found)):
        assert twin == found
        assert hash(twin) == hash(found)
        assert repr(twin) == repr(found)
    assert eval(repr(found), {"MatmulConfig": MatmulConfig}) == found
    assert found.format is FORMATS[name]


def test_repr_names_every_field():
    text = repr(config(W_dtype="nf4"))
    assert text.startswith("MatmulConfig(M=1, N=32, K=64, A_dtype='float16', W_dtype='nf4', ")


def test_frozen():
    found = config()
    for name in ("N", "M", "new"):
        with pytest.raises(AttributeError):
            setattr(found, name, 1)
    with pytest.raises(AttributeError):
        del found.N


def test_as_a_key():
    cache = {config(M=[1, 2]): "here"}
    assert cache[config(M=(1, 2))] == "here"
    assert config(M=3) not in cache
    assert config() != "config"


def test_groups():
    assert (config(group_size=16).group, config(group_size=16).num_groups) == (16, 4)
    assert (config().group, config().num_groups) == (64, 1)
    assert config(group_size=64).num_groups == 1
    assert config(group_size=1).num_groups == 64


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"W_dtype": "uint4"}, True),
        ({"W_dtype": "uint4", "with_zeros": True, "zeros_mode": "quantized"}, True),
        ({"with_scaling": True}, True),
        ({"with_scaling": True, "group_size": 16}, False),
        ({"with_zeros": True}, False),
        ({"W_dtype": "nf4"}, False),
        ({"A_dtype": "float16"}, False),
        ({"A_dtype": "float16", "dynamic_quantization": "row"}, True),
        ({"A_dtype": "float16", "dynamic_quantization": "group"}, True),
        ({"A_dtype": "float16", "dynamic_quantization": "row", "group_size": 16}, True),
        ({"A_dtype": "float16", "dynamic_quantization": "group", "group_size": 16}, False),
        ({"A_dtype": "float16", "dynamic_quantization": "row", "group_size": 16, "with_scaling": True}, False),
    ],
)
def test_integer_accumulation(fields, expected):
    assert config(**{"A_dtype": "int8", "W_dtype": "int4", **fields}).integer_accumulation is expected


@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_with_every_activation(name, a_dtype):
    found = config(A_dtype=a_dtype, W_dtype=name, out_dtype="float32", with_scaling=True)
    assert found.scale_dtype == ("float32" if a_dtype == "int8" else a_dtype)


@pytest.mark.parametrize("a_dtype", ["float16", "bfloat16", "float32", "int8"])
def test_one_scale_is_float32(a_dtype):
    found = config(A_dtype=a_dtype, W_dtype="int2", out_dtype="float32", with_scaling=True, scale_per_tensor=True)
    assert (found.scale_dtype, found.scale_shape) == ("float32", (1,))
    assert found.scale_dtypes == ("float32", "float16", "bfloat16")
    assert config(A_dtype=a_dtype, with_scaling=True).scale_shape == (32, 1)


def test_options_that_are_off_change_no_key():
    plain = config(W_dtype="int2", dynamic_quantization="row", with_scaling=True)
    off = dataclasses.replace(plain, scale_per_tensor=False, activation_eps=None)
    assert off == plain
    assert off.fields() == plain.fields()
    assert not {"scale_per_tensor", "activation_eps"} & set(plain.fields())
    on = dataclasses.replace(plain, scale_per_tensor=1, activation_eps=np.float32(0.5))
    assert on.fields() == {**plain.fields(), "scale_per_tensor": True, "activation_eps": 0.5}
    fields = json.loads(json.dumps(dataclasses.replace(plain, activation_eps=1e-5).fields()))
    assert MatmulConfig(**fields).activation_eps == 1e-5


@pytest.mark.parametrize("how", ["row", "group"])
@pytest.mark.parametrize("name", FORMATS)
def test_which_formats_take_quantized_activations(name, how):
    if name.startswith(("uint", "int")):
        found = config(A_dtype="bfloat16", W_dtype=name, group_size=16, dynamic_quantization=how)
        assert found.integer_products
        assert found.activation_groups == {"row": 1, "group": 4}[how]
        assert found.is_grouped == (how == "group")
        assert found.scale_dtype == found.activation_dtype == "bfloat16"
        return
    with pytest.raises(ConfigError, match=f"dynamic_quantization '{how}' needs a W_dtype of integers.* not {name},"):
        config(W_dtype=name, dynamic_quantization=how)


@pytest.mark.parametrize("a_dtype", A_DTYPES)
def test_which_activations_can_be_quantized(a_dtype):
    if a_dtype in FLOATS:
        assert config(A_dtype=a_dtype, W_dtype="int4", dynamic_quantization="row").A_dtype == a_dtype
        return
    with pytest.raises(ConfigError, match=f"needs A_dtype float16, bfloat16 or float32, not {a_dtype},"):
        config(A_dtype=a_dtype, W_dtype="int4", dynamic_quantization="row")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dynamic_quantization": "column"}, "dynamic_quantization is 'column'; allowed: None, 'row', 'group'"),
        ({"dynamic_quantization": True}, "dynamic_quantization is True; allowed"),
        ({"dynamic_quantization": 128}, "dynamic_quantization is 128; allowed"),
        ({"dynamic_quantization": "group", "group_size": 1}, "needs a group_size of at least 2, or -1"),
        ({"dynamic_quantization": "row", "out_dtype": "int32"}, "out_dtype int32 needs A_dtype int8 or int4"),
        ({"dynamic_quantization": "row", "out_dtype": "int8"}, "out_dtype int8 needs A_dtype int8 or int4"),
        ({"dynamic_quantization": "row", "accum_dtype": "int32"}, "accum_dtype int32 needs A_dtype int8 or int4"),
        ({"activation_eps": 1e-6}, "activation_eps is 1e-06, but nothing is quantized"),
        (
            {"dynamic_quantization": "row", "activation_eps": 0},
            "activation_eps is 0; it must be a number from 2^-119",
        ),
        ({"dynamic_quantization": "row", "activation_eps": 2.0**-120}, "activation_eps is 7.5"),
        ({"dynamic_quantization": "row", "activation_eps": float("nan")}, "activation_eps is nan; it must be"),
        ({"dynamic_quantization": "row", "activation_eps": 2.0**127}, "activation_eps is 1.7"),
        ({"dynamic_quantization": "row", "activation_eps": True}, "activation_eps is True; it must be"),
        ({"dynamic_quantization": "row", "activation_eps": "1e-6"}, "activation_eps is '1e-6'; it must be"),
        ({"scale_per_tensor": True}, "scale_per_tensor is True with with_scaling False and group_size -1; it needs"),
        ({"scale_per_tensor": True, "with_scaling": True, "group_size": 16}, "with_scaling True and group_size 16; it"),
        (
            {"scale_per_tensor": True, "with_scaling": True, "with_zeros": True},
            "that share one scale have no zero points",
        ),
        ({"scale_per_tensor": 2}, "scale_per_tensor is 2; it must be True or False"),
    ],
)
def test_what_quantized_activations_do_not_go_with(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(W_dtype="uint4", **fields)


def test_quantization_of_activations_is_given_by_name_and_tells_configs_apart():
    parameter = inspect.signature(MatmulConfig).parameters["dynamic_quantization"]
    assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    found = [config(W_dtype="uint4", group_size=16, dynamic_quantization=how) for how in (None, "row", "group")]
    assert len(set(found)) == 3
    assert [f.fields().get("dynamic_quantization") for f in found] == [None, "row", "group"]
    for one in found:
        twins = (
            pickle.loads(pickle.dumps(one)), dataclasses.replace(one), MatmulConfig(**one.fields()),
            eval(repr(one), {"MatmulConfig": MatmulConfig}),
        )  # fmt: skip
        assert all(twin == one and hash(twin) == hash(one) for twin in twins)
    grouped = dataclasses.replace(found[2], group_size=-1)
    assert grouped != dataclasses.replace(found[1], group_size=-1)
    assert grouped.kernel == dataclasses.replace(found[1], group_size=-1).kernel  # one group is a row


def test_the_fields_of_a_config_without_options_are_those_it_always_had():
    """… so that the keys of artifacts and of saved operators stay what they were."""
    assert list(config().fields()) == POSITIONS[:13]


@pytest.mark.parametrize("mode", ["original", "rescale", "quantized"])
@pytest.mark.parametrize("name", FORMATS)
def test_which_formats_take_zeros(name, mode):
    allowed = name.startswith("uint") or (name.startswith("int") and mode != "quantized")
    if allowed:
        assert config(W_dtype=name, with_zeros=True, zeros_mode=mode).zeros_packed == (mode == "quantized")
        return
    with pytest.raises(ConfigError, match=name):
        config(W_dtype=name, with_zeros=True, zeros_mode=mode)
