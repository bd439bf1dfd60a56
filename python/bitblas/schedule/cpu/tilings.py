"""Which tilings a CPU rule offers, from the register tiles that fit its machine."""

from __future__ import annotations

from dataclasses import replace

from ...layout import LANES
from ..rule import Problem, largest_divisor
from .units import LaneTiling

#: Rows × blocks of sixteen columns whose sums stay in registers.
Shape = tuple[int, int]

#: Multiply-accumulates below which starting threads costs more than they save.
SERIAL_WORK = 1 << 16

#: How far ahead weights are asked for in each block of columns, best first, where there are four blocks, and where there are
#: fewer: one row of uint4, 4096 x 4096, took 249 us at 512 where it took 267 at 1024, and three rows, one block at a time, 442
#: at 2048 and 496 at 1024; four took 578 at 1024, and 781 without.
PREFETCH_BYTES, _PREFETCH_FEW = (512, 1024, 0), (2048, 1024, 0)

#: Blocks of sums from which on they are no array on the stack, but memory that a prefetch might touch: compilers then store
#: them with each (four rows of slices by 32 columns took 910 us with it, 618 without).
_STACK_SUMS = 16

#: Rows up to which weights are decoded in registers whatever that costs.
DECODE_AGAIN_ROWS = 16

#: k that are decoded into a panel at a time: 128 · 64 columns of float32 fit an L1 cache of 48 KB beside the activations.
PANEL_K = 128

#: Rows of one launch, which bounds the float32 copy of their activations to 512 · K.
SLAB_M = 512


#: Tiles of columns that are enough for the threads of most machines, and multiply-accumulates that are worth a thread's while.
ENOUGH_TILES, LEAST_TASK = 16, 1 << 18

#: k that are summed at once where K is split.
_SPLIT_K = 512

#: Shapes whose sums fill three quarters of the registers, by how many blocks of sixteen sums those hold, the best first.
_SHAPES: dict[int, tuple[Shape, ...]] = {
    24: ((8, 3), (6, 4), (12, 2), (4, 6), (8, 2), (5, 5), (4, 4)),
    6: ((6, 1), (3, 2), (2, 3), (4, 1)),
    3: ((3, 1), (1, 3), (2, 1), (1, 2)),
}

#: Blocks of columns, each of which is read as a stream of its own, for one row: of nf4 four took 308 us and eight 325.
_MOST_STREAMS = 4

#: Beside codes that are being decoded: most rows, most blocks of sums one block wide, and of wider tiles, by how many blocks of
#: sums would fit. 8 x 1 took 2411 us where 16 x 1 took 2532 and 8 x 2 2754 (nf4, M=16, 4096 x 4096, AVX-512 on Zen 4); of AVX2
#: 4 x 1 took 2826 us where 2 x 1 took 4984 and 6 x 1 6562 (uint4, M=16), 2 x 1 672 where 2 x 2 took 1066, and 1 x 2 478 where
#: 1 x 6 took 605.
_BESIDE_CODES: dict[int, tuple[int, int, int]] = {24: (8, 12, 12), 6: (4, 4, 2), 3: (2, 2, 2)}


