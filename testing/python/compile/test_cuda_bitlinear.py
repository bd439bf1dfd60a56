"""Deployed BitLinear layers on a card, in the emulator: one kernel a call, and the numbers of training."""

import re

import pytest
import torch

import ternary
from bitblas import BitLinear
from bitblas.nn import portable
from bitblas.target import resolve_target
from ternary import DTYPES, assert_right, expect, make, rows, same, state_of

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture
def on_card(monkeypatch):
    """Deploys layers for a card, though their tensors are on the CPU."""

    def deploy(layer):
        with monkeypatch.context() as patch:
            patch.setattr(portable, "target_of", lambda device: resolve_target("cuda -arch=sm_80"))
            layer.deploy()
        assert layer.bitblas_matmul.target.kind == "cuda"
        return layer

    return deploy


#: A dtype of its own for each scheme: builds take seconds.
CASES = [
    ("ai8pc_wpt", torch.float32),
    ("ai8pc_wpt", torch.float16),
    ("ai8pc_wpc", torch.bfloat16),
    ("ai8pc_wpg64", torch.float16),
]


@pytest.mark.parametrize(("quant_type", "dtype"), CASES, ids=str)
def test_numbers_and_one_kernel(on_card, quant_type, dtype):
    layer, x = make(32, 128, quant_type, dtype), rows(17, 128, dtype)
    expected, saved = expect(layer, x), state_of(make(32, 128, quant_type, dtype).deploy())
    x_odd = x.clone()
    x_odd[3], x_odd[4, 5] = 0, float("nan")
    on_card(layer)
    assert same(state_of(layer), saved)
    for m in (1, 17):
        for _ in range(2):  # the second call is of what the first has checked
            with torch.no_grad():
                out = layer(x[:m])
            part = ternary.Expected(expected.output[:m], expected.allowed[:m], *[None] * 3)
            assert_right(out, part)
    with torch.no_grad():
        out = layer(x_odd)
    assert torch.equal(out[3], layer.bias)
    assert out[4].isnan().all()
    op = layer.bitblas_matmul
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)", op.get_source())
    assert set(kernels) == {f"{kernel.name}_kernel" for kernel in op.plan.kernels}  # another would have a number behind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_cpu_saved(on_card, dtype):
    """… is loaded for a card, and saved there as it was."""
    source = make(32, 128, dtype=dtype).deploy()
    layer = on_card(BitLinear(128, 32, dtype=dtype))
    layer.load_state_dict(source.state_dict())
    assert same(state_of(layer), state_of(source))
    assert layer.w_packed.data_ptr() != source.w_packed.data_ptr()
