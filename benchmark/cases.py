"""What is measured: kinds of matmul, shapes and rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from bitblas import MatmulConfig
from bitblas.formats import FORMATS

HEADLINE = (4096, 4096)
SHAPES = (HEADLINE, (11008, 4096), (4096, 11008), (1024, 8192))
MORE_SHAPES = ((14336, 4096), (8192, 8192))
SMALL_SHAPES = ((1024, 1024), (512, 512), (256, 256))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
FEW_ROWS = (1, 16, 128)
FLOATS = ("float16", "bfloat16", "float32")

_GIVEN_INT8: dict[str, object] = {"A_dtype": "int8", "dynamic_quantization": None, "activation_eps": None}
#: Own operators that a case may be timed beside, by name: fields of the config that differ.
VARIANTS: dict[str, dict[str, object]] = {
    "bitblas, float32 activations": {"A_dtype": "float32", "out_dtype": "float32"},
    "bitblas, no scales": {"with_scaling": False, "group_size": -1, "out_dtype": "int32", "accum_dtype": "int32"},
    "bitblas, dense cache": {},  # the same config, with an option of the operator, on cards
    "bitblas, operator": {},  # of a layer
    "bitblas, int8 activations": _GIVEN_INT8,
    "bitblas, 64 columns": {"N": 64},
    "bitblas, 64 columns, int8 activations": {"N": 64, **_GIVEN_INT8},
}
FLOAT32_VARIANT, PLAIN_VARIANT, DENSE_CACHE_VARIANT, *LAYER_VARIANTS = VARIANTS


@dataclass(frozen=True)
class Case:
    """A kind of matmul at one shape, for some numbers of rows.

    Attributes
    ----------
    name : str
        The kind.
    config : MatmulConfig
        The question.
    rows : tuple of int
        The numbers of rows, each a cell.
    target : str or None
        What to compile for; None means this machine.
    peers : str
        A pattern that the names of its peers match.
    variants : tuple of str
        Names in `VARIANTS`.
    """

    name: str
    config: MatmulConfig
    rows: tuple[int, ...]
    target: str | None = None
    peers: str = field(default="", compare=False)
    variants: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.config.N, self.config.K


def _peer_pattern(a_dtype: str) -> str:
    """Whom to compare with: torch's float16 is many times as slow as its float32, and its bfloat16 has no use for int8."""
    return r"^(?!torch (float16|bfloat16))" if a_dtype == "int8" else r"^(?!torch float16)"


def case(
    a_dtype: str,
    w_dtype: str,
    shape: tuple[int, int],
    rows: Sequence[int],
    zeros: str | None = None,
    scaled: bool | None = None,
    label: str = "",
    **fields: object,
) -> Case:
    """A case by its dtypes.

    Parameters
    ----------
    zeros : str, optional
        The kind of zero points, where there are any.
    scaled : bool, optional
        Whether there are scales in groups of 128; default: yes, but for int8 activations and native dtypes.
    label : str
        Added to the name, to say what `fields` do.
    fields
        Further fields of MatmulConfig.
    """
    plain = not scaled if scaled is not None else a_dtype == "int8" or FORMATS[w_dtype].is_native
    integers = a_dtype == "int8" and plain
    asked: dict[str, object] = {
        "A_dtype": a_dtype,
        "W_dtype": w_dtype,
        "out_dtype": "int32" if integers else "float32" if a_dtype == "int8" else a_dtype,
        "accum_dtype": "int32" if integers else "float32",
        "with_scaling": not plain,
        "group_size": -1 if plain else 128,
        "with_zeros": zeros is not None,
        "zeros_mode": zeros or "original",
        **fields,
    }
    config = MatmulConfig(M=tuple(rows), N=shape[0], K=shape[1], **asked)  # type: ignore[arg-type]
    name = f"{a_dtype} x {w_dtype}" + ("" if plain else " g128") + (" + zeros" if zeros else "")
    return Case(name + (f", {label}" if label else ""), config, tuple(rows), peers=_peer_pattern(a_dtype))


def uint4(a_dtype: str, shape: tuple[int, int], rows: Sequence[int]) -> Case:
    """4 bits in groups of 128 with zeros; float16 at the headline shape beside float32."""
    found = case(a_dtype, "uint4", shape, rows, "quantized")
    both = a_dtype == "float16" and shape == HEADLINE
    return replace(found, variants=(FLOAT32_VARIANT,)) if both else found


def dynamic(shape: tuple[int, int], rows: Sequence[int]) -> Case:
    """The headline case with activations quantized on the fly, beside peers that do the same."""
    return case("float16", "uint4", shape, rows, "quantized", label="int8 by row", dynamic_quantization="row")


def scaled_integers(rows: Sequence[int] = FEW_ROWS) -> Case:
    """int8 times int4 with scales in groups, beside the same without."""
    return replace(case("int8", "int4", HEADLINE, rows, scaled=True), variants=(PLAIN_VARIANT,))


