"""Negated views were taken for plain memory, a NaN of all ones became zero in bfloat16, N-D activations cost a copy."""

import pytest
import torch

from bitblas import ArgumentError, Matmul, MatmulConfig


@pytest.fixture(scope="module")
def op():
    return Matmul(MatmulConfig([1, 16], 32, 32, "float32", "uint4", "float32", with_scaling=True))


def test_negated_views_are_resolved(op):
    a, scale = torch.randn(3, 32), torch.rand(32, 1)
    weight = op.transform_weight(torch.randint(0, 16, (32, 32)))
    expected = op(-a, weight, scale)
    assert torch.equal(op(torch._neg_view(a), weight, scale), expected)
    assert torch.equal(op(a, weight, torch._neg_view(scale)), expected)
    with pytest.raises(ArgumentError, match="output is a negated view"):
        op(a, weight, scale, output=torch._neg_view(torch.empty(3, 32)))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
@pytest.mark.parametrize("out_dtype", ["float32", "float16", "bfloat16"])
def test_every_nan_stays_one(bits, out_dtype):
    op = Matmul(MatmulConfig([1, 16], 16, 16, "float32", "float32", out_dtype))
    a = torch.zeros(2, 16)
    a[1, 3] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    out = op(a, op.transform_weight(torch.ones(16, 16)))
    assert out[1].isnan().all()
    assert (out[0] == 0).all()
