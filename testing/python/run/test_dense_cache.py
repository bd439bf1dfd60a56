"""Many rows on a card: weights are decoded for torch, and kept where that is asked for; in the emulator."""

import pickle

import pytest

import devices
import reference
from bitblas import Matmul, MatmulConfig

pytest.importorskip("emulator")
pytestmark = pytest.mark.usefixtures("emulated")

CONFIG = MatmulConfig(
    M=(1, 1024),
    N=32,
    K=64,
    W_dtype="uint4",
    out_dtype="float16",
    accum_dtype="float32",
    with_scaling=True,
    group_size=32,
)


def test_decoded_weights_are_kept_until_they_change():
    op = Matmul(CONFIG, target=devices.EMULATED, dense_cache=True)
    assert [kernel.rule for kernel in op.plan.kernels][-1] == "cuda_dense"
    problem = reference.draw(CONFIG, 1000, exact=True)
    other = reference.draw(CONFIG, 1000, exact=True, seed=1)
    weight, scale = op.transform_weight(problem.weights), problem.scale.clone()
    for _ in range(2):
        reference.assert_exact(op(problem.A, weight, scale), problem)
    weight.copy_(op.transform_weight(other.weights))
    scale.copy_(other.scale)
    reference.assert_exact(op(other.A, weight, scale), other)
    few = reference.draw(CONFIG, 3, exact=True, seed=1)  # by another kernel, which reads the codes
    reference.assert_exact(op(few.A, op.transform_weight(few.weights), few.scale), few)


def test_an_operator_alone_decides_what_it_keeps():
    keeps, plain = (Matmul(CONFIG, target=devices.EMULATED, dense_cache=keep) for keep in (True, False))
    assert keeps.artifact.key == plain.artifact.key
    problem = reference.draw(CONFIG, 1000, exact=True)
    weight = plain.transform_weight(problem.weights)
    for op in (keeps, plain, pickle.loads(pickle.dumps(keeps))):
        for _ in range(2):
            reference.assert_exact(op(problem.A, weight, problem.scale), problem)
    functions = {op: op._kernels._functions[-1][0] for op in (keeps, plain)}
    assert len(functions[keeps]._kept) == 1
    assert functions[plain]._kept == {}