def decode_in_registers(problem: Problem, num_sums: int, per_row: int = 1, least_sums: int = 1) -> list[LaneTiling]:
    """Tilings that decode weights in registers, for as many rows as one tile holds.

    Parameters
    ----------
    problem : Problem
        What is to be computed.
    num_sums : int
        Blocks of sixteen sums that fit.
    per_row : int
        Blocks of sums of one row and sixteen columns.
    least_sums : int
        Blocks of sums that hide the latency of the instruction which adds to them.
    """
    most_rows, most_sums, most_wide = _BESIDE_CODES[_fitting(num_sums)]
    most_rows = min(most_rows, max(1, most_sums // per_row))
    rows = -(-problem.m // -(-problem.m // most_rows))
    width = max(-(-least_sums // (rows * per_row)), most_wide // (rows * per_row))
    width = max(1, min(_MOST_STREAMS if rows == 1 else 8, width))
    shapes = [(rows, blocks) for blocks in dict.fromkeys((width, max(1, width // 2), width + 1))]
    shapes += [(max(1, rows // 2), width), (rows, width * 2)]
    tilings = _in_slabs(_tilings(problem, shapes, LaneTiling(1, LANES, 8)))
    found = []
    for tiling in tilings:
        blocks = tiling.block_n // LANES
        distances = PREFETCH_BYTES if blocks >= _MOST_STREAMS else _PREFETCH_FEW
        on_stack = tiling.block_m * per_row * blocks < _STACK_SUMS
        found += [replace(tiling, prefetch=ahead) for ahead in (distances if on_stack else (0,))]
    return found


def decode_to_panel(problem: Problem, num_sums: int, per_row: int = 1, panel_k: int = PANEL_K) -> list[LaneTiling]:
    """Tilings that decode weights once for all rows, `panel_k` at a time; the less of the last tiles is empty the better."""
    most = _SHAPES[_fitting(num_sums)]
    shapes = [(min(max(1, rows // per_row), problem.m), blocks) for rows, blocks in most]
    if problem.m * per_row < most[0][0]:  # one that is as wide as the rows allow
        shapes.insert(0, (problem.m, max(1, min(6, _fitting(num_sums) // (problem.m * per_row)))))
    shapes.sort(key=lambda shape: _padded_work(problem, *shape))
    return _in_slabs(_tilings(problem, shapes, LaneTiling(1, LANES, 4, chunk_k=panel_k, panel=True)))


def split_over_k(problem: Problem, tilings: list[LaneTiling]) -> list[LaneTiling]:
    """The tilings, each with K in parts where the columns alone are too few for many threads."""
    return [_split(problem, tiling) for tiling in tilings]


def _split(problem: Problem, tiling: LaneTiling) -> LaneTiling:
    tiles = -(-problem.config.N // tiling.block_n)
    wanted = min(-(-ENOUGH_TILES // tiles), problem.work // (tiles * LEAST_TASK))
    if wanted < 2 or not tiling.parallel:
        return tiling
    if not tiling.chunk_k:
        tiling = replace(tiling, chunk_k=_SPLIT_K)
    chunks = -(-problem.config.K // tiling.chunk(problem.config, problem.layout))
    return replace(tiling, split_k=largest_divisor(chunks, wanted))


def four_blocks_first(tilings: list[LaneTiling]) -> list[LaneTiling]:
    """At most four rows by four blocks come first.

    4 x 4 took 5.74 ms where 8 x 3 took 5.86 (int8 times int8, M=128, VNNI on Zen 4), and 10.5 where 6 x 4 took 11.0 (bfloat16
    times uint4).
    """
    return sorted(
        tilings, key=lambda tiling: (tiling.block_n != 4 * LANES, tiling.block_n == 4 * LANES and tiling.block_m > 4)
    )


def _fitting(num_sums: int) -> int:
    """The row of the tables for the most blocks of sums, of those that fit."""
    return max(size for size in _SHAPES if size <= num_sums)


def _in_slabs(tilings: list[LaneTiling]) -> list[LaneTiling]:
    return [replace(tiling, slab_m=-(-SLAB_M // tiling.block_m) * tiling.block_m) for tiling in tilings]


def _padded_work(problem: Problem, rows: int, blocks: int) -> int:
    """What is computed for whole tiles, in twentieths of what is asked: less than that makes no difference."""
    padded_m = -(-problem.m // rows) * rows / problem.m
    padded_n = -(-problem.lane_blocks // blocks) * blocks / problem.lane_blocks
    return int(padded_m * padded_n * 20)


def _tilings(problem: Problem, shapes: list[Shape], base: LaneTiling) -> list[LaneTiling]:
    """`base` with each shape; a tile is never wider than the output."""
    parallel = problem.work > SERIAL_WORK
    found = []
    for rows, blocks in shapes:
        tiling = replace(base, block_m=rows, block_n=min(blocks, problem.lane_blocks) * LANES, parallel=parallel)
        if tiling not in found:
            found.append(tiling)
    return found
