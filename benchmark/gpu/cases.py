"""What is measured on a card: kinds of matmul, shapes and rows, in the order in which they matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cases import DENSE_CACHE_VARIANT as DENSE_CACHE
from ..cases import Case, case, merged

HEADLINE = (4096, 4096)
SQUARES = (HEADLINE, (8192, 8192), (16384, 16384))
SHAPES = ((11008, 4096), (4096, 11008), (14336, 4096), (1024, 8192), (1024, 1024))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GOAL_ROWS = (1, 16, 32, 128, 256, 512, 1024, 4096)
FEW_ROWS = (1, 16, 128, 1024)

FP16, BF16, INT_MM, SCALED_MM = "torch float16", "torch bfloat16", "torch _int_mm", "torch _scaled_mm"
INT4PACK, GEMLITE = "torch int4pack", "gemlite"


def card_case(
    a_dtype: str, w_dtype: str, shape: tuple[int, int], rows: Sequence[int], zeros: str | None = None
) -> Case:
    """A case beside the peers that its dtypes allow."""
    beside = {
        "bfloat16": [BF16, INT4PACK],
        "int8": [FP16, INT_MM],
        "float8_e4m3": [FP16, SCALED_MM],
    }.get(a_dtype, [FP16, INT4PACK, GEMLITE])
    fields = {"out_dtype": "float16", "scaled": False} if a_dtype.startswith("float8") else {}
    found = case(a_dtype, w_dtype, shape, rows, zeros, **fields)  # type: ignore[arg-type]
    return replace(found, peers="^(" + "|".join(beside) + ")$")


def ternary(shape: tuple[int, int], rows: Sequence[int]) -> Case:
    """A deployed layer of ternary weights: activations quantized by row on the way, one scale, a bias."""
    fields = {"with_scaling": True, "scale_per_tensor": True, "with_bias": True, "dynamic_quantization": "row"}
    found = case("float16", "int2", shape, rows, scaled=False, label="as BitLinear", **fields)
    return replace(found, peers=f"^{FP16}$")


def goal_cases(rows: Sequence[int] = GOAL_ROWS) -> list[Case]:
    """The cells of which a goal speaks: W4A16 in groups of 128, and W2A8."""
    found = [card_case("float16", "int4", shape, rows) for shape in SQUARES]
    found = [replace(each, variants=(DENSE_CACHE,)) for each in found]
    return [*found, card_case("int8", "int2", SQUARES[-1], (1,))]


def quick() -> list[Case]:
    """The goals, and a few formats at one shape: some minutes."""
    found = goal_cases()
    found += [card_case("float16", "uint4", HEADLINE, (1, 16, 128), "quantized")]
    found += [card_case("bfloat16", "int4", HEADLINE, (1, 128)), card_case("int8", "int2", HEADLINE, (1, 16, 128))]
    found += [
        card_case("int8", "int4", HEADLINE, (1, 128)),
        card_case("float8_e4m3", "float8_e4m3", HEADLINE, (1, 128)),
    ]
    found += [card_case("float16", "nf4", HEADLINE, (1, 16)), ternary(HEADLINE, (1, 16, 64, 128))]
    return found


def full() -> list[Case]:
    """The goals first, then every row of the main formats at all shapes, and samples of the rest."""
    found = quick() + goal_cases(ROWS)
    for shape in (*SQUARES, *SHAPES):
        found.append(card_case("float16", "uint4", shape, ROWS, "quantized"))
        found.append(card_case("float16", "int4", shape, ROWS))
        found.append(card_case("int8", "int2", shape, ROWS))
        found.append(card_case("int8", "int4", shape, ROWS))
        found.append(ternary(shape, FEW_ROWS))
        found.append(card_case("float16", "uint2", shape, ROWS if shape in SQUARES else FEW_ROWS))
        found.append(card_case("bfloat16", "uint4", shape, ROWS if shape in SQUARES else FEW_ROWS, "quantized"))
    for name in ("uint3", "nf4", "fp4_e2m1", "int8", "float8_e4m3", "uint1", "float16"):
        found.append(card_case("float16", name, HEADLINE, FEW_ROWS))
    found.append(card_case("int8", "int8", HEADLINE, FEW_ROWS))
    found.append(card_case("float8_e4m3", "float8_e4m3", SQUARES[1], FEW_ROWS))
    return merged(found)  # of cases that differ in a variant the first counts, which has it
