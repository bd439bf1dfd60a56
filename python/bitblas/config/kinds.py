"""Which kind of config the fields of a plan or a record hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .attention import FlashAttenConfig
from .matmul import MatmulConfig

#: What an operator may be asked for.
Config = MatmulConfig | FlashAttenConfig
#: What fields say beside a config; beside that of a matmul they say nothing.
ATTENTION = "attention"


def config_fields(config: Config) -> dict[str, object]:
    """A config and its kind, as JSON values: what `read_config` reads."""
    kind = {"operator": ATTENTION} if isinstance(config, FlashAttenConfig) else {}
    return {**kind, "config": config.fields()}


def read_config(fields: Mapping[str, Any]) -> Config:
    """The config in the fields of a plan or a record.

    Raises
    ------
    KeyError, TypeError, ConfigError
        This version knows none like that.
    """
    kinds: dict[object, type[Config]] = {None: MatmulConfig, ATTENTION: FlashAttenConfig}
    return kinds[fields.get("operator")](**fields["config"])
