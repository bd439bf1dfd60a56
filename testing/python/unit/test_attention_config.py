"""FlashAttenConfig: what it takes, what it refuses, and which kernels it asks for."""

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch

from bitblas import ConfigError, FlashAttenConfig
from bitblas.config import QUERY_BUCKETS

#: As in upstream, so that all may be given by position; what is ours follows by keyword.
ORDER = [
    *("batch", "heads", "seq_len", "dim", "Q_dtype", "K_dtype", "V_dtype", "Accu_dtype", "Out_dtype"),
    *("layout", "is_causal"),
]
KEYWORDS = ["heads_kv", "seq_len_kv", "dim_v", "softmax_scale"]


def config(**fields):
    return FlashAttenConfig(**{"batch": 2, "heads": 8, "seq_len": 128, "dim": 64, **fields})


def test_by_position():
    values = (1, 4, 256, 64, "bfloat16", "float32", "float16", "float32", "bfloat16", "ntn", True)
    found = FlashAttenConfig(*values)
    assert [getattr(found, name) for name in ORDER] == list(values)
    parameters = inspect.signature(FlashAttenConfig).parameters
    assert list(parameters) == [*ORDER, *KEYWORDS]
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in KEYWORDS)
    with pytest.raises(TypeError):
        FlashAttenConfig(*values, 4)


def test_defaults():
    found = config()
    assert (found.Q_dtype, found.K_dtype, found.V_dtype, found.Out_dtype) == ("float16",) * 4
    assert (found.Accu_dtype, found.layout, found.is_causal) == ("float32", "nnn", False)
    assert (found.heads_kv, found.seq_len_kv, found.dim_v) == (8, 128, 64)
    assert found.softmax_scale == 1 / math.sqrt(64)
    lone = FlashAttenConfig(dim=80)
    assert (lone.batch, lone.heads, lone.heads_kv, lone.seq_len, lone.seq_len_kv, lone.dim_v) == (None,) * 5 + (80,)


def test_frozen_hashable_and_readable():
    found = config(softmax_scale=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.dim = 5
    assert {found: 1}[config(softmax_scale=0.5)] == 1
    assert found != config()
    assert eval(repr(found)) == found
    assert dataclasses.replace(found, dim=32, dim_v=32) == config(dim=32, softmax_scale=0.5)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (config(seq_len_kv=None), None),
        (config(seq_len_kv=7), 7),
        (config(seq_len_kv="seq_len"), 128),
        (config(seq_len=None), None),
        (config(seq_len=None, seq_len_kv=9), 9),
    ],
)
def test_keys(given, kept):
    assert given.seq_len_kv == kept


def test_numbers_and_names_of_other_kinds():
    found = config(
        dim=np.int64(64), heads=np.int32(8), softmax_scale=np.float32(0.5), Q_dtype=torch.bfloat16, is_causal=1
    )
    assert found == config(softmax_scale=0.5, Q_dtype="bfloat16", is_causal=True)
    assert type(found.dim) is int
    assert type(found.softmax_scale) is float
    assert found.is_causal is True
    assert json.loads(json.dumps(found.fields())) == found.fields()


@pytest.mark.parametrize(
    "given",
    [config(), config(seq_len_kv=None), FlashAttenConfig(dim=3), config(heads_kv=2, dim_v=5, softmax_scale=-0.1)],
)
def test_fields_make_the_config_again(given):
    assert FlashAttenConfig(**json.loads(json.dumps(given.fields()))) == given


