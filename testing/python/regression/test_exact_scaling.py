"""Sums of integers lost bits to one scale in float32, and huge numbers of rows with small K were indexed beyond 32 bits."""

import pytest
import torch

from bitblas import Matmul, MatmulConfig


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("group", [-1, 2048])
@pytest.mark.parametrize("out_dtype", ["int32", "float32"])
@pytest.mark.parametrize("m", [1, 9])
def test_a_scale_of_one_changes_nothing(group, out_dtype, m):
    config = MatmulConfig(
        (1, 16), 16, 4096, "int8", "int8", out_dtype, "int32", group_size=group, with_scaling=True, with_bias=True
    )
    op = Matmul(config)
    a, w = torch.full((m, 4096), 127, dtype=torch.int8), integers(120, 128, 16, 4096)
    scale = torch.ones(16, 4096 // config.group)
    bias = torch.full((16,), 2**24 + 1, dtype=torch.int32).to(getattr(torch, out_dtype))
    exact = a.long() @ w.T + bias.long()
    assert (exact > 2**24).all()
    out = op(a, op.transform_weight(w), scale, bias)
    assert torch.equal(out, exact.to(out.dtype))


def test_plans_keep_indices_of_short_rows_below_32_bits():
    op = Matmul(MatmulConfig((1,), 16, 8, "int8", "uint4", "int8", "int32"), from_database=True)
    kernel = op.plan.kernels[0]
    assert (
        kernel.tiling.row_elements(op.plan.config, op.plan.layout) >= 64 + 8
    )  # a row of the copy of A has an odd number of cache lines
    assert kernel.tiling.slab_m >= 512


def test_more_rows_than_32_bits_index():
    op = Matmul(MatmulConfig((1,), 16, 8, "int8", "uint4", "int8", "int32"))
    a = torch.ones(2**25 + 100_000, 8, dtype=torch.int8)
    a[-1] = 3
    out = op(a, op.transform_weight(torch.ones(16, 8)))
    assert (out[:-1] == 8).all()
    assert (out[-1] == 24).all()
