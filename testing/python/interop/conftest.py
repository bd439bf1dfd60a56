"""What the interop tests share: undoing what a client does to bitblas, and how close is close enough."""

import logging
import math
import sys

import pytest
import torch

import bitblas
import reference

#: Half the distance of float16's subnormal numbers, where its roundoff stops being relative.
HALF_SUBNORMAL = 2.0**-25


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """Run on the CPU, even beside a GPU, and undo what clients do to bitblas: they set its log level and fill its cache."""
    monkeypatch.setenv("BITBLAS_TARGET", "llvm")
    logger = logging.getLogger("bitblas")
    level = logger.level
    yield
    logger.setLevel(level)
    if "bitblas.cache" in sys.modules:
        bitblas.cache.global_operator_cache.clear()


@pytest.fixture(scope="session")
def assert_close():
    """``check(out, x, weight, zeros, bias=None)``: fail where a client's layer is too far from its own dequantized weight.

    Parameters
    ----------
    out : torch.Tensor
        (..., N), what the layer returned: float16, or bfloat16 rounded from that.
    x : torch.Tensor
        (..., K), what it was given.
    weight : torch.Tensor
        (N, K), dequantized by the client in more than the layer's precision, so that it holds (q - z)·s without an error.
    zeros : torch.Tensor
        (N, K), the part z·s of it.
    bias : torch.Tensor, optional
        (N,), which the client itself adds, in float16.

    Notes
    -----
    bitblas multiplies codes and sums in float32: √K roundings of partial sums that stay below S = |x|·(|q| + |z|)·|s| give
    2·√K·u(float32)·S, as for every other test, and |q·s| is at most |W| + |z·s|. Each rounding to a dtype that follows (of
    the product to float16, of its sum with the bias, and to bfloat16) adds its unit roundoff times what is rounded.
    """

    def check(
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        zeros: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        x, weight, zeros = x.to(torch.float64), weight.to(torch.float64), zeros.to(torch.float64)
        magnitude = x.abs() @ (weight.abs() + 2 * zeros.abs()).T
        expected = x @ weight.T
        u = reference.ROUNDOFF
        allowed = 2 * math.sqrt(weight.shape[1]) * u["float32"] * magnitude
        allowed += u["float16"] * expected.abs() + HALF_SUBNORMAL
        if bias is not None:
            expected = expected + bias.to(torch.float64)
            allowed += u["float16"] * expected.abs() + HALF_SUBNORMAL
        if out.dtype is torch.bfloat16:
            allowed += u["bfloat16"] * expected.abs()
        assert out.shape == expected.shape
        distance = (out.to(torch.float64) - expected).abs()
        right = distance <= allowed  # false for NaN
        worst = float((distance / allowed).max())
        assert right.all(), f"{int((~right).sum())} of {right.numel()} results are wrong, up to {worst:.3g} × the bound"

    return check
