"""Packing: exact, and bit by bit where the layout says."""

import pytest
import torch

import reference
from bitblas import packing
from bitblas.errors import ArgumentError
from bitblas.formats import FORMATS
from bitblas.layout import PackedLayout

PACKED_SHAPES = [(1, 1), (5, 8), (3, 13), (17, 7), (33, 50)]
LANE_SHAPES = [(16, 8), (32, 40), (48, 24)]
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
CODE_DTYPES = {16: torch.int16, 32: torch.int32}


def layouts():
    for name in FORMATS:
        for N, K in PACKED_SHAPES + LANE_SHAPES:
            yield name, PackedLayout(N, K, FORMATS[name].bits, "packed")
        for N, K in LANE_SHAPES:
            yield name, PackedLayout(N, K, FORMATS[name].bits, "lanes")


CASES = [pytest.param(*case, id=f"{case[0]}-{case[1].name}-{case[1].N}x{case[1].K}") for case in layouts()]


def draw_codes(N, K, bits):
    codes = torch.randint(0, 1 << bits, (N, K))
    return codes, codes.to(CODE_DTYPES.get(bits, torch.uint8))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_round_trip(name, layout):
    _, codes = draw_codes(layout.N, layout.K, layout.bits)
    packed = packing.pack(codes, layout)
    assert packed.dtype is torch.int8
    assert packed.shape == (layout.N, layout.row_bytes)
    found = packing.unpack(packed, layout)
    assert found.dtype is codes.dtype
    assert torch.equal(found, codes)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_each_bit_lies_where_the_layout_says(name, layout):
    wide, codes = draw_codes(layout.N, layout.K, layout.bits)
    packed = packing.pack(codes, layout)
    memory = reference.unpack_bits(packed.view(1, -1), 1, layout.num_bytes * 8)[0]
    places = torch.tensor(
        [[[byte * 8 + bit for byte, bit in layout.locate(n, k)] for k in range(layout.K)] for n in range(layout.N)]
    )
    found = (memory[places] << torch.arange(layout.bits)).sum(-1)
    assert torch.equal(found, wide)
    assert memory.sum() == memory[places].sum()  # pad bits are 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("N", "K"), PACKED_SHAPES + LANE_SHAPES)
def test_packed_is_the_bit_stream_of_the_reference(name, N, K):
    bits = FORMATS[name].bits
    wide, codes = draw_codes(N, K, bits)
    layout = PackedLayout(N, K, bits, "packed")
    stream = reference.pack_bits(wide, bits)
    assert torch.equal(packing.pack(codes, layout), stream)
    assert torch.equal(packing.unpack(stream, layout), codes)


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8, 16])
def test_more_rows_than_are_packed_at_a_time(bits):
    N, K = 2 * packing._BLOCK_ROWS + 16, 16
    wide, codes = draw_codes(N, K, bits)
    rows, lanes = PackedLayout(N, K, bits, "packed"), PackedLayout(N, K, bits, "lanes")
    assert torch.equal(packing.pack(codes, rows), reference.pack_bits(wide, bits))
    for layout in (rows, lanes):
        assert torch.equal(packing.unpack(packing.pack(codes, layout), layout), codes)
    if bits < 8:
        assert torch.equal(packing.encode(wide, FORMATS[f"uint{bits}"]), codes)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("layout_name", ["packed", "lanes"])
def test_strided_codes_and_weights(bits, layout_name):
    layout = PackedLayout(16, 24, bits, layout_name)
    _, codes = draw_codes(16, 24, bits)
    packed = packing.pack(codes, layout)
    assert torch.equal(packing.pack(codes.T.contiguous().T, layout), packed)
    spread = torch.empty((16, 2 * layout.row_bytes), dtype=torch.int8)[:, ::2]
    spread.copy_(packed)
    assert torch.equal(packing.unpack(spread, layout), codes)
    assert torch.equal(packing.unpack(packed.view(torch.uint8), layout), codes)


@pytest.mark.parametrize(
    ("N", "K", "bits", "shape"), [(5, 8, 4, (8, 5)), (5, 8, 4, (5, 7)), (5, 8, 4, (40,)), (5, 8, 4, (1, 5, 8))]
)
def test_pack_refuses_other_shapes(N, K, bits, shape):
    with pytest.raises(ArgumentError, match=rf"codes have shape .*expected \({N}, {K}\)"):
        packing.pack(torch.zeros(shape, dtype=torch.uint8), PackedLayout(N, K, bits, "packed"))


def test_unpack_refuses_other_sizes():
    with pytest.raises(ArgumentError, match="packed weights have 21 bytes; this layout has 20"):
        packing.unpack(torch.zeros(21, dtype=torch.int8), PackedLayout(5, 8, 4, "packed"))


# -- encode ----------------------------------------------------------------------------------------------------------------


