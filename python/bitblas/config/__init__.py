"""The question that is asked of an operator: frozen, hashable, validated, never rewritten."""

from .attention import ATTENTION_DTYPES, ATTENTION_LAYOUTS, MAX_HEAD_DIM, QUERY_BUCKETS, FlashAttenConfig
from .checks import LEAST_EPS, check_dtype_name, check_eps, check_flag, check_size
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

#: What an operator may be asked for.
Config = MatmulConfig | FlashAttenConfig

__all__ = [
    "ACCUM_DTYPES",
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
    "check_buckets",
    "check_dtype_name",
    "check_eps",
    "check_flag",
    "check_size",
]
