"""Measuring: candidates side by side on weights that come from memory, each checked against a float64 reference."""

from .machine import Machine, cache_bytes, measure_machine
from .matmul import Comparison, Peer, Skipped, compare, rotate, torch_dense, torch_int_mm, use_threads
from .timing import Candidate, Timing, Verdict, side_by_side
from .workload import Workload, draw_workload

__all__ = [
    "Candidate",
    "Comparison",
    "Machine",
    "Peer",
    "Skipped",
    "Timing",
    "Verdict",
    "Workload",
    "cache_bytes",
    "compare",
    "draw_workload",
    "measure_machine",
    "rotate",
    "side_by_side",
    "torch_dense",
    "torch_int_mm",
    "use_threads",
]
