"""Whole folders of models: read, converted, verified, written."""

from .folder import read_layers, read_weight, read_weights
from .shards import Shards, open_shards
from .spec import LayerSpec, make_config, parse_config

__all__ = [
    "LayerSpec",
    "Shards",
    "make_config",
    "open_shards",
    "parse_config",
    "read_layers",
    "read_weight",
    "read_weights",
]