def representable(values, dtype):
    return torch.equal(values.to(dtype).to(torch.float64), values)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.bits <= 8 and fmt.kind != "float8"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    ],
)  # fmt: skip
def test_encode_every_value(name, dtype):
    codes = torch.arange(1 << FORMATS[name].bits).view(2, -1)
    values = codes.to(torch.float64) if name in ("nf4", "fp4_e2m1") else reference.decode(codes, name)
    if not representable(values, dtype):
        pytest.skip(f"{dtype} does not hold every value of {name}")
    found = packing.encode(values.to(dtype), FORMATS[name])
    assert found.dtype is torch.uint8
    assert torch.equal(found, codes.to(torch.uint8))
    back = packing.decode_codes(found, FORMATS[name])
    assert torch.equal(back.to(torch.float64), values)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_encode_refuses_what_is_out_of_range(name, side, dtype):
    low, high = int(reference.table(name).min()), int(reference.table(name).max())
    wrong = low - 1 if side == "low" else high + 1
    values = torch.full((3, 5), high, dtype=dtype)
    values[2, 4] = wrong
    with pytest.raises(ArgumentError, match=rf"^w holds {wrong}; allowed for {name}: {low} to {high}$"):
        packing.encode(values, FORMATS[name])


@pytest.mark.parametrize("wrong", [2**31, -(2**31), 2**40 + 1, 256, 65536, -65536, 2**62])
@pytest.mark.parametrize("name", ["uint4", "int8", "uint8", "int1"])
def test_encode_does_not_wrap(name, wrong):
    values = torch.ones((2, 3), dtype=torch.int64)
    values[0, 1] = wrong
    with pytest.raises(ArgumentError, match=rf"^w holds .*; allowed for {name}"):
        packing.encode(values, FORMATS[name])


@pytest.mark.parametrize("name", ["nf4", "fp4_e2m1"])
@pytest.mark.parametrize("wrong", [-1, 16])
def test_encode_refuses_codes_beyond_the_codebook(name, wrong):
    with pytest.raises(ArgumentError, match=rf"^w holds {wrong}; allowed for {name}: 0 to 15$"):
        packing.encode(torch.full((2, 2), wrong), FORMATS[name])


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 0.5])
def test_encode_refuses_what_is_no_integer(name, wrong):
    values = torch.ones((2, 3))
    values[1, 2] = wrong
    with pytest.raises(ArgumentError, match=rf"^w holds {wrong:g}; allowed for {name}: "):
        packing.encode(values, FORMATS[name])


def test_encode_refuses_zero_for_int1():
    with pytest.raises(ArgumentError, match=r"^w holds 0; allowed for int1: -1 and 1$"):
        packing.encode(torch.tensor([[1, 0, -1]]), FORMATS["int1"])


@pytest.mark.parametrize("name", ["uint4", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_encode_refuses_dtypes_that_are_no_numbers(name, dtype):
    with pytest.raises(ArgumentError, match=rf"^w has dtype {dtype}"):
        packing.encode(torch.ones((2, 2), dtype=dtype), FORMATS[name])


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
def test_encode_float8(name):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    fmt = FORMATS[name]
    for held in (codes, codes.view(torch.int8), codes.view(getattr(torch, fmt.torch_name))):
        assert torch.equal(packing.encode(held, fmt), codes)
    assert packing.decode_codes(codes, fmt).dtype is getattr(torch, fmt.torch_name)
    with pytest.raises(ArgumentError, match=rf"^w has dtype torch.float16; allowed: torch.{fmt.torch_name}"):
        packing.encode(codes.to(torch.float16), fmt)


def test_encode_refuses_the_other_float8():
    with pytest.raises(ArgumentError, match=r"^w has dtype torch.float8_e5m2; allowed: torch.float8_e4m3fn"):
        packing.encode(torch.ones((2, 2)).to(torch.float8_e5m2), FORMATS["float8_e4m3"])


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_encode_native(name, dtype):
    values = torch.randn((16, 8), dtype=torch.float64).to(dtype)
    codes = packing.encode(values, FORMATS[name])
    assert codes.dtype is packing.code_dtype(FORMATS[name])
    mask = (1 << FORMATS[name].bits) - 1
    assert torch.equal(codes.to(torch.int64) & mask, reference.float_codes(values, name))
    assert torch.equal(packing.decode_codes(codes, FORMATS[name]), values.to(getattr(torch, name)))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_encode_native_refuses_integers(name):
    with pytest.raises(ArgumentError, match=rf"^w has dtype torch.int64; {name} weights must be floating-point$"):
        packing.encode(torch.ones((2, 2), dtype=torch.int64), FORMATS[name])


def test_encode_blames_the_argument():
    with pytest.raises(ArgumentError, match=r"^qweight holds 4; "):
        packing.encode(torch.tensor([[4]]), FORMATS["uint2"], "qweight")


def test_encode_strided():
    values = torch.randint(-4, 4, (10, 6))
    assert torch.equal(packing.encode(values.T, FORMATS["int3"]), (values.T + 4).to(torch.uint8))
