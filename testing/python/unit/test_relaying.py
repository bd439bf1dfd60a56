"""Weights from one layout to another: the same codes, wherever they lie."""

import pytest
import torch

from bitblas import packing
from bitblas.layout import NAMES, PackedLayout
from bitblas.relaying import _BLOCK_ROWS, repack

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)


def layouts(N, K, bits):
    """Those that there are for the shape."""
    names = [name for name in NAMES if bits <= 8 or name in ("packed", "lanes")]
    return [PackedLayout(N, K, bits, name) for name in names]


def draw(layout):
    return torch.randint(-128, 128, (layout.N, layout.row_bytes), dtype=torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("N", "K"), [(16, 64), (48, 192)])
def test_every_layout_to_every_other(N, K, bits):
    for source in layouts(N, K, bits):
        weight = draw(source)
        before = weight.clone()
        for target in layouts(N, K, bits):
            moved = repack(weight, source, target)
            assert moved.dtype is torch.int8
            assert tuple(moved.shape) == (N, target.row_bytes)
            assert torch.equal(packing.unpack(moved, target), packing.unpack(weight, source))
            assert torch.equal(repack(moved, target, source), weight)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("bits", BITS)
def test_more_rows_than_are_moved_at_once(bits):
    N, K = 2 * _BLOCK_ROWS + 16, 64
    rows, *natives = layouts(N, K, bits)
    weight = draw(rows)
    for native in natives:
        assert torch.equal(repack(weight, rows, native), packing.pack(packing.unpack(weight, rows), native))


@pytest.mark.parametrize("name", ["lanes", "dots"])
def test_bytes_that_begin_anywhere(name):
    rows, native = PackedLayout(32, 64, 4, "packed"), PackedLayout(32, 64, 4, name)
    held = torch.randint(-128, 128, (32 * 32 + 3,), dtype=torch.int8)
    weight = held[3:].view(32, 32)
    assert torch.equal(repack(weight, rows, native), repack(weight.clone(), rows, native))
    by_columns = weight.T.contiguous().T
    assert torch.equal(repack(by_columns, rows, native), repack(weight, rows, native))


def test_equal_layouts_need_no_copy():
    rows = PackedLayout(3, 5, 4, "packed")
    weight = draw(rows)
    assert repack(weight, rows, PackedLayout(3, 5, 4, "packed")) is weight
