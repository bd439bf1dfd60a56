"""`format_tensor` and `parse_format_tensor`: what travels beside packed weights, and that nothing else is taken for it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitblas.codecs import format_tensor, parse_format_tensor
from bitblas.errors import ArgumentError, ConfigError
from bitblas.formats import ALIASES, FORMATS

MODES = [None, "original", "rescale", "quantized"]


def tensor_of(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text.ljust(128)), dtype=torch.uint8)


def test_the_bytes():
    found = format_tensor("uint4", 128, "quantized")
    assert (found.dtype, tuple(found.shape), found.device.type) == (torch.uint8, (128,), "cpu")
    expected = b'{"W_dtype": "uint4", "group_size": 128, "version": 1, "zeros_mode": "quantized"}'
    assert bytes(found.tolist()) == expected.ljust(128)
    assert b'"zeros_mode": null' in bytes(format_tensor("nf4", -1).tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(name, mode):
    for group in (-1, 1, 32, 2**40):
        fields = {"W_dtype": name, "group_size": group, "zeros_mode": mode}
        assert parse_format_tensor(format_tensor(**fields)) == fields


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_become_names(alias):
    assert parse_format_tensor(format_tensor(alias, 32))["W_dtype"] == ALIASES[alias]


def test_the_default_device_is_not_asked():
    with torch.device("meta"):
        assert format_tensor("uint4", 32).device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("uint4", 0), "group_size is 0; allowed: -1 and integers of at least 1"),
        (("uint4", -2), "group_size is -2; "),
        (("uint4", True), "group_size is True; "),
        (("uint4", 32.0), "group_size is 32.0; "),
        (("uint4", 32, "packed"), "zeros_mode is 'packed'; allowed: None, original, rescale, quantized"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        format_tensor(*arguments)


def test_refuses_formats():
    with pytest.raises(ConfigError, match=r"^W_dtype is 'uint9', which is no format"):
        format_tensor("uint9", 32)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "format is None; expected torch.uint8"),
        (torch.zeros(127, dtype=torch.uint8), r"format is torch.uint8 \(127,\); expected torch.uint8, \(128,\)"),
        (torch.zeros(128, dtype=torch.int8), "format is torch.int8 "),
        (torch.zeros(128, dtype=torch.uint8), "format holds .*; expected a JSON object"),
        (tensor_of(b"\xff{}"), "format holds .*; expected a JSON object"),
        (tensor_of(b"[1]"), r"format holds b.\[1\].; expected a JSON object"),
        (tensor_of(b"{}"), "format holds .*; expected version 1"),
    ],
)
def test_refuses_tensors(tensor, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        parse_format_tensor(tensor)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"W_dtype": "uint9"},
        {"W_dtype": "half"},
        {"W_dtype": ["uint4"]},
        {"group_size": 0},
        {"group_size": 32.0},
        {"zeros_mode": "packed"},
        {"zeros_mode": []},
        {"more": 1},
    ],
)
def test_refuses_fields(change):
    fields = {"W_dtype": "uint4", "group_size": 32, "zeros_mode": None, "version": 1, **change}
    with pytest.raises(ArgumentError, match=r"^format holds "):
        parse_format_tensor(tensor_of(json.dumps(fields, sort_keys=True).encode()))


def test_refuses_other_ways_to_write_it():
    fields = {"W_dtype": "uint4", "group_size": 32, "zeros_mode": None, "version": 1}
    for text in (json.dumps(fields), json.dumps(fields, sort_keys=True, separators=(",", ":"))):
        with pytest.raises(ArgumentError, match="sorted keys"):
            parse_format_tensor(tensor_of(text.encode()))
    del fields["zeros_mode"]
    with pytest.raises(ArgumentError, match="expected W_dtype"):
        parse_format_tensor(tensor_of(json.dumps(fields, sort_keys=True).encode()))


@given(st.sampled_from(list(FORMATS)), st.integers(1, 4096), st.sampled_from(MODES), st.integers(0, 1023))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_is_never_the_same_format(name, group, mode, bit):
    tensor = format_tensor(name, group, mode)
    fields = parse_format_tensor(tensor)
    tensor[bit // 8] ^= 1 << bit % 8
    try:
        found = parse_format_tensor(tensor)
    except ArgumentError:
        return
    assert found != fields
