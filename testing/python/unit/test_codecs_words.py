"""Words of codes that are turned and permuted, against lists of codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitblas.codecs import words


def fields(word: int, width: int) -> list[int]:
    return [word >> shift & ((1 << width) - 1) for shift in range(0, 32, width)]


@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_turn(width, columns):
    before = torch.randint(-(2**31), 2**31, (32 // width, columns), dtype=torch.int32)
    after = before.clone()
    words.turn_(after, width)
    for column in range(columns):
        square = [fields(word, width) for word in before[:, column].tolist()]
        turned = [fields(word, width) for word in after[:, column].tolist()]
        assert turned == [list(line) for line in zip(*square, strict=True)]
    words.turn_(after, width)
    assert torch.equal(after, before)


@given(bits=st.integers(1, 8), k=st.integers(1, 70), n=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_permute(bits, k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    height = -(-k * bits // 32)
    source = torch.randint(-(2**31), 2**31, (height, n), dtype=torch.int32, generator=generator)
    order = torch.randperm(k, generator=generator)
    found = words.permute_codes(source, order, bits)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((n, height), torch.int32, True)
    for column in range(n):
        stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(source[:, column].tolist()))
        codes = [stream >> (bits * j) & ((1 << bits) - 1) for j in range(k)]
        expected = sum(codes[old] << (bits * new) for new, old in enumerate(order.tolist()))
        assert sum((word % 2**32) << (32 * i) for i, word in enumerate(found[column].tolist())) == expected


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_repeat_field(width):
    for value in (0, 1, (1 << width) - 1, 1 << (width - 1)):
        assert fields(words.repeat_field(value, width) % 2**32, width) == [value] * (32 // width)
        torch.zeros(1, dtype=torch.int32).add_(words.repeat_field(value, width))  # it is an int32
