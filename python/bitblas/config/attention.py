"""What is asked of an attention."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import NamedTuple

from ..errors import ConfigError
from .checks import check_dtype_name, check_flag, check_size, json_fields

#: The rows (queries, times the heads that share keys) that kernels are specialised for where they are not known.
QUERY_BUCKETS = (1, 16, 64, 256, 1024)

ATTENTION_DTYPES = ("float16", "bfloat16", "float32")
ATTENTION_LAYOUTS = ("nnn", "ntn")
#: Largest dim and dim_v: a block of keys has to fit a cache.
MAX_HEAD_DIM = 1024
#: Times log2(e) a smaller softmax_scale is a number of float32.
SCALE_LIMIT = 2.0**126


class Sizes(NamedTuple):
    """The sizes of a call."""

    batch: int
    heads: int
    heads_kv: int
    seq_len: int
    seq_len_kv: int

    @property
    def rows(self) -> int:
        """Rows of each head of K: queries, times the heads that share it."""
        return self.seq_len * (self.heads // self.heads_kv) if self.heads_kv else 0

    def q_shape(self, config: FlashAttenConfig) -> tuple[int, ...]:
        """(batch, seq_len, heads, dim)."""
        return self.batch, self.seq_len, self.heads, config.dim

    def k_shape(self, config: FlashAttenConfig) -> tuple[int, ...]:
        """(batch, seq_len_kv, heads_kv, dim), or (batch, dim, heads_kv, seq_len_kv) for the layout ntn."""
        if config.layout == "ntn":
            return self.batch, config.dim, self.heads_kv, self.seq_len_kv
        return self.batch, self.seq_len_kv, self.heads_kv, config.dim

    def v_shape(self, config: FlashAttenConfig) -> tuple[int, ...]:
        """(batch, seq_len_kv, heads_kv, dim_v)."""
        return self.batch, self.seq_len_kv, self.heads_kv, config.dim_v

    def output_shape(self, config: FlashAttenConfig) -> tuple[int, ...]:
        """(batch, seq_len, heads, dim_v)."""
        return self.batch, self.seq_len, self.heads, config.dim_v


@dataclass(frozen=True)
class FlashAttenConfig:
    """out = softmax(Q · Kᵀ · softmax_scale) · V, for each head.

    Parameters
    ----------
    batch, heads, seq_len : int or None
        Batch size, heads of Q, and queries of each; None leaves it open until the call.
    dim : int
        Elements of a head of Q and K, up to 1024.
    Q_dtype, K_dtype, V_dtype : str
        float16, bfloat16 or float32.
    Accu_dtype : str
        float32, in which scores and sums are held.
    Out_dtype : str
        float16, bfloat16 or float32.
    layout : str
        ``"nnn"``: K is (batch, seq_len_kv, heads_kv, dim); ``"ntn"``: it is (batch, dim, heads_kv, seq_len_kv). Q is
        (batch, seq_len, heads, dim), V (batch, seq_len_kv, heads_kv, dim_v), out (batch, seq_len, heads, dim_v) for both.
    is_causal : bool
        Whether query i sees only the keys j <= i + seq_len_kv - seq_len: the last query sees all of them. A query that
        sees none gives zeros.
    heads_kv : int, optional
        Heads of K and V, a divisor of `heads`: head h of Q reads head h // (heads / heads_kv). None means `heads`; an open
        `heads` leaves it open as well. By keyword only, as are those that follow.
    seq_len_kv : int, None, or "seq_len"
        Keys; None leaves it open until the call, ``"seq_len"`` means as many as queries where their number is given.
    dim_v : int, optional
        Elements of a head of V and of the output, up to 1024; None means `dim`.
    softmax_scale : float, optional
        What scores are multiplied by, of a magnitude below 2^126; None means 1/√dim.

    Raises
    ------
    ConfigError
        A value is not allowed, or two contradict each other.
    """

    batch: int | None = None
    heads: int | None = None
    seq_len: int | None = None
    dim: int = None  # type: ignore[assignment]
    Q_dtype: str = "float16"
    K_dtype: str = "float16"
    V_dtype: str = "float16"
    Accu_dtype: str = "float32"
    Out_dtype: str = "float16"
    layout: str = "nnn"
    is_causal: bool = False
    heads_kv: int | None = field(default=None, kw_only=True)
    seq_len_kv: int | str | None = field(default="seq_len", kw_only=True)
    dim_v: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    softmax_scale: float = field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        dim = _check_dim("dim", self.dim)
        values = {
            "batch": _check_open("batch", self.batch),
            "heads": _check_open("heads", self.heads),
            "seq_len": _check_open("seq_len", self.seq_len),
            "dim": dim,
            "Accu_dtype": check_dtype_name("Accu_dtype", self.Accu_dtype, ("float32",)),
            "is_causal": check_flag("is_causal", self.is_causal),
            "dim_v": dim if self.dim_v is None else _check_dim("dim_v", self.dim_v),
            "softmax_scale": self._checked_scale(dim),
        }
        for name in ("Q_dtype", "K_dtype", "V_dtype", "Out_dtype"):
            values[name] = check_dtype_name(name, getattr(self, name), ATTENTION_DTYPES)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.layout not in ATTENTION_LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; allowed: {', '.join(ATTENTION_LAYOUTS)}")
        keys = self.seq_len if self.seq_len_kv == "seq_len" else _check_open("seq_len_kv", self.seq_len_kv)
        object.__setattr__(self, "seq_len_kv", keys)
        object.__setattr__(self, "heads_kv", self._checked_heads_kv())

    def _checked_scale(self, dim: int) -> float:
        scale = self.softmax_scale
        if scale is None:
            return 1.0 / math.sqrt(dim)
        if isinstance(scale, bool) or not isinstance(scale, Real) or not abs(scale) < SCALE_LIMIT:
            raise ConfigError(
                f"softmax_scale is {scale!r}; it must be a number of a magnitude below 2^126, or None for 1/√dim"
            )
        return float(scale)

    def _checked_heads_kv(self) -> int | None:
        if self.heads_kv is None:
            return self.heads
        heads_kv = check_size("heads_kv", self.heads_kv)
        if self.heads is None:
            raise ConfigError(
                f"heads_kv is {heads_kv}, but heads is not given, which leaves both open; give heads as well"
            )
        if self.heads % heads_kv:
            raise ConfigError(f"heads_kv is {heads_kv}; it must be a divisor of heads = {self.heads}")
        return heads_kv

    # -- derived facts ---------------------------------------------------------------------------------------------------

    @property
    def buckets(self) -> tuple[int, ...]:
        """The rows that kernels are specialised for, ascending; a row is a query of one of the heads that share keys."""
        if self.seq_len is None:
            return QUERY_BUCKETS
        if self.seq_len == 1 and self.heads is None:
            return QUERY_BUCKETS[:2]  # the second for heads that share keys
        rows = self.seq_len * (self.heads // self.heads_kv if self.heads and self.heads_kv else 1)
        return (QUERY_BUCKETS[min(bisect_left(QUERY_BUCKETS, rows), len(QUERY_BUCKETS) - 1)],)

    @property
    def kernel(self) -> FlashAttenConfig:
        """The config of the kernels that serve this one: they take any batch, heads and lengths, and know a bucket of rows."""
        buckets = self.buckets
        if len(buckets) == 1:
            return self._of_rows(buckets[0], 1)
        return self._of_rows(self.seq_len, None)

    def _of_rows(self, rows: int | None, heads: int | None) -> FlashAttenConfig:
        return replace(self, batch=None, heads=heads, heads_kv=heads, seq_len=rows, seq_len_kv=None)

    @property
    def recorded(self) -> FlashAttenConfig:
        """The config under which measurements are kept, by bucket: that for any lengths."""
        return self.for_bucket(None)

    def for_bucket(self, m: int | None) -> FlashAttenConfig:
        """The config of a kernel for one bucket of rows; None leaves them open."""
        return self._of_rows(m, None if m is None else 1)

    def describe(self) -> str:
        """What is computed, for messages."""
        dtypes = "/".join(dict.fromkeys((self.Q_dtype, self.K_dtype, self.V_dtype)))
        dims = f"dim={self.dim}" + (f" dim_v={self.dim_v}" if self.dim_v != self.dim else "")
        details = [f"attention {dtypes} -> {self.Out_dtype}", dims]
        details += ["causal"] if self.is_causal else []
        details += ["K transposed"] if self.layout == "ntn" else []
        return ", ".join(details)

    def fields(self) -> dict[str, object]:
        """All that shapes the result, as JSON values: what an artifact's key is made of."""
        return json_fields(self)


def _check_open(argument: str, value: object) -> int | None:
    return None if value is None else check_size(argument, value)


def _check_dim(argument: str, value: object) -> int:
    size = check_size(argument, value)
    if size > MAX_HEAD_DIM:
        raise ConfigError(f"{argument} is {size}; it must be at most {MAX_HEAD_DIM}")
    return size