def small(rows: Sequence[int] = FEW_ROWS) -> list[Case]:
    """Where the cost of a call counts: beside torch's linear of the same dtype, and no graphs of many copies."""
    found = [case(a_dtype, "uint4", shape, rows, "quantized") for shape in SMALL_SHAPES for a_dtype in FLOATS]
    return [replace(each, peers=f"^torch ({each.config.A_dtype}|float32)$") for each in found]


def formats(rows: Sequence[int] = (1, 128)) -> list[Case]:
    """Every format but uint4, with float16 activations, or its own dtype where it is one."""
    return [
        case(name if fmt.is_native else "float16", name, HEADLINE, rows)
        for name, fmt in FORMATS.items()
        if name != "uint4"
    ]


def avx2(rows: Sequence[int] = FEW_ROWS) -> list[Case]:
    """The headline case with the instructions of AVX2 alone, which this machine must have."""
    found = [case(a_dtype, "uint4", HEADLINE, rows, "quantized") for a_dtype in ("float16", "float32")]
    return [
        replace(each, name=f"{each.name} on haswell", target="llvm -mcpu=haswell", peers="^torch float32$")
        for each in found
    ]


def full() -> list[Case]:
    """Every cell of four kinds and four shapes, and samples of the rest: about an hour."""
    found = []
    for shape in SHAPES:
        found.append(uint4("float16", shape, (*ROWS, 2048) if shape == HEADLINE else ROWS))
        found.append(case("float16", "uint2", shape, ROWS))
        found.append(case("int8", "int4", shape, ROWS))
        found.append(case("int8", "int2", shape, ROWS))
        found.append(uint4("bfloat16", shape, ROWS if shape == HEADLINE else FEW_ROWS))
    found.append(uint4("float32", HEADLINE, (1, 16, 128, 512)))
    found.append(scaled_integers())
    found.append(dynamic(HEADLINE, ROWS))
    found.append(case("int8", "int8", HEADLINE, (1, 16, 32, 64, 128, 512)))
    found += [case("int8", name, HEADLINE, FEW_ROWS) for name in ("uint4", "uint2")]
    found += small()
    found += [uint4("float16", shape, FEW_ROWS) for shape in MORE_SHAPES]
    found += formats(FEW_ROWS)
    found += avx2()
    return merged(found)


def quick() -> list[Case]:
    """The headline shape, a few formats and rows, one small shape: less than five minutes."""
    found = [uint4("float16", HEADLINE, (1, 16, 128, 512)), uint4("bfloat16", HEADLINE, (1, 128))]
    found += [case("int8", "int4", HEADLINE, (1, 16, 128, 512)), case("int8", "int2", HEADLINE, (1, 128))]
    found += [scaled_integers((1,)), dynamic(HEADLINE, (1, 128))]
    found += [case("float16", name, HEADLINE, (1,)) for name in ("uint1", "uint2", "uint3", "nf4", "int8")]
    return found + [each for each in small((1, 16)) if each.shape == (1024, 1024)]


def merged(found: Iterable[Case]) -> list[Case]:
    """The same cells with each of them once: rows of cases of one name, shape and target together."""
    kept: dict[tuple[object, ...], Case] = {}
    for each in found:
        key = (each.name, each.shape, each.target)
        if key in kept:
            rows = tuple(dict.fromkeys((*kept[key].rows, *each.rows)))
            kept[key] = with_rows(kept[key], rows)
        else:
            kept[key] = each
    return list(kept.values())


def with_rows(found: Case, rows: Sequence[int]) -> Case:
    """A case for other rows."""
    return replace(found, rows=tuple(rows), config=replace(found.config, M=tuple(rows)))


@dataclass(frozen=True)
class Filter:
    """Which cells to measure; what is empty leaves all.

    Attributes
    ----------
    match : str
        A part of the case's name.
    rows : tuple of int
        Numbers of rows.
    shapes : tuple of (int, int)
        N and K.
    """

    match: str = ""
    rows: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()

    def apply(self, found: Iterable[Case]) -> list[Case]:
        """The cases with the rows that pass; operators are built for all rows of a case, so that they stay the same."""
        kept = []
        for each in found:
            rows = tuple(m for m in each.rows if not self.rows or m in self.rows)
            if rows and self.match in each.name and (not self.shapes or each.shape in self.shapes):
                kept.append(replace(each, rows=rows))
        return kept


def parse_rows(text: str) -> tuple[int, ...]:
    """ "1,16" -> (1, 16).

    Raises
    ------
    ValueError
        It is no list of positive integers.
    """
    found = tuple(int(part) for part in text.split(",") if part)
    if any(m < 1 for m in found):
        raise ValueError(f"{text} is not allowed: rows are at least 1")
    return found


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "4096x4096,1024x8192" -> ((4096, 4096), (1024, 8192)), N first.

    Raises
    ------
    ValueError
        It is something else.
    """
    found = []
    for part in filter(None, text.split(",")):
        sides = re.fullmatch(r"(\d+)x(\d+)", part)
        if not sides:
            raise ValueError(f"{part} is not allowed: a shape is NxK, such as 4096x11008")
        found.append((int(sides[1]), int(sides[2])))
    return tuple(found)
