"""What is measured: formats, shapes and rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitblas import MatmulConfig
from bitblas.formats import FORMATS

HEADLINE = (4096, 4096)
SHAPES = (HEADLINE, (11008, 4096), (4096, 11008), (1024, 8192))
MORE_SHAPES = ((14336, 4096), (8192, 8192), (1024, 1024))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
FEW_ROWS = (1, 16, 128)


@dataclass(frozen=True)
class Case:
    """A kind of matmul at one shape, for some numbers of rows; the target is this machine where none is named."""

    name: str
    config: MatmulConfig
    rows: tuple[int, ...]
    target: str | None = None


def case(a_dtype: str, w_dtype: str, shape: tuple[int, int], rows: tuple[int, ...], zeros: str | None = None) -> Case:
    """Weights of a format with scales in groups of 128; int8 activations and native dtypes without, summed exactly."""
    plain = a_dtype == "int8" or FORMATS[w_dtype].is_native
    config = MatmulConfig(
        M=rows,
        N=shape[0],
        K=shape[1],
        A_dtype=a_dtype,
        W_dtype=w_dtype,
        out_dtype="int32" if a_dtype == "int8" else a_dtype,
        accum_dtype="int32" if a_dtype == "int8" else "float32",
        with_scaling=not plain,
        group_size=-1 if plain else 128,
        with_zeros=zeros is not None,
        zeros_mode=zeros or "original",
    )
    name = f"{a_dtype} x {w_dtype}" + ("" if plain else " g128") + (" + zeros" if zeros else "")
    return Case(name, config, rows)


def full() -> list[Case]:
    """Every cell of four kinds and four shapes, and samples of the rest: up to an hour."""
    found = []
    for shape in SHAPES:
        rows = (*ROWS, 2048) if shape == HEADLINE else ROWS
        found.append(case("float16", "uint4", shape, rows, "quantized"))
        found.append(case("float16", "uint2", shape, ROWS))
        found.append(case("int8", "int4", shape, ROWS))
        found.append(case("int8", "int2", shape, ROWS))
    found += [case("float16", "uint4", shape, FEW_ROWS, "quantized") for shape in MORE_SHAPES]
    found += formats(FEW_ROWS)
    return found


def quick() -> list[Case]:
    """The headline shape and a few formats: some minutes."""
    found = [case(a_dtype, "uint4", HEADLINE, (1, 16, 128, 512), "quantized") for a_dtype in ("float16", "float32")]
    found += [case("float16", name, HEADLINE, (1, 128)) for name in ("uint2", "uint3", "int8", "nf4")]
    return [*found, case("int8", "int4", HEADLINE, (1, 128)), case("int8", "int2", HEADLINE, (1, 128))]


def headline(rows: tuple[int, ...] = (1, 16, 128, 512)) -> list[Case]:
    """uint4 in groups of 128 with zeros, for float16 and float32 activations."""
    return [case(a_dtype, "uint4", HEADLINE, rows, "quantized") for a_dtype in ("float16", "float32")]


def formats(rows: tuple[int, ...] = (1, 128)) -> list[Case]:
    """Every format but uint4, with float16 activations, or its own dtype where it is one; and int8 times int8."""
    found = []
    for name, fmt in FORMATS.items():
        if name != "uint4":
            found.append(case(name if fmt.is_native else "float16", name, HEADLINE, rows))
    return [*found, case("int8", "int8", HEADLINE, rows)]


def on_target(found: Case, cpu: str) -> Case:
    """A case compiled for another CPU, which this machine must be able to stand in for."""
    return replace(found, name=f"{found.name} on {cpu}", target=f"llvm -mcpu={cpu}")


def avx2(rows: tuple[int, ...] = (1, 16, 128)) -> list[Case]:
    """The headline case with the instructions of AVX2 alone."""
    return [on_target(found, "haswell") for found in headline(rows)]


def integers(rows: tuple[int, ...] = (1, 16, 32, 64, 128, 512)) -> list[Case]:
    """int8 times int8, and times narrower weights."""
    return [case("int8", name, HEADLINE, rows) for name in ("int8", "int4", "int2")]
