"""Whole folders of models: read, converted, verified, written."""

from .convert import Summary
from .folder import open_folder, read_layers, read_weight, read_weights
from .repack import repack
from .shards import Shards, open_shards
from .spec import LayerSpec, make_config, parse_config
from .unpack import unpack

__all__ = [
    "LayerSpec",
    "Shards",
    "Summary",
    "make_config",
    "open_folder",
    "open_shards",
    "parse_config",
    "read_layers",
    "read_weight",
    "read_weights",
    "repack",
    "unpack",
]
