"""What a tiling is expected to cost, so that the likely ones are measured first: an order, not a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...layout import QUAD
from ..rule import LINE_BYTES, Problem
from .units import LaneTiling

#: Sums that have to be under way so that no multiplier waits for one: 4 cycles' latency, 2 a cycle.
_CHAINS = 8
#: Vectors multiplied, and vectors loaded, in a cycle.
_PER_CYCLE = 2
#: Multiply-accumulates of a lane, by `LaneTiling.dot`; of bytes four.
_PRODUCTS = {"": 1, "bf16": 2}
#: Instructions that decode a vector of codes.
_DECODE = 3
#: By how much weights that nobody asks for ahead come later.
_UNASKED = 1.1


@dataclass(frozen=True)
class Caches:
    """A core's share of the memory.

    Attributes
    ----------
    levels : tuple of (int, float)
        (bytes, cycles to move a line of 64) of each cache, the nearest first.
    memory : float
        Cycles to move a line from memory.
    threads : int
        Cores that share the work.
    """

    levels: tuple[tuple[int, float], ...] = ((32 << 10, 1.0), (512 << 10, 2.0), (16 << 20, 5.0))
    memory: float = 12.0
    threads: int = 2

    def move(self, num_bytes: float, footprint: float) -> float:
        """Cycles to read bytes again and again out of `footprint` bytes, which lie in the nearest cache that holds them."""
        return num_bytes / LINE_BYTES * next((cycles for size, cycles in self.levels if footprint <= size), self.memory)


@dataclass(frozen=True)
class Cost:
    """Cycles of all threads together, by what they are spent on.

    Attributes
    ----------
    weights : float
        Reading weights.
    activations : float
        Reading activations, once for each tile of columns.
    panel : float
        Writing and reading decoded weights, and sums that leave the registers.
    decode : float
        Turning codes into values.
    multiply : float
        Multiplying, in whole tiles, what fills them up included.
    spill : float
        Storing and loading what does not fit into the registers.
    imbalance : float
        By how much the thread with the most tiles has more than its share; 1 for none.
    """

    weights: float
    activations: float
    panel: float
    decode: float
    multiply: float
    spill: float
    imbalance: float

    @property
    def total(self) -> float:
        """Cycles, where memory and computing overlap."""
        computing = self.activations + self.panel + self.decode + self.multiply + self.spill
        return max(self.weights, computing) * self.imbalance + 0.1 * min(self.weights, computing)


def estimate(problem: Problem, tiling: LaneTiling, caches: Caches = Caches()) -> Cost:
    """What a tiling is expected to cost."""
    config, target = problem.config, problem.target
    vector = max(4, target.vector_bits // 32)
    products = _PRODUCTS.get(tiling.dot, QUAD)
    element = 4 // products  # bytes of a slice of an activation, and of a decoded weight
    slices = tiling.slices or 1
    row_tiles, column_tiles = -(-problem.m // tiling.block_m), -(-config.N // tiling.block_n)
    rows, columns = row_tiles * tiling.block_m, column_tiles * tiling.block_n
    registers = tiling.block_n // vector or 1  # of one row of sums
    tile_steps = slices * row_tiles * column_tiles * config.K / products

    passes = 1 if tiling.panel else row_tiles
    weight_bytes = problem.layout.num_bytes / config.N * columns
    weights = caches.memory * weight_bytes / LINE_BYTES
    weights += caches.move(weight_bytes * (passes - 1), weight_bytes / column_tiles)
    if not tiling.prefetch and passes == 1:
        weights *= _UNASKED

    slab = min(tiling.slab_m or rows, rows)
    copied = config.K * element * slices  # bytes of a row
    activations = caches.move(rows * copied * column_tiles, slab * copied)
    decode = _DECODE * columns * config.K * passes / (vector * products)
    multiply = tile_steps * max(tiling.block_m * registers, tiling.block_m + registers) / _PER_CYCLE
    multiply *= max(1.0, _CHAINS / (tiling.block_m * registers))
    missing = max(0, tiling.block_m * registers + registers + 2 - target.num_vector_registers)

    panel = caches.memory * 2 * (tiling.split_k - 1) * rows * columns * 4 / LINE_BYTES  # sums of the parts of K
    if tiling.panel:
        chunk = min(tiling.chunk(config, problem.layout), config.K)
        decoded = columns * config.K * element
        panel += caches.move(decoded * (1 + row_tiles), chunk * tiling.block_n * element)
        panel += caches.move(2 * rows * columns * 4 * config.K / chunk, slab * tiling.block_n * 4)
    threads = caches.threads if tiling.parallel else 1
    tasks = column_tiles * tiling.split_k
    imbalance = -(-tasks // threads) * threads / tasks * (caches.threads / threads)
    return Cost(weights, activations, panel, decode, multiply, 2 * missing * tile_steps, imbalance)


def rank(problem: Problem, tilings: Sequence[LaneTiling], caches: Caches = Caches()) -> list[LaneTiling]:
    """The default, which is the first, and then the others, the cheapest first; equal ones as they come."""
    default, *others = tilings
    return [default, *sorted(others, key=lambda tiling: estimate(problem, tiling, caches).total)]


__all__ = ["Caches", "Cost", "estimate", "rank"]
