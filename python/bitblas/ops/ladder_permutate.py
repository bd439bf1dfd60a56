"""LadderPermutate: a matrix cut into the tiles of a tensor core, each in the order in which threads load it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..config import check_dtype_name, check_size
from ..errors import ConfigError
from .common import TransformKind
from .weight_operator import WeightOperator, alike, check_choice, torch_dtype

_DATATYPES = ("float16", "bfloat16", "int8", "float8_e4m3", "float8_e5m2")
_STORAGE_DTYPES = ("float16", "bfloat16", "int8", "uint8", "int32", "uint32", "float8_e4m3", "float8_e5m2")
_KINDS = (TransformKind.InterWarpTransform, TransformKind.IntraWarpTransform, TransformKind.LDMatrixTransform)
#: Rows of a tile, the bytes of its rows, those that a thread loads at once, and those that stay together in a register.
_ROWS, _ROW_BYTES, _LOAD_BYTES, _REGISTER_BYTES = 16, 32, 16, 4
#: Integers that move the bits of an element, whatever it is, by its size.
_MOVERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class LadderPermutateConfig:
    """What `LadderPermutate` permutes, and how far.

    Parameters
    ----------
    M, N : int
        Shape of the matrix, in numbers: multiples of a tile, which has 16 rows of 32 bytes of `datatype`.
    datatype : str
        What is multiplied: float16, bfloat16, int8, e4m3_float8 or e5m2_float8.
    dequantize_bits : int
        Bits of a packed code: 1, 2, 4 or 8; -1, or not less than those of `datatype`, where each number is an element.
    storage_dtype : str
        Dtype of an element: float16, bfloat16, int8, uint8, int32, uint32, e4m3_float8 or e5m2_float8.
    propagate_kind : str
        ``"A"`` or ``"B"``: which operand the matrix is.
    transpose_matrix : bool
        Whether it is transposed: for 8-bit types False for A and True for B.
    transform_kind : int or TransformKind
        1: tiles only. 2: and the elements of a tile in the order in which ldmatrix's threads read them, 16 bytes each.
        3: and then as the threads' registers hold them, 4 bytes each, so that no ldmatrix is needed.
    target_instruction : str
        ``"nvidia-mma"``.

    Raises
    ------
    ConfigError
        A value is not allowed, or the matrix has no whole number of tiles.
    """

    M: int
    N: int
    datatype: str = "float16"
    dequantize_bits: int = -1
    storage_dtype: str = "float16"
    propagate_kind: str = "B"
    transpose_matrix: bool = False
    transform_kind: int = TransformKind.IntraWarpTransform
    target_instruction: str = "nvidia-mma"

    def __post_init__(self) -> None:
        for name in ("M", "N"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        for name, allowed in (("datatype", _DATATYPES), ("storage_dtype", _STORAGE_DTYPES)):
            object.__setattr__(self, name, check_dtype_name(name, getattr(self, name), allowed))
        check_choice("dequantize_bits", self.dequantize_bits, (-1, 1, 2, 4, 8, 16))
        check_choice("propagate_kind", self.propagate_kind, ("A", "B"))
        if self.transpose_matrix not in (False, True):
            raise ConfigError(f"transpose_matrix is {self.transpose_matrix!r}; it must be True or False")
        check_choice("transform_kind", self.transform_kind, [kind.value for kind in _KINDS])
        object.__setattr__(self, "transform_kind", TransformKind(self.transform_kind))
        check_choice("target_instruction", self.target_instruction, ("nvidia-mma",))
        self._check_layout()

    def _check_layout(self) -> None:
        if self.number_bytes == 1 and bool(self.transpose_matrix) != (self.propagate_kind == "B"):
            raise ConfigError(
                f"transpose_matrix is {self.transpose_matrix!r} for propagate_kind {self.propagate_kind!r} and datatype "
                f"{self.datatype}; allowed: A with False, B with True"
            )
        together, packed = self._numbers_together, self.numbers_per_element
        if packed > together:
            raise ConfigError(
                f"dequantize_bits is {self.dequantize_bits}: an element of {self.storage_dtype} holds {packed} codes, but "
                f"transform_kind {int(self.transform_kind)} of {self.datatype} keeps {together} together at most"
            )
        columns = _ROW_BYTES // self.number_bytes
        if self.M % _ROWS or self.N % columns:
            raise ConfigError(
                f"M x N is {self.M} x {self.N}; it must be a multiple of {_ROWS} x {columns}, a tile of {self.datatype}"
            )

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of `datatype`."""
        return torch_dtype(self.datatype).itemsize

    @property
    def numbers_per_element(self) -> int:
        """Packed codes in an element of `storage_dtype`; 1 where each number is an element."""
        if not 0 < self.dequantize_bits < self.number_bytes * 8:
            return 1
        return torch_dtype(self.storage_dtype).itemsize * 8 // self.dequantize_bits

    @property
    def _numbers_together(self) -> int:
        moved = {1: _ROW_BYTES, 2: _LOAD_BYTES, 3: _REGISTER_BYTES}[int(self.transform_kind)]
        return moved // self.number_bytes


