"""Choosing among the tilings of a rule by measuring them, here or on another machine, and remembering what was found."""

import importlib

#: Seconds that tuning takes, about. Loading the operator afterwards comes on top of it.
SECONDS = 25.0

#: Where everything is: constructing an operator needs the record alone.
_MODULES = {
    "LostError": "search",
    "Tuned": "search",
    "TunedBucket": "search",
    "Workbench": "search",
    "choices": "record",
    "load_record": "record",
    "measure_module": "local",
    "read_record": "record",
    "save_record": "record",
    "this_machine": "record",
    "tune": "search",
    "tune_here": "runs",
    "tune_there": "runs",
}

__all__ = ["SECONDS", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
