"""Matmul with a hint on how many parts to split K into."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral

from ..config import MatmulConfig
from ..errors import ConfigError
from .matmul import Matmul


@dataclass(frozen=True)
class MatmulConfigWithSplitK(MatmulConfig):
    """A `MatmulConfig` with a hint on splitting K.

    Parameters
    ----------
    k_split : int
        Into how many parts K may be split, which are summed at last: a divisor of K. Without effect on results, and on
        artifacts: operators share those of `Matmul`.

    Raises
    ------
    ConfigError
        As for `MatmulConfig`, or `k_split` does not divide K.
    """

    k_split: int = field(default=1, kw_only=True)

    def __post_init__(self, bias: bool | None) -> None:
        super().__post_init__(bias)
        split = self.k_split
        if isinstance(split, bool) or not isinstance(split, Integral) or split < 1 or self.K % split:
            raise ConfigError(f"k_split is {split!r}; it must be at least 1 and divide K = {self.K}")
        object.__setattr__(self, "k_split", int(split))

    def fields(self) -> dict[str, object]:
        """As those of the `MatmulConfig` that asks the same."""
        return {name: value for name, value in super().fields().items() if name != "k_split"}


class MatmulWithSplitK(Matmul):
    """A `Matmul` for a `MatmulConfigWithSplitK`; the same results.

    Parameters
    ----------
    config : MatmulConfigWithSplitK
        What is asked.
    name, target, enable_tuning, from_database, backend
        As for `Matmul`.

    Raises
    ------
    ConfigError
        The config is none with a split, or as for `Matmul`.
    """

    config: MatmulConfigWithSplitK
    _config_class = MatmulConfigWithSplitK

    @property
    def k_split(self) -> int:
        """The hint of the config."""
        return self.config.k_split


__all__ = ["MatmulConfigWithSplitK", "MatmulWithSplitK"]
