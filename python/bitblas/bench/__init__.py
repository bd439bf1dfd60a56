"""Measuring: candidates side by side on weights that come from memory, each checked against a float64 reference."""

from ..measuring import cache_bytes, num_copies, rotate
from .ceilings import Ceiling, Probes, decode_kind, products_of, unit_of
from .machine import Machine, measure_machine
from .matmul import (
    Comparison,
    Peer,
    Skipped,
    compare,
    own_variant,
    torch_dense,
    torch_int_mm,
    use_threads,
)
from .timing import Candidate, Timing, Verdict, side_by_side
from .workload import Workload, draw_workload

__all__ = [
    "Candidate",
    "Ceiling",
    "Comparison",
    "Machine",
    "Peer",
    "Probes",
    "Skipped",
    "Timing",
    "Verdict",
    "Workload",
    "cache_bytes",
    "compare",
    "decode_kind",
    "draw_workload",
    "measure_machine",
    "num_copies",
    "own_variant",
    "products_of",
    "rotate",
    "side_by_side",
    "torch_dense",
    "torch_int_mm",
    "unit_of",
    "use_threads",
]
