"""`bitblas.quantization`: byte by byte what the original's loops give, written here a second time with plain integers."""

import warnings

import numpy as np
import pytest
import torch

import bitblas.quantization
from bitblas import packing
from bitblas.errors import ArgumentError
from bitblas.quantization import gen_quant4, general_compress, interleave_weight
from bitblas.quantization import utils as quantization_utils

BITS = [1, 2, 4, 8]
INTEGER_DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def joined(values, bits):
    """The bytes of a row of integers: shifted, OR-ed together, and cut to eight bits."""
    per_byte, found = 8 // bits, []
    for first in range(0, len(values), per_byte):
        byte = 0
        for place in range(per_byte):
            byte |= int(values[first + place]) << (bits * place)
        found.append(byte & 255)
    return found


def reference_bytes(weight, bits):
    rows = weight.reshape(-1, weight.shape[-1])
    found = np.array([joined(row, bits) for row in rows], dtype=np.uint8)
    return found.reshape(*weight.shape[:-1], weight.shape[-1] * bits // 8)


def draw(low, high, shape, dtype):
    return np.random.default_rng(0).integers(low, high, shape).astype(dtype)


# -- general_compress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [*INTEGER_DTYPES, "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(16,), (3, 8), (2, 3, 24), (1, 2, 3, 8)])
def test_codes(bits, dtype, shape):
    weight = draw(0, 1 << min(bits, 7), shape, dtype)
    found = general_compress(weight, bits)
    assert found.dtype == np.int8
    assert found.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert np.array_equal(found.view(np.uint8), reference_bytes(weight, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "float16"])
def test_signed_values_are_not_masked(bits, dtype):
    weight = draw(-(1 << (bits - 1)), 1 << (bits - 1), (5, 16), dtype)
    assert np.array_equal(general_compress(weight, bits).view(np.uint8), reference_bytes(weight, bits))


def test_a_negative_value_reaches_into_those_above_it():
    assert general_compress(np.array([3, -1, 0, 2], dtype=np.int8), 4).tolist() == [-13, 32]
    assert general_compress(np.array([-1, 3], dtype=np.int8), 4).tolist() == [-1]


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float16"])
def test_all_bytes(dtype):
    weight = np.arange(0, 256).astype(dtype)
    assert np.array_equal(general_compress(weight, 8).view(np.uint8), np.arange(256))


def test_defaults_are_four_bits_in_int8():
    assert general_compress(np.array([[1, 2, 15, 0]], dtype=np.int8)).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [*INTEGER_DTYPES, "float16"])
def test_storage_dtype_is_another_view_of_the_bytes(bits, dtype):
    weight = draw(0, 1 << bits, (3, 128), "uint8")
    for given in (np.dtype(dtype), dtype, getattr(np, dtype)):
        found = general_compress(weight, source_bits=bits, storage_dtype=given)
        assert found.dtype == np.dtype(dtype)
        assert found.tobytes() == reference_bytes(weight, bits).tobytes()


def test_any_memory_layout_and_nothing_is_changed():
    weight = draw(0, 16, (8, 12), "int32")
    expected = general_compress(weight)
    frozen = weight.copy()
    frozen.flags.writeable = False
    wide = np.zeros((8, 24), np.int32)
    wide[:, ::2] = weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (np.asfortranarray(weight), wide[:, ::2], frozen, weight.astype(">i4"), weight[::-1][::-1]):
            assert np.array_equal(general_compress(given), expected)
    assert general_compress(np.array([[True, False] * 4]), 1).tolist() == [[0x55]]
    eight = np.array([[1, 2]], dtype=np.int8)
    general_compress(eight, 8)[:] = 9
    assert eight.tolist() == [[1, 2]]


def test_empty():
    assert general_compress(np.zeros((0, 8), np.int8)).shape == (0, 4)
    assert general_compress(np.zeros((3, 0), np.float16)).shape == (3, 0)


@pytest.mark.parametrize("bits", [0, 3, 5, 16, -4, 4.0, "4", True, None])
def test_compress_refuses_bits(bits):
    with pytest.raises(ArgumentError, match=rf"^source_bits is {bits!r}; allowed: 1, 2, 4, 8$"):
        general_compress(np.zeros((2, 8), np.int8), bits)