@cache
def tile_sources(number_bytes: int, transpose: bool, kind: int) -> tuple[int, ...]:
    """Which number of a tile, counted row by row, comes to each place of the permuted tile.

    With ldmatrix, thread t of 32 reads 16 bytes: of row t % 16, the left half for t < 16; transposed, of row
    t // 16 * 8 + t % 8, the left half where t % 16 < 8. The places hold what they read, one thread after the other. For kind 3
    it is then handed out as mma takes it: the 4 bytes with number r of thread t go to thread t % 8 * 4 + r, as its number
    t // 8. Source: PTX ISA, "ldmatrix" and the fragments of "mma.m16n8k16" and "mma.m16n8k32".

    Parameters
    ----------
    number_bytes : int
        Bytes of a number: a tile has 16 rows of 32 bytes.
    transpose : bool
        Whether the matrix is transposed.
    kind : int
        The `TransformKind`: 1, 2 or 3.
    """
    columns, load, register = (size // number_bytes for size in (_ROW_BYTES, _LOAD_BYTES, _REGISTER_BYTES))
    if kind == TransformKind.InterWarpTransform:
        return tuple(range(_ROWS * columns))
    sources = []
    for thread in range(32):
        row, half = (thread // 16 * 8 + thread % 8, thread % 16 // 8) if transpose else (thread % 16, thread // 16)
        sources += [row * columns + half * load + number for number in range(load)]
    if kind == TransformKind.IntraWarpTransform:
        return tuple(sources)
    moved = [0] * len(sources)
    for place, source in enumerate(sources):
        thread, number = divmod(place, load)
        new_thread, new_number = thread % 8 * 4 + number // register, thread // 8 * register + number % register
        moved[new_thread * load + new_number] = source
    return tuple(moved)


class LadderPermutate(WeightOperator[LadderPermutateConfig]):
    """Cuts a matrix into the tiles of a tensor core and permutes each, so that threads load it contiguously.

    Input: (M, N / numbers per element) of the storage dtype. Result: (M / 16, N / columns of a tile, 16, columns of a tile /
    numbers per element), see `retrieve_output_shape`. Parameters: see `WeightOperator`.
    """

    config_class = LadderPermutateConfig

    M = property(lambda self: self.config.M)
    N = property(lambda self: self.config.N)
    datatype = property(lambda self: self.config.datatype)
    dequantize_bits = property(lambda self: self.config.dequantize_bits)
    storage_dtype = property(lambda self: self.config.storage_dtype)
    propagate_kind = property(lambda self: self.config.propagate_kind)
    transpose_matrix = property(lambda self: self.config.transpose_matrix)
    transform_kind = property(lambda self: self.config.transform_kind)
    target_instruction = property(lambda self: self.config.target_instruction)

    def retrieve_output_shape(self) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of the result."""
        columns = _ROW_BYTES // self.config.number_bytes
        width = columns // self.config.numbers_per_element
        shape = [self.config.M // _ROWS, self.config.N // columns, _ROWS, width]
        return shape, torch_dtype(self.config.storage_dtype)

    def _input_shape(self) -> tuple[int, ...]:
        return self.config.M, self.config.N // self.config.numbers_per_element

    def _input_dtypes(self) -> tuple[torch.dtype, ...]:
        return alike(torch_dtype(self.config.storage_dtype))

    def _output_dtypes(self) -> tuple[torch.dtype, ...]:
        return self._input_dtypes()

    def _compute(self, inp: torch.Tensor) -> torch.Tensor:
        (down, across, rows, width), dtype = self.retrieve_output_shape()
        elements = inp.view(_MOVERS[inp.element_size()]).reshape(down, rows, across, width)
        tiles = elements.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        config, packed = self.config, self.config.numbers_per_element
        if config.transform_kind >= TransformKind.IntraWarpTransform:
            sources = tile_sources(config.number_bytes, bool(config.transpose_matrix), int(config.transform_kind))
            index = torch.tensor([source // packed for source in sources[::packed]], device=inp.device)
            tiles = tiles.view(down * across, rows * width).index_select(1, index)
        return tiles.view(dtype).view(down, across, rows, width)


__all__ = ["LadderPermutate", "LadderPermutateConfig"]
