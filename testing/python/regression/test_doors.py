"""Wrong arguments of less used doors ended in errors of Python, and tensors without memory in a crash."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bitblas import ArgumentError, BuildError, ConfigError, Matmul, MatmulConfig, build, env
from bitblas.cache import OperatorCache
from bitblas.ops import provider
from bitblas.target import resolve_target


@pytest.fixture(scope="module")
def op():
    return Matmul(MatmulConfig((1, 16), 32, 64, "float16", "uint4"))


def test_tensors_without_memory_are_refused(op):
    W = op.transform_weight(torch.ones(32, 64))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.zeros(4, 64, dtype=torch.float16))
        assert op(fake, W).shape == (4, 32)  # as fake as A
    assert isinstance(op(fake, W), FakeTensor)
    with FakeTensorMode() as mode:
        unreal = mode.from_tensor(W)
    with pytest.raises(ArgumentError, match=r"^W is a FakeTensor; it must have data$"):
        op(torch.zeros(4, 64, dtype=torch.float16), unreal)


def test_wrong_arguments(op):
    with pytest.raises(ArgumentError, match=r"^dynamic_symbolic_constraints is 5; it must be a dict"):
        op.profile_latency(5)
    with pytest.raises(ArgumentError, match=r"^codes is a list; it must be a torch\.Tensor$"):
        op.weight_transform([1])
    with pytest.raises(
        ArgumentError, match=r"^weight has dtype torch\.float16; it must be what transform_weight returned$"
    ):
        op.unpack_weight(torch.zeros(32, 32, dtype=torch.float16))
    with pytest.raises(ConfigError, match="1 is not understood"):
        resolve_target({1: 2, "kind": "llvm"})
    with env.scope(BITBLAS_CC='"x'), pytest.raises(BuildError, match=r"^BITBLAS_CC is '\"x', which is no command: "):
        build.find_compiler()


def test_a_cache_takes_an_operator_under_its_own_config(op):
    cache = OperatorCache()
    assert cache.get([1]) is None
    with pytest.raises(ArgumentError, match="it must be that of the operator"):
        cache.add(MatmulConfig(1, 32, 64), op)
    assert cache.size() == 0


def test_operators_in_memory_are_compiled_once(store, monkeypatch):
    """Where there is no C compiler nothing is kept on disk, and threads that want the same operator wait for one."""
    compiled = []
    compile_plan = provider.compile_plan
    monkeypatch.setattr(provider, "find_compiler", lambda target: None)
    monkeypatch.setattr(provider, "compile_plan", lambda plan: compiled.append(plan) or compile_plan(plan))
    config = MatmulConfig((1, 16), 48, 72, "float16", "uint4")
    threads = [threading.Thread(target=Matmul, args=(config,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
