"""The table of formats, against the documents that define them."""

import math
import pickle
import statistics

import pytest
import torch

import reference
from bitblas.errors import ConfigError
from bitblas.formats import ALIASES, FORMATS, DataFormat, parse_format
from bitblas.layout import PLANE_WIDTHS

SMALL = [name for name, fmt in FORMATS.items() if fmt.bits <= 5]
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]


def test_which_formats_there_are():
    expected = {f"{kind}{bits}" for kind in ("uint", "int") for bits in range(1, 9)}
    expected |= {"nf4", "fp4_e2m1", "float8_e4m3", "float8_e5m2", "float16", "bfloat16", "float32"}
    assert set(FORMATS) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_row(name):
    fmt = FORMATS[name]
    assert fmt.name == name
    assert fmt.bits == reference.width(name)
    assert fmt.is_integer == name.startswith(("uint", "int"))
    assert fmt.is_native == (name in ("float16", "bfloat16", "float32"))
    planes = PLANE_WIDTHS[fmt.bits]
    assert sum(planes) == fmt.bits
    assert list(planes) == sorted(planes, reverse=True)
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    assert hash(fmt) == hash(pickle.loads(pickle.dumps(fmt)))


@pytest.mark.parametrize("name", SMALL)
def test_value_of_each_code(name):
    assert list(FORMATS[name].code_values) == reference.table(name).tolist()


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in SMALL])
def test_no_code_table_for_wide_formats(name):
    with pytest.raises(ConfigError, match=f"{name} has no code table"):
        _ = FORMATS[name].code_values


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_range_and_offset(name):
    fmt, values = FORMATS[name], reference.table(name)
    assert fmt.value_range == (values.min(), values.max())
    if name not in ("int1", "int8"):
        assert [code - fmt.code_offset for code in range(1 << fmt.bits)] == values.tolist()


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in INTEGERS])
def test_no_integer_range(name):
    with pytest.raises(ConfigError, match=f"{name} is not an integer format"):
        _ = FORMATS[name].value_range


def test_nf4_holds_the_quantiles_of_the_paper():
    """Appendix E: 7 negative and 8 positive evenly spaced quantiles of N(0, 1), and 0, scaled to [-1, 1]."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = statistics.NormalDist().inv_cdf

    def side(count):
        return [quantile(outermost + (0.5 - outermost) * i / count) / quantile(outermost) for i in range(count)]

    expected = sorted([-v for v in side(7)] + [0.0] + side(8))
    assert list(FORMATS["nf4"].codebook) == pytest.approx(expected, abs=1e-6)


def test_fp4_is_negative_from_8_on():
    book = FORMATS["fp4_e2m1"].codebook
    assert book[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert book[8:] == tuple(-v for v in book[:8])
    assert math.copysign(1, book[8]) == -1


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
def test_the_reference_decodes_float8_as_torch_does(name):
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(getattr(torch, FORMATS[name].torch_name)).to(torch.float64)
    torch.testing.assert_close(reference.table(name), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.torch_name])
def test_torch_dtype_is_as_wide_as_the_code(name):
    assert torch.empty(0, dtype=getattr(torch, FORMATS[name].torch_name)).element_size() * 8 == FORMATS[name].bits


@pytest.mark.parametrize("name", FORMATS)
def test_parse_canonical(name):
    assert parse_format(name) is FORMATS[name]


@pytest.mark.parametrize("alias", ALIASES)
def test_parse_alias(alias):
    assert alias not in FORMATS
    assert parse_format(alias) is FORMATS[ALIASES[alias]]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"])
def test_parse_torch_dtype(name):
    assert parse_format(getattr(torch, name)).bits == reference.width(name.removesuffix("fn"))


@pytest.mark.parametrize(
    "name", ["int9", "uint0", "int32", "float64", "nf3", "", " int4", "INT4", None, 4, torch.int64, []]
)
def test_parse_unknown(name):
    with pytest.raises(ConfigError, match=r"^W_dtype is .*, which is no format; allowed: uint1, uint2") as caught:
        parse_format(name)
    assert repr(name) in str(caught.value)


def test_parse_blames_the_argument():
    with pytest.raises(ConfigError, match=r"^source_format is 'x'"):
        parse_format("x", "source_format")


def test_a_row_proves_itself():
    with pytest.raises(ConfigError, match="a codebook of 4 bits has 16 entries"):
        DataFormat("bad", "codebook", 4, (0.0, 1.0))


@pytest.mark.parametrize("bits", PLANE_WIDTHS)
def test_plane_widths(bits):
    assert sum(PLANE_WIDTHS[bits]) == bits
    assert all(width & (width - 1) == 0 for width in PLANE_WIDTHS[bits])
