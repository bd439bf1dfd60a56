"""How numbers are encoded: one row per data format, and the names by which users call them.

Naming scheme: ``uint{b}`` holds 0 .. 2^b - 1; ``int{b}`` holds -2^(b-1) .. 2^(b-1) - 1 (``int1`` holds -1 and +1);
``float{b}_e{x}m{y}`` and ``fp4_e2m1`` are named by exponent and mantissa widths; ``nf4`` is the 4-bit NormalFloat; the
native dtypes keep torch's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .errors import ConfigError


@dataclass(frozen=True)
class DataFormat:
    """One way to encode a number.

    Attributes
    ----------
    name : str
        The format's one canonical name.
    kind : str
        ``"uint"``, ``"int"``, ``"codebook"`` (a code is an index into `codebook`), ``"float8"`` or ``"float"`` (a native
        floating-point dtype).
    bits : int
        Width of a code.
    codebook : tuple of float
        The value of each code, for the codebook formats.
    torch_name : str
        Name of the torch dtype whose bytes are the codes; empty for the packed sub-byte formats.
    source : str
        The document that defines the format.
    """

    name: str
    kind: str
    bits: int
    codebook: tuple[float, ...] = ()
    torch_name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.codebook and len(self.codebook) != 1 << self.bits:
            raise ConfigError(f"format {self.name}: a codebook of {self.bits} bits has {1 << self.bits} entries")

    @property
    def is_integer(self) -> bool:
        """Whether every value of the format is an integer."""
        return self.kind in ("uint", "int")

    @property
    def is_native(self) -> bool:
        """Whether the format is a floating-point dtype that torch computes in."""
        return self.kind == "float"

    @property
    def code_offset(self) -> int:
        """What is subtracted from an integer code to give the value; int8 is two's complement and has none."""
        return 1 << (self.bits - 1) if self.kind == "int" and 1 < self.bits < 8 else 0

    @property
    def value_range(self) -> tuple[int, int]:
        """Smallest and largest value of an integer format."""
        if not self.is_integer:
            raise ConfigError(f"format {self.name} is not an integer format")
        if self.kind == "uint":
            return 0, (1 << self.bits) - 1
        if self.bits == 1:
            return -1, 1
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @cached_property
    def code_values(self) -> tuple[float, ...]:
        """The value of each code, for the formats of at most five bits; wider ones decode by arithmetic."""
        if self.codebook:
            return self.codebook
        if self.bits > 5:
            raise ConfigError(f"format {self.name} has no code table")
        if self.kind == "int" and self.bits == 1:
            return -1.0, 1.0
        return tuple(float(code - self.code_offset) for code in range(1 << self.bits))


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_ROWS = (
    *(DataFormat(f"uint{b}", "uint", b, torch_name="uint8" if b == 8 else "") for b in range(1, 9)),
    *(DataFormat(f"int{b}", "int", b, torch_name="int8" if b == 8 else "") for b in range(1, 9)),
    DataFormat("nf4", "codebook", 4, _NF4, source="Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E"),
    DataFormat(
        "fp4_e2m1", "codebook", 4, _E2M1 + tuple(-v for v in _E2M1), source="OCP Microscaling Formats v1.0, 5.3.3"
    ),
    DataFormat("float8_e4m3", "float8", 8, torch_name="float8_e4m3fn", source="OCP 8-bit Floating Point v1.0"),
    DataFormat("float8_e5m2", "float8", 8, torch_name="float8_e5m2", source="OCP 8-bit Floating Point v1.0"),
    DataFormat("float16", "float", 16, torch_name="float16", source="IEEE 754 binary16"),
    DataFormat("bfloat16", "float", 16, torch_name="bfloat16"),
    DataFormat("float32", "float", 32, torch_name="float32", source="IEEE 754 binary32"),
)

#: Every weight format, by canonical name.
FORMATS: dict[str, DataFormat] = {row.name: row for row in _ROWS}

#: Other names in use for the same formats.
ALIASES: dict[str, str] = {
    "e4m3_float8": "float8_e4m3",
    "float8_e4m3fn": "float8_e4m3",
    "fp8_e4m3": "float8_e4m3",
    "e5m2_float8": "float8_e5m2",
    "fp8_e5m2": "float8_e5m2",
    "fp4": "fp4_e2m1",
    "float4_e2m1": "fp4_e2m1",
    "float4_e2m1fn": "fp4_e2m1",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
}


def _meant(text: str) -> str:
    """What a misspelt name may have meant, for an error."""
    from thefuzz import process  # only here: nobody who spells well pays for it

    digits = [c for c in text if c.isdigit()]
    names = [name for name in (*FORMATS, *ALIASES) if [c for c in name if c.isdigit()] == digits]
    found = process.extractOne(text, names, score_cutoff=75) if names else None
    return f". Did you mean {found[0]!r}?" if found else ""


def parse_format(name: object, argument: str = "W_dtype") -> DataFormat:
    """Return the format called `name`.

    Parameters
    ----------
    name : str
        A canonical name or one of `ALIASES`; a torch dtype is understood by its name.
    argument : str
        The argument to blame in the error.

    Raises
    ------
    ConfigError
        No format has that name.
    """
    text = str(name).removeprefix("torch.")
    row = FORMATS.get(ALIASES.get(text, text))
    if row is None:
        raise ConfigError(f"{argument} is {name!r}, which is no format; allowed: {', '.join(FORMATS)}{_meant(text)}")
    return row
