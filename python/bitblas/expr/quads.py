"""How four codes become the bytes of one int32, for instructions that add four products at once."""

from __future__ import annotations

from tvm import te, tirx
from tvm.ir import Expr

from ..config import MatmulConfig
from ..formats import DataFormat
from ..layout import QUAD, PackedLayout


def offset(fmt: DataFormat, dot: str) -> int:
    """What a byte holds beyond the value: a byte is value + offset, unsigned for ``"u8s8"`` and signed for ``"s8s8"``.

    0 for what holds no bytes.
    """
    if dot == "bf16":
        return 0
    if fmt.bits == 1:
        return 1 if fmt.kind == "int" else 0
    if fmt.bits < 8:
        return fmt.code_offset
    if dot == "u8s8":
        return 128 if fmt.kind == "int" else 0
    return -128 if fmt.kind == "uint" else 0


def needs_row_sum(config: MatmulConfig, dot: str) -> bool:
    """Whether sums of activations are needed: for zero points, or for what bytes hold beyond their values."""
    return config.with_zeros or bool(dot and offset(config.format, dot))


def repeated(value: int) -> Expr:
    """`value` in each byte of an int32."""
    return tirx.const(int.from_bytes(bytes([value] * QUAD), "little", signed=True), "int32")


def quad(fmt: DataFormat, layout: PackedLayout, dot: str, words: list[te.Tensor], q: Expr, n: Expr) -> Expr:
    """The bytes of the codes of (n, 4 q .. 4 q + 3), from the words of each plane of the layout "dots"."""
    found: Expr | None = None
    for plane, word in zip(layout.planes, words, strict=True):
        fields = plane.codes_per_word // QUAD
        part = word[q // fields, n] if fields > 1 else word[q, n]
        if plane.width < 8:
            # int1 is 2 code - 1: its code is left where it counts twice
            low = plane.low_bit + (1 if fmt.bits == 1 and fmt.kind == "int" else 0)
            part = tirx.bitwise_and(tirx.shift_right(part, q % fields * plane.width), repeated((1 << plane.width) - 1))
            part = tirx.shift_left(part, tirx.const(low, "int32")) if low else part
        found = part if found is None else tirx.bitwise_or(found, part)
    return tirx.bitwise_xor(found, repeated(128)) if fmt.bits == 8 and offset(fmt, dot) else found


def quad_byte(word: Expr, j: Expr, dot: str) -> Expr:
    """Byte j of an int32, as an int32: unsigned for ``"u8s8"``, signed for ``"s8s8"``."""
    if dot == "u8s8":
        return tirx.bitwise_and(tirx.shift_right(word, j * 8), tirx.const(255, "int32"))
    return tirx.shift_right(tirx.shift_left(word, 24 - j * 8), tirx.const(24, "int32"))
