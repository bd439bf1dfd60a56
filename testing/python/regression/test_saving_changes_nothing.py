"""Moving the only word of each row to another layout wrote into the given tensor, so that saving a layer changed its weight."""

import pytest
import torch

import bitblas
from bitblas.layout import PackedLayout
from bitblas.relaying import repack


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_what_is_moved_stays_as_it_was(bits, words):
    K = words * 32 // bits
    if K % 16:
        K = 16
    native, packed = PackedLayout(32, K, bits, "dots"), PackedLayout(32, K, bits, "packed")
    given = torch.randint(-128, 128, (32, K * bits // 8), dtype=torch.int8)
    before = given.clone()
    there = repack(given, packed, native)
    assert torch.equal(given, before)
    held = there.clone()
    assert torch.equal(repack(there, native, packed), before)
    assert torch.equal(there, held)


def test_a_layer_is_saved_twice():
    layer = bitblas.BitLinear(16, 32).deploy()
    first, second = layer.state_dict(), layer.state_dict()
    assert torch.equal(first["w_packed"], second["w_packed"])
    other = bitblas.BitLinear(16, 32)
    other.load_state_dict(first)
    assert torch.equal(other.state_dict()["w_packed"], second["w_packed"])
