"""Where the bits of a weight lie: pure index arithmetic from (n, k) to bytes and shifts."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError
from .formats import DataFormat

#: Outputs that lie side by side in the native layout: one 512-bit register of float32.
LANES = 16
#: Consecutive k whose codes share a word of the native layout.
UNIT = 8


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
    """

    width: int
    low_bit: int
    offset: int

    @property
    def word_bytes(self) -> int:
        """Bytes that a lane holds side by side: the codes of `UNIT` k, or one code of 8 bits and more."""
        return self.width if self.width < 8 else self.width // 8

    @property
    def codes_per_word(self) -> int:
        """Codes that such a word holds."""
        return UNIT if self.width < 8 else 1


@dataclass(frozen=True)
class PackedLayout:
    """A layout of an (N, K) matrix of codes.

    ``"packed"``, the canonical one: per row a little-endian bit stream along K, padded to a byte.

    ``"lanes"``, the native one of CPU kernels, where N % 16 = K % 8 = 0: the code is split into planes of 1, 2, 4, 8, 16 or
    32 bits (`PLANE_WIDTHS`), a plane is ``[N / 16][K / 8][16]`` words with 8 consecutive k in a word of `width` bytes;
    from 8 bits on it is ``[N / 16][K][16]`` codes.

    Before -> after, for 4 bits: byte ``n * K / 2 + k / 2``
    -> byte ``((n / 16) * (K / 8) + k / 8) * 64 + (n % 16) * 4 + k % 8 / 2``.
    """

    N: int
    K: int
    bits: int
    name: str = "lanes"

    def __post_init__(self) -> None:
        if self.name not in ("packed", "lanes"):
            raise ConfigError(f"layout name is {self.name!r}; allowed: packed, lanes")
        if self.name == "lanes" and (self.N % LANES or self.K % UNIT):
            raise ConfigError(f"the lane layout needs N % {LANES} = K % {UNIT} = 0, not N = {self.N}, K = {self.K}")

    @staticmethod
    def native(N: int, K: int, fmt: DataFormat) -> PackedLayout:
        """The layout that CPU kernels read for this shape: lanes where nothing has to be padded, else packed."""
        exact = N % LANES == 0 and K % UNIT == 0
        return PackedLayout(N, K, fmt.bits, "lanes" if exact else "packed")

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
        """The planes of the lane layout, lowest bits first."""
        rows, low, offset = [], 0, 0
        for width in PLANE_WIDTHS[self.bits]:
            rows.append(Plane(width, low, offset))
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
            first += k % plane.codes_per_word * plane.width
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
