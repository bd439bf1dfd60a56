"""MatmulWithSplitK computes what Matmul computes, with the same library."""

import copy
import pickle

import pytest
import torch

import reference
from bitblas import Matmul, MatmulConfig
from bitblas.ops.general_matmul_splitk import MatmulConfigWithSplitK, MatmulWithSplitK

SHAPE = {
    "M": [1, 16],
    "N": 48,
    "K": 128,
    "A_dtype": "float16",
    "W_dtype": "uint4",
    "group_size": 32,
    "with_scaling": True,
}


@pytest.fixture(scope="module")
def plain():
    return Matmul(MatmulConfig(**SHAPE), target="llvm", enable_tuning=False)


@pytest.mark.parametrize("k_split", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [1, 5])
def test_the_results_of_matmul(plain, k_split, m):
    op = MatmulWithSplitK(MatmulConfigWithSplitK(**SHAPE, k_split=k_split), target="llvm", enable_tuning=False)
    assert (op.k_split, op.origin) == (k_split, "loaded")  # the artifact of the plain operator
    problem = reference.draw(plain.config, m)
    weight = op.transform_weight(problem.weights)
    assert torch.equal(weight, plain.transform_weight(problem.weights))
    out = op(problem.A, weight, **problem.extras)
    reference.assert_close(out, problem)
    assert torch.equal(out, plain(problem.A, weight, **problem.extras))
    given = torch.empty_like(out)
    assert op.forward(problem.A, weight, **problem.extras, output=given) is given
    assert torch.equal(given, out)


def test_float16_weights():
    config = MatmulConfigWithSplitK(1, 32, 64, zeros_mode=None, propagate_a=False, propagate_b=False, k_split=4)
    op = MatmulWithSplitK(config=config, enable_tuning=False)
    A, W = torch.rand(1, 64).half() - 0.5, torch.rand(32, 64).half() - 0.5
    torch.testing.assert_close(op(A, op.transform_weight(W)), A @ W.t(), rtol=1e-2, atol=1e-2)


def test_it_survives_pickling():
    op = MatmulWithSplitK(MatmulConfigWithSplitK(**SHAPE, k_split=2), target="llvm", from_database=True)
    for other in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert type(other) is MatmulWithSplitK
        assert other.config == op.config
        assert other.k_split == 2
    assert repr(op).startswith("MatmulWithSplitK(MatmulConfigWithSplitK(")


def test_tuning(store):
    op = MatmulWithSplitK(MatmulConfigWithSplitK(16, 32, 64, k_split=2), target="llvm")
    assert list(op.hardware_aware_finetune(topk=1)) == [16]
    assert op.config.k_split == 2