SIZE = "it must be an integer of at least 1$"
DTYPES = "allowed: float16, bfloat16, float32$"
WRONG = [
    ({"dim": None}, rf"^dim is None; {SIZE}"),
    ({"dim": 0}, rf"^dim is 0; {SIZE}"),
    ({"dim": -64}, rf"^dim is -64; {SIZE}"),
    ({"dim": 64.0}, rf"^dim is 64\.0; {SIZE}"),
    ({"dim": "64"}, rf"^dim is '64'; {SIZE}"),
    ({"dim": True}, rf"^dim is True; {SIZE}"),
    ({"dim": 1025}, r"^dim is 1025; it must be at most 1024$"),
    ({"dim_v": 0}, rf"^dim_v is 0; {SIZE}"),
    ({"dim_v": 2048}, r"^dim_v is 2048; it must be at most 1024$"),
    ({"dim_v": [64]}, rf"^dim_v is \[64\]; {SIZE}"),
    ({"batch": 0}, rf"^batch is 0; {SIZE}"),
    ({"batch": -1}, rf"^batch is -1; {SIZE}"),
    ({"heads": 0}, rf"^heads is 0; {SIZE}"),
    ({"heads": 2.5}, rf"^heads is 2\.5; {SIZE}"),
    ({"seq_len": 0}, rf"^seq_len is 0; {SIZE}"),
    ({"seq_len": [1, 16]}, rf"^seq_len is \[1, 16\]; {SIZE}"),
    ({"seq_len": "dynamic"}, rf"^seq_len is 'dynamic'; {SIZE}"),
    ({"seq_len_kv": 0}, rf"^seq_len_kv is 0; {SIZE}"),
    ({"seq_len_kv": "keys"}, rf"^seq_len_kv is 'keys'; {SIZE}"),
    ({"seq_len_kv": False}, rf"^seq_len_kv is False; {SIZE}"),
    ({"heads_kv": 0}, rf"^heads_kv is 0; {SIZE}"),
    ({"heads_kv": 3}, r"^heads_kv is 3; it must be a divisor of heads = 8$"),
    ({"heads_kv": 16}, r"^heads_kv is 16; it must be a divisor of heads = 8$"),
    (
        {"heads": None, "heads_kv": 2},
        r"^heads_kv is 2, but heads is not given, which leaves both open; give heads as well$",
    ),
    ({"Q_dtype": "float64"}, rf"^Q_dtype is 'float64'; {DTYPES}"),
    ({"Q_dtype": None}, rf"^Q_dtype is None; {DTYPES}"),
    ({"K_dtype": "int8"}, rf"^K_dtype is 'int8'; {DTYPES}"),
    ({"K_dtype": torch.float8_e4m3fn}, rf"^K_dtype is torch\.float8_e4m3fn; {DTYPES}"),
    ({"V_dtype": "half precision"}, rf"^V_dtype is 'half precision'; {DTYPES}"),
    ({"V_dtype": 16}, rf"^V_dtype is 16; {DTYPES}"),
    ({"Out_dtype": "int32"}, rf"^Out_dtype is 'int32'; {DTYPES}"),
    ({"Accu_dtype": "float16"}, r"^Accu_dtype is 'float16'; allowed: float32$"),
    ({"Accu_dtype": None}, r"^Accu_dtype is None; allowed: float32$"),
    ({"layout": "nt"}, r"^layout is 'nt'; allowed: nnn, ntn$"),
    ({"layout": None}, r"^layout is None; allowed: nnn, ntn$"),
    ({"layout": ["nnn"]}, r"^layout is \['nnn'\]; allowed: nnn, ntn$"),
    ({"is_causal": "yes"}, r"^is_causal is 'yes'; it must be True or False$"),
    ({"is_causal": 2}, r"^is_causal is 2; it must be True or False$"),
    (
        {"softmax_scale": math.inf},
        r"^softmax_scale is inf; it must be a number of a magnitude below 2\^126, or None for 1/√dim$",
    ),
    ({"softmax_scale": 2**126}, r"^softmax_scale is \d+; it must be a number of a magnitude below"),
    ({"softmax_scale": -1e300}, r"^softmax_scale is -1e\+300; it must be a number of a magnitude below"),
    ({"softmax_scale": 10**400}, r"^softmax_scale is 10+; it must be a number of a magnitude below"),
    ({"softmax_scale": math.nan}, r"^softmax_scale is nan; it must be a number of a magnitude below"),
    ({"softmax_scale": "0.1"}, r"^softmax_scale is '0\.1'; it must be a number of a magnitude below"),
    ({"softmax_scale": True}, r"^softmax_scale is True; it must be a number of a magnitude below"),
    ({"softmax_scale": 1j}, r"^softmax_scale is 1j; it must be a number of a magnitude below"),
]


@pytest.mark.parametrize(("fields", "match"), WRONG, ids=[str(fields)[:40] for fields, _ in WRONG])
def test_wrong_fields(fields, match):
    with pytest.raises(ConfigError, match=match):
        config(**fields)


def test_unknown_fields():
    with pytest.raises(TypeError, match="dropout"):
        config(dropout=0.1)


# -- kernels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "buckets"),
    [
        ({"seq_len": 1}, (1,)),
        ({"seq_len": 2}, (16,)),
        ({"seq_len": 1, "heads_kv": 2}, (16,)),  # a row is a query of one of the four heads that share keys
        ({"seq_len": 16}, (16,)),
        ({"seq_len": 16, "heads_kv": 1}, (256,)),
        ({"seq_len": 17}, (64,)),
        ({"seq_len": 1024}, (1024,)),
        ({"seq_len": 5000}, (1024,)),
        ({"seq_len": None}, QUERY_BUCKETS),
        ({"seq_len": 16, "heads": None, "heads_kv": None}, (16,)),
        ({"seq_len": 1, "heads": None, "heads_kv": None}, (1, 16)),  # which may share keys
    ],
    ids=str,
)
def test_buckets_of_rows(fields, buckets):
    assert config(**fields).buckets == buckets


def test_kernels_know_no_sizes_but_those_of_a_head():
    kernel = config(batch=1, heads=4, heads_kv=2, seq_len=100, seq_len_kv=7).kernel
    assert kernel == config(batch=3, heads=8, heads_kv=4, seq_len=128, seq_len_kv=None).kernel
    sizes = (kernel.batch, kernel.heads, kernel.heads_kv, kernel.seq_len, kernel.seq_len_kv)
    assert sizes == (None, 1, 1, 256, None)  # rows of one head
    assert kernel.kernel == kernel == config(seq_len=None).for_bucket(256)
    assert kernel.buckets == (256,)
    assert config(seq_len=None).kernel.seq_len is None
    for fields in ({"seq_len": None}, {"seq_len": 1, "heads": None, "heads_kv": None}, {"seq_len": 1}):
        kernel = config(**fields).kernel
        assert kernel.kernel == kernel
        assert kernel.buckets == config(**fields).buckets
        assert [config(**fields).for_bucket(m).buckets for m in kernel.buckets] == [(m,) for m in kernel.buckets]
    for changed in (
        {"dim": 32},
        {"dim_v": 32},
        {"is_causal": True},
        {"layout": "ntn"},
        {"softmax_scale": 1},
        {"K_dtype": "float32"},
    ):
        assert config(**changed).kernel != config().kernel
