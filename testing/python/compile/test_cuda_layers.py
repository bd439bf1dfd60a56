"""Layers on a card, in the emulator: the weight in its layout, the call, gradients, graphs, and back."""

import pytest
import torch

import layers
import reference
from bitblas.nn import portable
from bitblas.target import resolve_target

pytestmark = pytest.mark.usefixtures("emulated")

HALF = {"N": 32, "K": 128, "M": (1, 16), "A_dtype": "float16", "out_dtype": "float16", "group_size": 64}


@pytest.fixture
def on_card(monkeypatch):
    """Makes layers for a card, though their tensors are on the CPU."""

    def make(problem, cfg, **options):
        packed = layers.fill(layers.build(cfg, **options), problem).state_dict()
        with monkeypatch.context() as patch:
            patch.setattr(portable, "target_of", lambda device: resolve_target("cuda -arch=sm_80"))
            layer = layers.build(cfg, **options)
            layer.load_state_dict(packed)
        assert layer.bitblas_matmul.layout.name == "mma16"
        return layer, packed

    return make


@pytest.mark.parametrize("m", [1, 5, 16])
@pytest.mark.parametrize("mode", ["quantized", "original", "rescale"])
def test_there_and_back(on_card, mode, m):
    cfg = layers.config(**HALF, zeros_mode=mode)
    problem = reference.on_tensor_cores(reference.draw(cfg, m))
    layer, packed = on_card(problem, cfg)
    for _ in range(2):  # the second call is of what the first has checked
        reference.assert_close(layers.ran(layer, problem), problem)
    state = layer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in packed.items())


def test_gradients_come_from_the_layout_of_the_card(on_card):
    cfg = layers.config(**HALF)
    problem = reference.draw(cfg, 4)
    layer, _ = on_card(problem, cfg)
    A = problem.A.clone().requires_grad_()
    layer(A).float().sum().backward()
    wanted = layers.fill(layers.build(cfg), problem).to_quantized().dequantize().double().sum(0)
    torch.testing.assert_close(A.grad.double(), wanted.expand(4, -1), rtol=2**-9, atol=1e-2)


def test_in_a_graph(on_card):
    cfg = layers.config(**HALF)
    problem = reference.on_tensor_cores(reference.draw(cfg, 3))
    layer, _ = on_card(problem, cfg)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        reference.assert_close(compiled(problem.A), problem)
