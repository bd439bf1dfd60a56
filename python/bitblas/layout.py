"""Where the bits of a weight lie: pure index arithmetic from (n, k) to bytes and shifts."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError
from .formats import DataFormat

#: Outputs that lie side by side in the native layout: one 512-bit register of float32.
LANES = 16
#: Consecutive k whose codes share a word of the native layout.
UNIT = 8
#: Consecutive k whose codes lie in the four bytes of a word, for instructions that add four products at once.
QUAD = 4

#: The layouts, by name.
NAMES = ("packed", "lanes", "dots")

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
        if self.name == "dots" and self.bits > 8:
            raise ConfigError(f"the layout 'dots' is for codes of up to 8 bits, not {self.bits}")
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
    def unit(self) -> int:
        """Consecutive k that begin and end with whole words of every plane."""
        if self.name == "dots":
            return dots_unit(self.bits)
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
            if self.name == "dots":
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
            word, lane = self.word_index(plane, n, k)
            first = (plane.offset + (word * LANES + lane) * plane.word_bytes) * 8
            place = k % plane.codes_per_word
            first += place % QUAD * 8 + place // QUAD * plane.width if self.name == "dots" else place * plane.width
            found += [divmod(first + i, 8) for i in range(plane.width)]
        return found

    def word_index(self, plane: Plane, n: int, k: int) -> tuple[int, int]:
        """Index of the 16-lane line, and the lane, that hold (n, k) in a plane."""
        return n // LANES * (self.K // plane.codes_per_word) + k // plane.codes_per_word, n % LANES

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
