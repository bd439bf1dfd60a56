"""MatmulConfigWithSplitK: a MatmulConfig with a hint that shapes nothing."""

import dataclasses
import pickle

import pytest

from bitblas import ConfigError, MatmulConfig
from bitblas.ops import MatmulConfigWithSplitK, MatmulWithSplitK
from bitblas.plan import plan_matmul
from bitblas.target import resolve_target

SHAPE = {
    "M": [1, 16],
    "N": 32,
    "K": 96,
    "A_dtype": "float16",
    "W_dtype": "uint4",
    "group_size": 32,
    "with_scaling": True,
}


def split(k_split=3, **changes):
    return MatmulConfigWithSplitK(**{**SHAPE, "k_split": k_split, **changes})


def test_it_is_a_config():
    config = split()
    assert isinstance(config, MatmulConfig)
    assert config.k_split == 3
    assert MatmulConfigWithSplitK(**SHAPE).k_split == 1
    assert (config.M, config.K, config.num_groups, config.format.name) == ((1, 16), 96, 3, "uint4")
    assert "k_split=3" in repr(config)
    assert repr(config).startswith("MatmulConfigWithSplitK(M=(1, 16), N=32, K=96")


def test_positional_order_and_bias():
    config = MatmulConfigWithSplitK(1, 32, 64, "float16", "uint4", "float16", k_split=2)
    assert (config.M, config.N, config.K, config.W_dtype, config.k_split) == (1, 32, 64, "uint4", 2)
    assert split(bias=True).with_bias
    assert not split().with_bias


def test_equality_hash_pickle_replace():
    assert split() == split()
    assert hash(split()) == hash(split())
    assert split(1) != split(3)
    assert split(1) != MatmulConfig(**SHAPE)
    assert {split(): "a"}[split()] == "a"
    assert pickle.loads(pickle.dumps(split())) == split()
    other = dataclasses.replace(split(), M=16)
    assert (type(other), other.M, other.k_split) == (MatmulConfigWithSplitK, 16, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        split().k_split = 2


def test_artifacts_are_those_of_matmul():
    plain, target = MatmulConfig(**SHAPE), resolve_target("llvm")
    assert split().fields() == plain.fields()
    assert plan_matmul(split(), target).fields() == plan_matmul(plain, target).fields()


@pytest.mark.parametrize("k_split", [0, -1, 5, 97, 192, 2.0, "2", None, True])
def test_refused(k_split):
    with pytest.raises(ConfigError, match=rf"^k_split is {k_split!r}; it must be at least 1 and divide K = 96$"):
        split(k_split)


def test_other_arguments_are_checked_as_ever():
    with pytest.raises(ConfigError, match=r"^N is 0; "):
        split(N=0)
    with pytest.raises(ConfigError, match=r"^K is None; "):
        split(K=None)


@pytest.mark.parametrize("config", [MatmulConfig(**SHAPE), None, SHAPE])
def test_an_operator_needs_a_split(config):
    with pytest.raises(ConfigError, match=r"^config is .*; it must be a MatmulConfigWithSplitK$"):
        MatmulWithSplitK(config, target="llvm")
