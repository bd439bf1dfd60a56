"""What a tiling for tensor cores is expected to take, by arithmetic from the numbers of a card: an order, not a prediction."""

from __future__ import annotations

from ...machines import Card
from ..rule import Problem
from .tiles import FragmentTiling, source_bytes

#: Multiply-accumulates of 16 bits that a multiprocessor does in a second with `mma.sync`, about; of bytes twice as many.
_PRODUCTS = 1e12
#: Activations that a multiprocessor quantizes in a second.
_QUANTIZED = 15e9
#: Bytes a second between a multiprocessor and the second-level cache.
_L2_BYTES = 40e9
#: Seconds that a byte from memory is on its way: so long must as many bytes be asked for as the memory gives in that time.
_LATENCY = 0.8e-6
#: Seconds from the beginning of a block to its first product, with its end; and those of a part of K more.
_BLOCK, _PART = 1.5e-6, 1.5e-6
#: Bytes a second that a multiprocessor reads where the memory's bandwidth is not known.
_UNKNOWN_BYTES = 20e9
#: Threads of 128 registers each that a multiprocessor holds.
_THREADS = 512


def card_of(problem: Problem) -> Card:
    """The card of a problem's target."""
    card = problem.target.card
    assert card is not None
    return card


def estimate(problem: Problem, tiling: FragmentTiling) -> float:
    """Seconds that a launch with the problem's rows is expected to take."""
    config, card = problem.config, card_of(problem)
    bandwidth = card.memory_gbs * 1e9 or card.num_sms * _UNKNOWN_BYTES
    tiles_m, tiles_n = -(-problem.m // tiling.block_m), -(-config.N // tiling.block_n)
    blocks = tiles_m * tiles_n * tiling.split_k
    # what tiles of many rows sum takes twice the registers
    threads = tiling.num_threads * (2 if tiling.block_m * tiling.n_tiles > 64 else 1)
    at_once = _THREADS // threads if tiling.stages else tiling.blocks_at_once
    at_once = max(1, min(at_once, card.shared_bytes // tiling.shared_bytes(config)))
    waves = -(-blocks // (card.num_sms * at_once))
    steps = -(-(config.K // tiling.block_k) // (tiling.split_k * tiling.warps_k))
    # the part of the card that has work, over all waves
    busy = blocks / (-(-blocks // card.num_sms) * card.num_sms)

    step_bytes = tiling.block_n * tiling.block_k * config.format.bits / 8
    ahead = (tiling.stages - 1 if tiling.stages else 2 * tiling.warps_k) * step_bytes
    resident = min(at_once, blocks / card.num_sms)
    flow = min(1.0, resident * ahead * card.num_sms / (bandwidth * _LATENCY))
    memory = problem.layout.num_bytes / (bandwidth * flow * min(1.0, busy * 1.25))

    element = source_bytes(config)
    padded = tiles_m * tiling.block_m * tiles_n * tiling.block_n
    products = padded * config.K / (card.num_sms * busy * _PRODUCTS * (2 if problem.layout.name == "mma8" else 1))
    rows = min(problem.m, tiles_m * tiling.block_m)  # others are not read
    read = tiles_n * rows * config.K * element + tiles_m * problem.layout.num_bytes
    cached = read / (card.num_sms * busy * _L2_BYTES)
    before = 0.0
    if config.dynamic_quantization:  # each block reads its rows, all of K, for the largest magnitudes, before all else
        products += tiles_n * rows * config.K / (card.num_sms * busy * _QUANTIZED)
        before = tiles_n * tiling.split_k * rows * config.K * element / (card.num_sms * busy * _L2_BYTES)
    parts = 0.0
    if tiling.split_k > 1:
        parts = _PART + 2 * padded * 4 * tiling.split_k / (card.num_sms * busy * _L2_BYTES)
    ends = (_BLOCK + tiling.stages * 0.1e-6) * waves
    return max(memory, products, cached) + 0.2 * min(memory, products) + before + parts + ends + steps * 0.02e-6