@pytest.mark.parametrize(("bits", "k", "multiple"), [(4, 7, 2), (2, 6, 4), (1, 12, 8)])
def test_compress_refuses_rows_that_do_not_fill_bytes(bits, k, multiple):
    with pytest.raises(ArgumentError, match=rf"^lowprecision_weight has shape \(2, {k}\); .* multiple of {multiple}, "):
        general_compress(np.zeros((2, k), np.int8), bits)
    with pytest.raises(ArgumentError, match=r"^lowprecision_weight has shape \(\); "):
        general_compress(np.array(1), bits)


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([256, 0], "int32", r"holds 256; allowed: -128 to 255"),
        ([0, -129], "int64", r"holds -129; allowed: -128 to 255"),
        ([0, 2**40], "uint64", r"holds 1.09951e\+12; allowed: -128 to 255"),
        ([0.5, 0], "float16", r"holds 0.5; allowed: whole numbers from -128 to 255"),
        ([float("nan"), 0], "float16", r"holds nan; allowed: -128 to 255"),
        ([0, float("inf")], "float16", r"holds inf; allowed: -128 to 255"),
        ([1j, 0], "complex64", r"has dtype complex64; it must hold real numbers"),
        (["a", "b"], "str", r"has dtype <U1; it must hold real numbers"),
        ([None, 0], "object", r"has dtype object; it must hold real numbers"),
        ([1, 0], "longdouble", r"has dtype float128; it must hold real numbers of at most 64 bits"),
    ],
)
def test_compress_refuses_values(values, dtype, message):
    with pytest.raises(ArgumentError, match=rf"^lowprecision_weight {message}"):
        general_compress(np.array([values], dtype=dtype))


@pytest.mark.parametrize("weight", [[[1, 2]], 3, None, torch.zeros((2, 8), dtype=torch.int8)])
def test_compress_refuses_what_is_no_array(weight):
    with pytest.raises(ArgumentError, match=rf"^lowprecision_weight is a {type(weight).__name__}; .*numpy.ndarray"):
        general_compress(weight)


@pytest.mark.parametrize("dtype", ["nothing", object, "U4", torch.int8, "complex64", np.bool_])
def test_compress_refuses_storage_dtypes(dtype):
    with pytest.raises(ArgumentError, match=r"^storage_dtype is .*; it must be a numpy dtype of numbers"):
        general_compress(np.zeros((2, 8), np.int8), storage_dtype=dtype)


def test_compress_refuses_rows_that_do_not_fill_elements():
    with pytest.raises(
        ArgumentError, match=r"^storage_dtype is int32; the 6 bytes of a row are not a multiple of its 4$"
    ):
        general_compress(np.zeros((2, 12), np.int8), storage_dtype=np.int32)


# -- interleave_weight -----------------------------------------------------------------------------------------------------


def dealt(word, bits, width):
    """A word whose codes are dealt out to lanes of `width` bits: code o to lane o % lanes."""
    lanes, found = 32 // width, 0
    for code in range(32 // bits):
        value = word >> (bits * code) & ((1 << bits) - 1)
        found |= value << (code % lanes * width + code // lanes * bits)
    return found


#: Which nibble, or byte, of the dealt word comes to each place, where that is not the end: what the decoders read.
_REGROUPED = {("float16", 1): (4, [0, 4, 1, 5, 2, 6, 3, 7]), ("int8", 1): (4, [0, 4, 2, 6, 1, 5, 3, 7])}
_REGROUPED[("float16", 2)] = (8, [0, 2, 1, 3])


def interleaved(word, bits, dtype):
    word = dealt(word, bits, {"float16": 16, "int8": 8}[dtype])
    width, places = _REGROUPED.get((dtype, bits), (32, [0]))
    mask = (1 << width) - 1
    return sum((word >> (width * source) & mask) << (width * place) for place, source in enumerate(places))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(4,), (3, 8), (2, 3, 20)])
def test_interleave(bits, dtype, shape):
    weight = draw(-128, 128, shape, "int8")
    found = interleave_weight(weight, bits, dtype)
    assert found.dtype == np.int8
    assert found.shape == weight.shape
    expected = [interleaved(int(word), bits, dtype) for word in weight.view(np.uint32).flat]
    assert found.view(np.uint32).flatten().tolist() == expected
    assert np.array_equal(interleave_weight(weight.view(np.int32), bits, dtype), found)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("bits", BITS)
