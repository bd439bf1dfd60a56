"""The question that is asked of an operator: frozen, hashable, validated, never rewritten."""

from .attention import ATTENTION_DTYPES, ATTENTION_LAYOUTS, MAX_HEAD_DIM, QUERY_BUCKETS, FlashAttenConfig, Sizes
from .checks import LEAST_EPS, check_dtype_name, check_eps, check_flag, check_size, json_fields
from .kinds import ATTENTION, Config, config_fields, read_config
from .matmul import (
    A_DTYPES,
    ACCUM_DTYPES,
    DEFAULT_BUCKETS,
    DYNAMIC_QUANTIZATIONS,
    LAYOUTS,
    OUT_DTYPES,
    SCALE_DTYPES,
    ZEROS_MODES,
    MatmulConfig,
    check_buckets,
)

__all__ = [
    "ACCUM_DTYPES",
    "ATTENTION",
    "ATTENTION_DTYPES",
    "ATTENTION_LAYOUTS",
    "A_DTYPES",
    "DEFAULT_BUCKETS",
    "DYNAMIC_QUANTIZATIONS",
    "LAYOUTS",
    "LEAST_EPS",
    "MAX_HEAD_DIM",
    "OUT_DTYPES",
    "QUERY_BUCKETS",
    "SCALE_DTYPES",
    "ZEROS_MODES",
    "Config",
    "FlashAttenConfig",
    "MatmulConfig",
    "Sizes",
    "check_buckets",
    "check_dtype_name",
    "check_eps",
    "check_flag",
    "check_size",
    "config_fields",
    "json_fields",
    "read_config",
]
