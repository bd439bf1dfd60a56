"""Where the bits of a weight lie: pure index arithmetic from (n, k) to bytes and shifts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .formats import DataFormat

#: Outputs that lie side by side in the native layout: one 512-bit register of float32.
LANES = 16
#: Consecutive k whose codes share a word of the native layout.
UNIT = 8
#: Consecutive k whose codes lie in the four bytes of a word, for instructions that add four products at once.
QUAD = 4

#: The layouts, by name.
NAMES = ("packed", "lanes", "dots", "mma16", "mma8")

#: Rows and columns (n, k) of a block of the layouts for tensor cores, whose codes a warp holds in its fragments.
FRAGMENT_N, FRAGMENT_K = 16, 64
#: Threads of a warp.
WARP = 32

#: Code widths of the bit planes into which a sub-byte code is split, lowest bits first, by code width.
PLANE_WIDTHS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
    16: (16,),
    32: (32,),
}


@dataclass(frozen=True)
class Plane:
    """One bit plane of a native layout.

    Attributes
    ----------
    width : int
        Bits of each code in this plane.
    low_bit : int
        The position in the code of the plane's lowest bit.
    offset : int
        First byte of the plane in the tensor.
    word_bytes : int
        Bytes that a lane holds side by side.
    codes_per_word : int
        Codes, of consecutive k, that they hold.
    """

    width: int
    low_bit: int
    offset: int
    word_bytes: int
    codes_per_word: int


@dataclass(frozen=True)
class PackedLayout:
    """A layout of an (N, K) matrix of codes.

    ``"packed"``, the canonical one: per row a little-endian bit stream along K, padded to a byte.

    The native ones of CPU kernels split a code into planes of 1, 2, 4, 8, 16 or 32 bits (`PLANE_WIDTHS`), and a plane is
    ``[N / 16][K / codes per word][16]`` words:

    ``"lanes"``, where N % 16 = K % 8 = 0: a word of `width` bytes holds 8 consecutive k, from its lowest bits on; from 8 bits
    on it holds one code.

    ``"dots"``, of codes up to 8 bits, where N % 16 = 0 and K is a multiple of `unit`: a word of 4 bytes holds 32 / width
    consecutive k, four in the lowest bits of its bytes, the next four in the bits above those.

    Those of tensor cores, "mma16" for products of 16 bits and "mma8" for products of 8, of codes up to 8 bits, where N % 16 =
    K % 64 = 0, hold a block of 16 x 64 codes as a warp's threads take them: see `fragment_word`.

    Before -> after, for 4 bits: byte ``n * K / 2 + k / 2``
    -> lanes: byte ``((n / 16) * (K / 8) + k / 8) * 64 + (n % 16) * 4 + k % 8 / 2``
    -> dots: byte ``((n / 16) * (K / 8) + k / 8) * 64 + (n % 16) * 4 + k % 4``, bits 4 and up where k % 8 >= 4.
    """

    N: int
    K: int
    bits: int
    name: str = "lanes"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"layout name is {self.name!r}; allowed: {', '.join(NAMES)}")
        if self.name not in ("packed", "lanes") and self.bits > 8:
            raise ConfigError(f"the layout {self.name!r} is for codes of up to 8 bits, not {self.bits}")
        if self.name != "packed" and (self.N % LANES or self.K % self.unit):
            raise ConfigError(
                f"the layout {self.name!r} needs N % {LANES} = K % {self.unit} = 0, not N = {self.N}, K = {self.K}"
            )

    @staticmethod
    def native(N: int, K: int, fmt: DataFormat) -> PackedLayout:
        """The layout for kernels that multiply floats: lanes where nothing has to be padded, else packed."""
        exact = N % LANES == 0 and K % UNIT == 0
        return PackedLayout(N, K, fmt.bits, "lanes" if exact else "packed")

    @property
    def is_fragments(self) -> bool:
        """Whether it is one for tensor cores."""
        return self.name.startswith("mma")

    @property
    def unit(self) -> int:
        """Consecutive k that begin and end with whole words of every plane."""
        if self.name == "dots":
            return dots_unit(self.bits)
        if self.is_fragments:
            return FRAGMENT_K
        return UNIT if self.name == "lanes" else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the tensor."""
        return (self.K * self.bits + 7) // 8

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.N * self.row_bytes

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of a native layout, lowest bits first."""
        rows, low, offset = [], 0, 0
        for width in PLANE_WIDTHS[self.bits]:
            if self.name == "dots" or self.is_fragments:
                rows.append(Plane(width, low, offset, 4, 32 // width))
            elif width < 8:
                rows.append(Plane(width, low, offset, width, UNIT))
            else:
                rows.append(Plane(width, low, offset, width // 8, 1))
            low += width
            offset += self.N * self.K * width // 8
        return tuple(rows)

    def locate(self, n: int, k: int) -> list[tuple[int, int]]:
        """Where each bit of the code of (n, k) lies, lowest bit first.

        Returns
        -------
        list of (int, int)
            Byte of the tensor and bit in it, for each of the `bits` bits.
        """
        if self.name == "packed":
            first = n * self.row_bytes * 8 + k * self.bits
            return [divmod(first + i, 8) for i in range(self.bits)]
        found = []
        for plane in self.planes:
            if self.is_fragments:
                index, shift = self.fragment_word(plane, n, k)
                found += [
                    divmod((plane.offset + index * plane.word_bytes) * 8 + shift + i, 8) for i in range(plane.width)
                ]
                continue
            word, lane = self.word_index(plane, n, k)
            first = (plane.offset + (word * LANES + lane) * plane.word_bytes) * 8
            place = k % plane.codes_per_word
            first += place % QUAD * 8 + place // QUAD * plane.width if self.name == "dots" else place * plane.width
            found += [divmod(first + i, 8) for i in range(plane.width)]
        return found

    def word_index(self, plane: Plane, n: int, k: int) -> tuple[int, int]:
        """Index of the 16-lane line, and the lane, that hold (n, k) in a plane."""
        return n // LANES * (self.K // plane.codes_per_word) + k // plane.codes_per_word, n % LANES

    def span(self, plane: Plane) -> int:
        """Blocks along K whose words a thread has side by side, to load up to 16 bytes at once; for tensor cores."""
        blocks = self.K // FRAGMENT_K
        return (
            next(span for span in (4, 2, 1) if span * plane.width <= 4 and blocks % span == 0) if plane.width < 4 else 1
        )

    def fragment_word(self, plane: Plane, n: Any, k: Any) -> tuple[Any, Any]:
        """Index of the 32-bit word of a plane, and the shift in it, where the code of (n, k) lies; for tensor cores.

        A warp multiplies 16 rows of weights at a time. Of a block of 16 x 64, its thread ``4 (n % 8) + k % 32 / 8`` holds the
        rows n % 8 and n % 8 + 8, and eight consecutive k of each half of the 64: as the sum over k has no order, the k that
        an instruction calls consecutive need not be so in memory, and the thread's activations are 8 in a row of A. Their
        order in the thread's words is that of the registers that the instruction takes: for products of 16 bits ::

            register 4 s + 2 p + h: row n % 8 + 8 h, k = 32 (s / 2) + 4 (s % 2) + 2 p + {0, 1} + 8 (k % 32 / 8)

        for the step s < 4, and the pair's codes in the lower and in the upper half of a word; for products of bytes ::

            register 4 s + 2 p + h: row n % 8 + 8 h, k = 32 s + 4 p + {0, 1, 2, 3} + 8 (k % 32 / 8)

        for the step s < 2, and the four codes in the bytes of a word. Words of several registers have them side by side in
        the bits of each half, or byte, the first in the lowest.

        Parameters
        ----------
        plane : Plane
            One of `planes`.
        n, k : int or tvm.ir.Expr
            The place in the matrix.
        """
        width, span = plane.width, self.span(plane)
        block, inner = k // FRAGMENT_K, k % 8
        lane = n % 8 * 4 + k % 32 // 8
        if self.name == "mma16":
            step, part, element, bits = k % FRAGMENT_K // 32 * 2 + inner // 4, inner % 4 // 2, inner % 2, 16
        else:
            step, part, element, bits = k % FRAGMENT_K // 32, inner // 4, inner % 4, 8
        register, per_word = step * 4 + part * 2 + n % 16 // 8, bits // width
        word, pieces = register // per_word, max(1, width // 4)
        vector = (n // FRAGMENT_N * (self.K // FRAGMENT_K // span) + block // span) * pieces + word // 4
        index = (vector * WARP + lane) * min(4, width * span) + block % span * width + word % 4
        return index, register % per_word * width + element * bits

    def check(self) -> None:
        """Raise unless every bit has a place of its own, inside the tensor.

        Raises
        ------
        ConfigError
            Two bits share a place, or one lies outside.
        """
        places = [place for n in range(self.N) for k in range(self.K) for place in self.locate(n, k)]
        if len(set(places)) != len(places):
            raise ConfigError(f"{self}: two codes share a bit")
        if any(not 0 <= byte < self.num_bytes for byte, _ in places):
            raise ConfigError(f"{self}: a code lies outside of the tensor")


def dots_unit(bits: int) -> int:
    """Consecutive k that a word of the thinnest plane holds in the layout "dots"."""
    return 32 // min(PLANE_WIDTHS[bits])


def stream_period(bits: int) -> int:
    """Fewest consecutive codes of a row-wise bit stream that are whole words of 32 bits."""
    return 32 // math.gcd(32, bits)
