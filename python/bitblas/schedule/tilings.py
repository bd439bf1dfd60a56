"""Which tilings a CPU rule offers, from the register tiles that fit its machine."""

from __future__ import annotations

from dataclasses import replace

from ..layout import LANES
from .rule import Problem, Tiling

#: Rows × blocks of sixteen columns whose sums stay in registers.
Shape = tuple[int, int]

#: Multiply-accumulates below which starting threads costs more than they save.
SERIAL_WORK = 1 << 16

#: How far ahead weights are asked for where each is used once, the best first: at 1024 a 4-bit kernel of 4096 x 4096 took
#: 392 us where without it took 426.
PREFETCH_BYTES = (1024, 0, 2048)

#: k that are decoded into a panel at a time: 128 · 64 columns of float32 fit an L1 cache of 48 KB beside the activations.
PANEL_K = 128

#: Rows of one launch, which bounds the float32 copy of their activations to 512 · K.
SLAB_M = 512


#: Shapes whose sums fill three quarters of the registers, by how many blocks of sixteen sums those hold, the best first.
_SHAPES: dict[int, tuple[Shape, ...]] = {
    24: ((8, 3), (6, 4), (12, 2), (4, 6), (8, 2), (5, 5), (4, 4)),
    6: ((6, 1), (3, 2), (2, 3), (4, 1)),
    3: ((3, 1), (1, 3), (2, 1), (1, 2)),
}


#: Blocks of columns for one to four rows, by how many blocks of sums fit, the best first. Of six, two for one row took 478 us
#: where six took 605 (uint4 4096 x 4096, AVX2 on Zen 4), and one for two rows 672 where three took 871.
_SMALL_WIDTHS: dict[int, dict[int, tuple[int, ...]]] = {
    24: {1: (8, 4, 2), 2: (6, 4, 2), 3: (4, 2, 6), 4: (4, 2, 1)},
    6: {1: (2, 6, 1), 2: (1, 3, 2), 3: (1, 2), 4: (1,)},
    3: {1: (2, 3, 1), 2: (1,), 3: (1,), 4: (1,)},
}


def small_shapes(num_sums: int, m: int) -> list[Shape]:
    """Shapes that hold all of `m` rows, up to `SMALL_M`, where so many blocks of sums fit, the best first."""
    return [(m, width) for width in _SMALL_WIDTHS[_fitting(num_sums)][m]]


def tall_shapes(num_sums: int, m: int) -> list[Shape]:
    """Shapes of no more rows than `m`, where so many blocks of sums fit; first one that is as wide as `m` rows allow."""
    most = _fitting(num_sums)
    found = [(min(rows, m), blocks) for rows, blocks in _SHAPES[most]]
    if m < _SHAPES[most][0][0]:
        found.insert(0, (m, max(1, min(6, most // m))))
    return list(dict.fromkeys(found))


def _fitting(num_sums: int) -> int:
    """The row of the tables for the most blocks of sums, of those that fit."""
    return max(size for size in _SHAPES if size <= num_sums)


def decode_in_registers(problem: Problem, shapes: list[Shape]) -> list[Tiling]:
    """Tilings that decode weights for each tile of rows: for as many rows as one tile holds."""
    tilings = _in_slabs(_tilings(problem, shapes, Tiling(1, LANES, 8)))
    return [replace(tiling, prefetch=ahead) for ahead in PREFETCH_BYTES for tiling in tilings]


def decode_to_panel(problem: Problem, shapes: list[Shape], panel_k: int = PANEL_K) -> list[Tiling]:
    """Tilings that decode weights once for all rows, `panel_k` at a time; the less of the last tiles is empty the better."""
    shapes = sorted(shapes, key=lambda shape: _padded_work(problem, *shape))
    return _in_slabs(_tilings(problem, shapes, Tiling(1, LANES, 4, chunk_k=panel_k, panel=True)))


def _in_slabs(tilings: list[Tiling]) -> list[Tiling]:
    return [replace(tiling, slab_m=-(-SLAB_M // tiling.block_m) * tiling.block_m) for tiling in tilings]


def _padded_work(problem: Problem, rows: int, blocks: int) -> int:
    """What is computed for whole tiles, in twentieths of what is asked: less than that makes no difference."""
    padded_m = -(-problem.m // rows) * rows / problem.m
    padded_n = -(-problem.lane_blocks // blocks) * blocks / problem.lane_blocks
    return int(padded_m * padded_n * 20)


def _tilings(problem: Problem, shapes: list[Shape], base: Tiling) -> list[Tiling]:
    """`base` with each shape; a tile is never wider than the output."""
    parallel = problem.work > SERIAL_WORK
    found = []
    for rows, blocks in shapes:
        tiling = replace(base, block_m=rows, block_n=min(blocks, problem.lane_blocks) * LANES, parallel=parallel)
        if tiling not in found:
            found.append(tiling)
    return found
