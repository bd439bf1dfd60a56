"""Layouts: permutations whose places are those that the documents name."""

import pickle

import pytest

from bitblas.errors import ConfigError
from bitblas.formats import FORMATS
from bitblas.layout import PLANE_WIDTHS, PackedLayout

PACKED_SHAPES = [(1, 1), (1, 9), (3, 5), (5, 8), (16, 8), (17, 7), (2, 33)]
LANE_SHAPES = [(16, 8), (16, 40), (32, 8), (48, 24)]
WIDTHS = sorted({fmt.bits for fmt in FORMATS.values()})


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("N", "K"), PACKED_SHAPES)
def test_packed_is_a_permutation(N, K, bits):
    PackedLayout(N, K, bits, "packed").check()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("N", "K"), LANE_SHAPES)
def test_lanes_is_a_permutation(N, K, bits):
    layout = PackedLayout(N, K, bits, "lanes")
    layout.check()
    assert layout.num_bytes * 8 == N * K * bits  # nothing is padded


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("N", "K"), PACKED_SHAPES)
def test_packed_is_a_little_endian_stream_per_row(N, K, bits):
    layout = PackedLayout(N, K, bits, "packed")
    row = -(-K * bits // 8)
    assert layout.row_bytes == row
    assert layout.num_bytes == N * row
    for n in range(N):
        for k in range(K):
            expected = [((n * row * 8 + k * bits + i) // 8, (k * bits + i) % 8) for i in range(bits)]
            assert layout.locate(n, k) == expected


def _lane_places(N, K, bits, n, k):
    """A second spelling of the lane layout, from its shape: [plane][N / 16][K / 8][16 lanes][8 codes][bits]."""
    places, first_bit = [], 0
    for width in PLANE_WIDTHS[bits]:
        unit = 8 if width < 8 else 1
        index = 0
        for size, at in ((N // 16, n // 16), (K // unit, k // unit), (16, n % 16), (unit, k % unit)):
            index = index * size + at
        places += [divmod(first_bit + index * width + i, 8) for i in range(width)]
        first_bit += N * K * width
    return places


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("N", "K"), LANE_SHAPES)
def test_lanes_places(N, K, bits):
    layout = PackedLayout(N, K, bits, "lanes")
    for n in range(N):
        for k in range(K):
            assert layout.locate(n, k) == _lane_places(N, K, bits, n, k)


def test_lanes_example_of_the_docstring():
    N, K = 32, 24
    layout = PackedLayout(N, K, 4, "lanes")
    for n in range(N):
        for k in range(K):
            byte = ((n // 16) * (K // 8) + k // 8) * 64 + (n % 16) * 4 + k % 8 // 2
            assert layout.locate(n, k) == [(byte, k % 2 * 4 + i) for i in range(4)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("N", "K"), [*PACKED_SHAPES, *LANE_SHAPES])
def test_native(N, K, name):
    layout = PackedLayout.native(N, K, FORMATS[name])
    assert (layout.N, layout.K, layout.bits) == (N, K, FORMATS[name].bits)
    assert layout.name == ("lanes" if (N, K) in LANE_SHAPES else "packed")
    assert layout.num_bytes == PackedLayout(N, K, layout.bits, "packed").num_bytes
    layout.check()


@pytest.mark.parametrize(("N", "K"), [(15, 8), (17, 8), (16, 7), (16, 12), (1, 8), (16, 1)])
def test_lanes_refuses_what_would_need_padding(N, K):
    with pytest.raises(ConfigError, match=rf"needs N % 16 = K % 8 = 0, not N = {N}, K = {K}"):
        PackedLayout(N, K, 4, "lanes")


@pytest.mark.parametrize("name", ["", "Lanes", "native", None])
def test_unknown_layout(name):
    with pytest.raises(ConfigError, match=rf"layout name is {name!r}; allowed: packed, lanes"):
        PackedLayout(16, 8, 4, name)


def test_check_notices_shared_and_outlying_bits(monkeypatch):
    layout = PackedLayout(2, 4, 4, "packed")
    with monkeypatch.context() as patch:
        patch.setattr(PackedLayout, "locate", lambda self, n, k: [(0, 0)])
        with pytest.raises(ConfigError, match="two codes share a bit"):
            layout.check()
    with monkeypatch.context() as patch:
        patch.setattr(PackedLayout, "locate", lambda self, n, k: [(self.num_bytes + n * self.K + k, 0)])
        with pytest.raises(ConfigError, match="a code lies outside"):
            layout.check()


def test_layout_is_a_value():
    layout = PackedLayout(16, 8, 4)
    assert layout == PackedLayout(16, 8, 4, "lanes") != PackedLayout(16, 8, 4, "packed")
    assert len({layout, PackedLayout(16, 8, 4), PackedLayout(16, 8, 3)}) == 2
    assert pickle.loads(pickle.dumps(layout)) == layout
    with pytest.raises(AttributeError):
        layout.N = 32
