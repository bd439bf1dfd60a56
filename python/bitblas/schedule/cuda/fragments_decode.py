"""Codes in a thread's words -> the registers that tensor cores take. Importing this imports TVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import pack, unpack

from tvm import tirx
from tvm.ir import Expr

from ...formats import DataFormat
from ...layout import PackedLayout, Plane

#: Bits of 1024, to which a code of up to 10 bits is added by or-ing it; and of 128, for 7 bits.
_MAGIC = {"f16": 0x6400, "bf16": 0x4300}
_HALVES, _BYTES = 0x00010001, 0x01010101


def u32(value: int) -> Expr:
    """A constant of 32 bits."""
    return tirx.const(value & 0xFFFFFFFF, "uint32")


def call(name: str, *arguments: Expr) -> Expr:
    """A call of a function of `src/cuda` that returns a register."""
    return tirx.call_pure_extern("uint32", f"bitblas_{name}", *arguments)


def f16_bits(value: float) -> int:
    """The bits of a float16 that represents `value` exactly."""
    (bits,) = unpack("<H", pack("<e", value))
    assert unpack("<e", pack("<H", bits)) == (value,)
    return int(bits)


def shifted(word: Expr, right: int) -> Expr:
    """`word` moved to the right, or to the left where `right` is negative."""
    if not right:
        return word
    move = tirx.shift_right if right > 0 else tirx.shift_left
    return move(word, u32(abs(right)))


class Decoder:
    """How the registers of one block of 16 x 64 codes are made, exactly, from its words.

    Parameters
    ----------
    fmt : DataFormat
        What a code means.
    layout : PackedLayout
        "mma16" or "mma8".
    products : str
        What tensor cores multiply: see `bitblas.schedule.cuda.fragments_loads.products_of`.
    """

    def __init__(self, fmt: DataFormat, layout: PackedLayout, products: str) -> None:
        self.fmt, self.layout, self.products = fmt, layout, products
        self.is_bytes = layout.name == "mma8"
        self.lane_bits = 8 if self.is_bytes else 16

    @property
    def num_steps(self) -> int:
        """Products along the 64 k of a block."""
        return 2 if self.is_bytes else 4

    @property
    def looks_up(self) -> bool:
        """Whether a word's four registers are looked up together."""
        return self.fmt.name == "nf4"

    def place(self, plane: Plane, register: int) -> tuple[int, int]:
        """Word of a plane, and bit in its halves or bytes, of a register."""
        per_word = self.lane_bits // plane.width
        return register // per_word, register % per_word * plane.width

    def register(self, words: Sequence[Callable[[int], Expr]], register: int, zero: Zero | None) -> Expr:
        """A register of a block, less the zero point of its row.

        Parameters
        ----------
        words : sequence of callable
            For each plane its words by index.
        register : int
            4 · step + the number that the instruction gives it.
        zero : Zero, optional
            An integer zero point.
        """
        if self.fmt.is_integer:
            return self._bytes(words, register, zero) if self.is_bytes else self._integers(words, register, zero)
        if self.is_bytes:
            return words[0](register)
        (plane,) = self.layout.planes
        index, bit = self.place(plane, register)
        pair = shifted(words[0](index), bit)
        if self.fmt.kind == "codebook":
            return call(f"e2m1_to_{self.products}", pair)
        pair = tirx.bitwise_and(pair, u32(0x00FF00FF))
        return call(f"{self.fmt.name.removeprefix('float8_')}_to_{self.products}", pair)

    def _joined(self, words: Sequence[Callable[[int], Expr]], register: int, above: int) -> Expr:
        """The codes of all planes from the lowest bit of each half or byte on, with the bits `above` set in each."""
        spread = _BYTES if self.is_bytes else _HALVES
        value: Expr = u32(above * spread)
        for plane, word in zip(self.layout.planes, words, strict=True):
            index, bit = self.place(plane, register)
            mask = ((1 << plane.width) - 1 << plane.low_bit) * spread
            value = call("and_or", shifted(word(index), bit - plane.low_bit), u32(mask), value)
        return value

    def _integers(self, words: Sequence[Callable[[int], Expr]], register: int, zero: Zero | None) -> Expr:
        bits, products, doubled = self.fmt.bits, self.products, self.fmt.name == "int1"
        offset = 1 if doubled else self.fmt.code_offset
        if self.fmt.name == "int8":  # two's complement
            offset = 128
        if products == "bf16" and bits == 8:
            pair = self._joined(words, register, 0)
            if self.fmt.name == "int8":
                pair = tirx.bitwise_xor(pair, u32(128 * _HALVES))
            subtracted = tirx.const(float(offset), "float32") if zero is None else zero.value.astype("float32")
            return tirx.call_pure_extern("uint32", "bitblas_bytes_to_bf16", pair, subtracted)
        at = 0
        if len(self.layout.planes) == 1 and products == "f16" and bits < 8:  # multiplied where it is, instead of moved
            (plane,) = self.layout.planes
            index, bit = self.place(plane, register)
            at = max(bit % 8, int(doubled))
            mask = (1 << bits) - 1 << at
            value = call("and_or", shifted(words[0](index), bit - at), u32(mask * _HALVES), u32(0x6400 * _HALVES))
        else:
            value = self._joined(words, register, _MAGIC[products])
            if self.fmt.name == "int8":
                value = tirx.bitwise_xor(value, u32(128 * _HALVES))
        if products == "bf16":
            return self._less_bf16(value, doubled, offset, zero)
        return self._less_f16(value, at, doubled, offset, zero)

    @staticmethod
    def _less_f16(value: Expr, at: int, doubled: bool, offset: int, zero: Zero | None) -> Expr:
        """Pairs of 1024 + code · 2^at -> code - offset, or code - zero."""
        scale = 2.0**-at * (2 if doubled else 1)
        if scale == 1.0:
            return call("sub_f16", value, zero.plus(0x6400, 0) if zero else u32((0x6400 + offset) * _HALVES))
        if zero is not None:
            less = zero.plus(f16_bits(-1024.0 * scale), at)
        else:
            less = u32(f16_bits(-1024.0 * scale - offset) * _HALVES)
        return call("fma_f16", value, u32(f16_bits(scale) * _HALVES), less)

    @staticmethod
    def _less_bf16(value: Expr, doubled: bool, offset: int, zero: Zero | None) -> Expr:
        """Pairs of 128 + code -> code - offset, or code - zero."""
        one, minus_128 = u32(0x3F80 * _HALVES), 0xC300
        if doubled:  # 2 (128 + code) - 257 has too many bits for bfloat16
            code = call("fma_bf16", value, one, u32(minus_128 * _HALVES))
            return call("fma_bf16", code, u32(0x4000 * _HALVES), u32(0xBF80 * _HALVES))
        less = zero.plus(minus_128, 0) if zero else u32((minus_128 + offset) * _HALVES)
        return call("fma_bf16", value, one, less)

    def _bytes(self, words: Sequence[Callable[[int], Expr]], register: int, zero: Zero | None) -> Expr:
        if self.fmt.bits == 8:
            return words[0](register)
        value = self._joined(words, register, 0)
        if self.fmt.name == "int1":
            return call("sub_bytes", tirx.shift_left(value, u32(1)), u32(_BYTES))
        if zero is not None:
            return call("sub_bytes", value, tirx.Mul(zero.value, u32(_BYTES)))
        return call("sub_bytes", value, u32(self.fmt.code_offset * _BYTES)) if self.fmt.code_offset else value


class Zero:
    """An integer zero point of a row: `value`, uint32."""

    def __init__(self, value: Expr) -> None:
        self.value = value

    def plus(self, base: int, at: int) -> Expr:
        """In both halves of a register: `base`, bits of a 16-bit float, plus the zero point at bit `at` of its mantissa."""
        return tirx.Add(tirx.Mul(self.value, u32(_HALVES << at)), u32(base * _HALVES))


def table_words(fmt: DataFormat, products: str) -> list[int]:
    """The eight registers that `bitblas_look_up` takes: the codebook, rounded to nearest, ties to even."""
    if products == "f16":
        bits = [unpack("<H", pack("<e", value))[0] for value in fmt.codebook]
    else:
        wide = [unpack("<I", pack("<f", value))[0] for value in fmt.codebook]
        bits = [(value + 0x7FFF + (value >> 16 & 1)) >> 16 for value in wide]
    low = [value & 255 for value in bits]
    high = [value >> 8 for value in bits]
    rows = [part[i : i + 4] for part in (low, high) for i in range(0, 16, 4)]
    return [sum(byte << 8 * i for i, byte in enumerate(row)) for row in rows]