def test_interleave_loses_nothing(bits, dtype):
    words = np.uint32(1) << np.arange(32, dtype=np.uint32)  # each bit alone
    found = interleave_weight(words, bits, dtype).view(np.uint32)
    assert sorted(found.tolist()) == words.tolist()


def test_interleave_by_hand():
    codes = np.arange(8, dtype=np.int8)[None]
    packed = general_compress(codes, 4)
    assert interleave_weight(packed).view(np.uint32).tolist() == [[0x75316420]]
    assert interleave_weight(packed, 4, "int8").view(np.uint32).tolist() == [[0x73625140]]
    # a decoder of 1-bit codes to float16 reads 8 from a byte: the even ones from its low half, the odd ones from its high half
    evens = general_compress(np.array([1, 0] * 16, dtype=np.int8), 1)
    assert interleave_weight(evens, 1).view(np.uint8).tolist() == [0x0F] * 4


@pytest.mark.parametrize("bits", BITS)
def test_interleave_of_more_words_than_are_moved_at_a_time(bits, monkeypatch):
    weight = draw(-128, 128, (5, 20), "int8")
    expected = interleave_weight(weight, bits)
    monkeypatch.setattr(packing, "_BLOCK_UNITS", 3)
    assert np.array_equal(interleave_weight(weight, bits), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 4), np.int8), 3), r"nbits is 3; allowed: 1, 2, 4, 8"),
        ((np.zeros((2, 4), np.int8), 4, "float32"), r"target_dtype is 'float32'; allowed: float16, int8"),
        ((np.zeros((2, 6), np.int8), 4), r"qweight has shape \(2, 6\); its last axis must have a multiple of 4 bytes"),
        ((np.zeros((), np.int32), 4), r"qweight has shape \(\); "),
        ((np.zeros((2, 4), np.float16), 4), r"qweight has dtype torch.float16; it must be packed integers"),
        ((torch.zeros((2, 4), dtype=torch.int8), 4), r"qweight is a Tensor; it must be a numpy.ndarray"),
    ],
)
def test_interleave_refuses(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        interleave_weight(*arguments)


# -- gen_quant4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "groupsize"), [(64, 32, -1), (64, 32, 64), (128, 16, 32), (6, 5, 2), (1, 1, -1)])
def test_gen_quant4(k, n, groupsize):
    torch.manual_seed(7)
    w, linear, s, q = gen_quant4(k, n, groupsize)
    torch.manual_seed(7)
    assert torch.equal(w, torch.randn((k, n), dtype=torch.half))
    group = k if groupsize == -1 else groupsize
    assert (w.shape, s.shape, q.shape) == ((k, n), (k // group, n), (k, n))
    assert (w.dtype, s.dtype, q.dtype) == (torch.float16, torch.float16, torch.int32)
    assert isinstance(linear, torch.nn.Linear)
    assert (linear.in_features, linear.out_features, linear.bias) == (k, n, None)
    assert linear.weight.shape == (n, k)
    assert linear.weight.dtype is torch.float16
    for column in range(n):
        for g in range(k // group):
            rows = range(g * group, (g + 1) * group)
            scale = np.float16(max(abs(w[row, column].item()) for row in rows)) * np.float16(2 / 16)
            assert s[g, column].item() == scale
            for row in rows:
                code = round(float(np.float16(w[row, column].item()) / scale))
                assert q[row, column].item() == min(max(code + 8, 0), 16) - 8
                assert linear.weight[column, row].item() == np.float16(code) * scale


def test_gen_quant4_stays_on_the_cpu():
    with torch.device("meta"):
        w, linear, s, q = gen_quant4(8, 4)
    assert {t.device.type for t in (w, linear.weight, s, q)} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "k is 0; it must be an integer of at least 1"),
        ((8, 4.0), "n is 4.0; it must be an integer of at least 1"),
        ((8, True), "n is True; "),
        ((8, 4, 3), "groupsize is 3; it must be -1 or a divisor of k = 8"),
        ((8, 4, 0), "groupsize is 0; "),
        ((8, 4, -2), "groupsize is -2; "),
        ((8, 4, None), "groupsize is None; "),
    ],
)
def test_gen_quant4_refuses(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        gen_quant4(*arguments)


def test_names():
    for name in ("general_compress", "interleave_weight", "gen_quant4"):
        assert getattr(bitblas.quantization, name) is getattr(quantization_utils, name)
