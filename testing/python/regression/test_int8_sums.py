"""Sums of int8 products were rounded beside float zero points, wrapped beyond int32, and were slow for a prime K."""

import pytest
import torch

from bitblas import Matmul, MatmulConfig


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["original", "rescale"])
def test_whole_zero_points_in_float_leave_sums_exact(mode):
    config = MatmulConfig(
        [1, 8], 16, 16384, "int8", "uint8", "int32", "int32", group_size=128, with_zeros=True, zeros_mode=mode
    )
    op = Matmul(config)
    a, w, z = integers(0, 128, 5, 16384), integers(128, 256, 16, 16384), integers(0, 9, 16, 128)
    out = op(a.to(torch.int8), op.transform_weight(w), zeros=z.float())
    assert torch.equal(out.long(), a @ (w - z.repeat_interleave(128, 1)).t())


@pytest.mark.parametrize("out_dtype", ["int32", "float32"])
@pytest.mark.parametrize("m", [1, 9])
def test_sums_beyond_int32_do_not_wrap(out_dtype, m):
    op = Matmul(MatmulConfig([1, 16], 16, 140000, "int8", "uint8", out_dtype, "float32"))
    a, w = torch.full((m, 140000), 127, dtype=torch.int8), torch.full((16, 140000), 255)
    expected = 140000 * 127 * 255
    out = op(a, op.transform_weight(w))
    assert (out == (2**31 - 1 if out_dtype == "int32" else torch.tensor(expected).float())).all()


@pytest.mark.parametrize("k", [4099, 4168, 521])
@pytest.mark.parametrize("m", [1, 7, 33])
def test_a_prime_k_is_exact_and_has_long_chunks(k, m):
    op = Matmul(MatmulConfig([1, 32], 33, k, "int8", "int4", "int32", "int32"))
    assert all(kernel.tiling.chunk(op.config, op.layout) >= 64 for kernel in op.plan.kernels)
    a, w = integers(-128, 128, m, k), integers(-8, 8, 33, k)
    assert torch.equal(op(a.to(torch.int8), op.transform_weight(w)).long(), a @ w.t())
