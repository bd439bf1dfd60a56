"""Operators by a text: a graph of torch holds that, and finds, or makes, the operator by it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

from ..target import Target

#: What makes an operator of the fields of its text, by the kind that they name: the module which adds itself here.
makers: dict[str, Callable[[Mapping[str, Any], Target], Any]] = {}

#: Operators that are alive, by text; the latest of several.
_alive: WeakValueDictionary[str, Any] = WeakValueDictionary()
#: Those that were made for a graph, which holds their text only.
_made: dict[str, Any] = {}


def write_spec(kind: str, target: Target, **fields: object) -> str:
    """A text by which an operator can be found, or made again elsewhere."""
    return json.dumps({"operator": kind, "target": target.fields(), **fields}, sort_keys=True)


def announce(spec: str, op: object) -> None:
    """Let graphs find `op`."""
    _alive[spec] = op


def find_operator(spec: str) -> Any:
    """The operator of a text, made where none is alive.

    Raises
    ------
    UnsupportedError
        This machine cannot run the target that a graph was exported for.
    ArgumentError
        Weights lie in another layout here than in the program that exported the graph.
    """
    found = _alive.get(spec) or _made.get(spec)
    if found is None:
        fields = json.loads(spec)
        target = Target(**{**fields["target"], "mattr": tuple(fields["target"]["mattr"])})
        kind = fields["operator"]
        if kind not in makers:
            importlib.import_module(f".{kind}", __package__)
        found = _made[spec] = makers[kind](fields, target)
    return found
