"""Enumerations of the original BitBLAS that callers import."""

from __future__ import annotations

from enum import IntEnum


class TransformKind(IntEnum):
    """How far a weight is permuted ahead of time for a tensor core's loads; see `LadderPermutateConfig`."""

    NonTransform = 0
    InterWarpTransform = 1
    IntraWarpTransform = 2
    LDMatrixTransform = 3


class OptimizeStrategy(IntEnum):
    """Which rows to be fast for: a hint of `MatmulConfig`, without effect on results."""

    SingleBatchDecodeOnly = 0
    ContigousBatching = 1  # sic
