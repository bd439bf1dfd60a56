"""What is asked of a matmul."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from numbers import Integral

from ..errors import ConfigError
from ..formats import FORMATS, DataFormat, parse_format
from .checks import check_dtype_name, check_eps, check_flag, check_size, json_fields

#: The rows for which kernels are specialised when M is not given.
DEFAULT_BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024)

A_DTYPES = ("float16", "bfloat16", "float32", "int8", "int4", "float8_e4m3", "float8_e5m2")
OUT_DTYPES = ("float16", "bfloat16", "float32", "int32", "int8")
ACCUM_DTYPES = ("float16", "bfloat16", "float32", "int32")
ZEROS_MODES = ("original", "rescale", "quantized")
LAYOUTS = ("nt", "nn", "tn", "tt")
#: Dtypes of scale and zeros where A has at most 8 bits; else they have A's dtype.
SCALE_DTYPES = ("float32", "float16", "bfloat16")
#: What shares a scale where float activations are quantized on the fly.
DYNAMIC_QUANTIZATIONS = ("row", "group")

_INTEGER_DTYPES = ("int32", "int8")
_INTEGER_ACTIVATIONS = ("int8", "int4")
_FLOAT_ACTIVATIONS = ("float16", "bfloat16", "float32")


def check_buckets(argument: str, value: object) -> int | tuple[int, ...]:
    """Return rows to specialise for, or raise ConfigError."""
    if value is None:
        return DEFAULT_BUCKETS
    if isinstance(value, (list, tuple)):
        if not value:
            raise ConfigError(f"{argument} is empty; give an int, a list of ints, or None")
        return tuple(check_size(argument, m) for m in value)
    return check_size(argument, value)


@dataclass(frozen=True)
class MatmulConfig:
    """out = A · dequantize(W)ᵀ (+ bias), for one shape of W.

    Parameters
    ----------
    M : int, sequence of int, or None
        Rows of A. An int builds for exactly that many; a sequence names the buckets that kernels are specialised for while
        any number of rows is accepted; None is ``(1, 16, 32, 64, 128, 256, 512, 1024)``.
    N, K : int
        Output and input features.
    A_dtype : str
        float16, bfloat16, float32, int8, int4 (values in int8, or two to a byte), float8_e4m3 or float8_e5m2.
    W_dtype : str or None
        A weight format (`bitblas.formats.FORMATS`); None means A_dtype.
    out_dtype : str
        float16, bfloat16, float32; and, for int8 or int4 times an integer format, int32 or int8 (saturating).
    accum_dtype : str
        float16, bfloat16, float32 or int32. Honoured or exceeded: floats are accumulated in float32; integers exactly, in
        int32, or int64 where K is so large that int32 could overflow. What scales, zero points and a bias in float add
        to them is computed in float32; in float64 where int32 was asked for, here or as out_dtype.
    layout : str
        What A and the weights look like. First letter ``n``: A is (..., M, K) and the output (..., M, N); ``t``: A is
        (..., K, M), the output still (..., M, N). Second letter ``t``: `transform_weight` takes (N, K); ``n``: (K, N). Packed
        weights, scales and zero points are the same for all four.
    with_bias : bool
        Whether a bias of shape (N,) is added.
    group_size : int
        Number of consecutive k that share a scale and a zero point; -1 means all of K.
    with_scaling, with_zeros : bool
        Whether there are scales and zero points.
    zeros_mode : str
        ``"original"``: (w - z)·s; ``"rescale"``: w·s - z; ``"quantized"``: (w - z)·s with integer z, packed.
    storage_dtype, fast_decoding, propagate_a, propagate_b, optimize_stratety
        Hints of the original BitBLAS: accepted, without effect on results.
    bias : bool, optional
        Another name of `with_bias`.
    dynamic_quantization : str, optional
        Whether activations in float16, bfloat16 or float32 are rounded to int8 on the fly, and multiplied with an integer
        format as integers: ``"row"``, with one scale for each row of A; ``"group"``, with one for each row and group of k. By
        keyword only. It changes results: each activation a becomes q·s in float32, s = max(max |a|, `activation_eps`) / 127
        over the row or group, q = a / s to nearest, ties to even. A row with an infinity or a NaN gives NaN.
    activation_eps : float, optional
        With `dynamic_quantization`, by keyword only: at least 2^-119, which None means.
    scale_per_tensor : bool, optional
        Whether one scale, float32 of shape (1,), is that of all weights; with `with_scaling`, one group and no zero points. By
        keyword only.

    Raises
    ------
    ConfigError
        A value is not allowed, or two contradict each other.
    """

    M: int | tuple[int, ...] | Sequence[int] | None = None
    N: int = None  # type: ignore[assignment]
    K: int = None  # type: ignore[assignment]
    A_dtype: str = "float16"
    W_dtype: str = None  # type: ignore[assignment]
    out_dtype: str = "float16"
    accum_dtype: str = "float16"
    layout: str = "nt"
    with_bias: bool = False
    group_size: int = -1
    with_scaling: bool = False
    with_zeros: bool = False
    zeros_mode: str = "original"
    storage_dtype: str = field(default="int8", compare=False)
    fast_decoding: bool | None = field(default=None, compare=False)
    propagate_a: object = field(default=None, compare=False)
    propagate_b: object = field(default=None, compare=False)
    optimize_stratety: object = field(default=None, compare=False)
    bias: InitVar[bool | None] = None
    dynamic_quantization: str | None = field(default=None, kw_only=True)
    activation_eps: float | None = field(default=None, kw_only=True)
    scale_per_tensor: bool | None = field(default=None, kw_only=True)

    def __post_init__(self, bias: bool | None) -> None:
        self._normalize(bias)
        self._check_dtypes()
        self._check_quantization()
        self._check_dynamic_quantization()

    def _normalize(self, bias: bool | None) -> None:
        a_dtype = check_dtype_name("A_dtype", self.A_dtype, A_DTYPES)
        values = {
            "M": check_buckets("M", self.M),
            "N": check_size("N", self.N),
            "K": check_size("K", self.K),
            "A_dtype": a_dtype,
            "W_dtype": parse_format(a_dtype if self.W_dtype is None else self.W_dtype).name,
            "out_dtype": check_dtype_name("out_dtype", self.out_dtype, OUT_DTYPES),
            "accum_dtype": check_dtype_name("accum_dtype", self.accum_dtype, ACCUM_DTYPES),
            "with_bias": self._bias(bias),
            "with_scaling": check_flag("with_scaling", self.with_scaling),
            "with_zeros": check_flag("with_zeros", self.with_zeros),
            "group_size": -1 if self.group_size is None else self.group_size,
            "zeros_mode": "original" if self.zeros_mode is None else self.zeros_mode,
            "scale_per_tensor": check_flag("scale_per_tensor", self.scale_per_tensor) or None,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; allowed: {', '.join(LAYOUTS)}")

    def _bias(self, bias: bool | None) -> bool:
        with_bias = check_flag("with_bias", self.with_bias)
        if with_bias and bias is not None and not check_flag("bias", bias):
            raise ConfigError("bias is False, but with_bias is True: they are two names of one thing")
        return with_bias or check_flag("bias", bias)

    def _check_dtypes(self) -> None:
        integers = self.A_dtype in _INTEGER_ACTIVATIONS and self.format.is_integer
        if self.out_dtype in _INTEGER_DTYPES and not integers:
            raise ConfigError(
                f"out_dtype {self.out_dtype} needs A_dtype int8 or int4 and an integer W_dtype, "
                f"not {self.A_dtype} and {self.W_dtype}"
            )
        if self.accum_dtype == "int32" and not integers:
            raise ConfigError(
                f"accum_dtype int32 needs A_dtype int8 or int4 and an integer W_dtype, not {self.A_dtype} and {self.W_dtype}"
            )

    def _check_quantization(self) -> None:
        g = self.group_size
        if isinstance(g, bool) or not isinstance(g, Integral) or (g != -1 and (g < 1 or self.K % g)):
            raise ConfigError(f"group_size is {g!r}; it must be -1 or a divisor of K = {self.K}")
        object.__setattr__(self, "group_size", int(g))
        if self.scale_per_tensor and (not self.with_scaling or self.num_groups > 1):
            raise ConfigError(
                f"scale_per_tensor is True with with_scaling {self.with_scaling} and group_size {g}; it needs True and -1"
            )
        if self.zeros_mode not in ZEROS_MODES:
            raise ConfigError(f"zeros_mode is {self.zeros_mode!r}; allowed: {', '.join(ZEROS_MODES)}")
        if not self.with_zeros:
            return
        if not self.format.is_integer:
            raise ConfigError(f"with_zeros: the format {self.W_dtype} has no zero points; only uint and int formats do")
        if self.zeros_mode == "quantized" and self.format.kind != "uint":
            raise ConfigError(f"zeros_mode 'quantized' needs an unsigned W_dtype, not {self.W_dtype}")

        if self.scale_per_tensor:
            raise ConfigError(
                "scale_per_tensor and with_zeros are True: weights that share one scale have no zero points"
            )

    def _check_dynamic_quantization(self) -> None:
        value = self.dynamic_quantization
        self._check_eps()
        if value is None:
            return
        if value not in DYNAMIC_QUANTIZATIONS:
            raise ConfigError(
                f"dynamic_quantization is {value!r}; allowed: None, {', '.join(map(repr, DYNAMIC_QUANTIZATIONS))}"
            )
        if self.A_dtype not in _FLOAT_ACTIVATIONS:
            raise ConfigError(
                f"dynamic_quantization {value!r} needs A_dtype {', '.join(_FLOAT_ACTIVATIONS[:2])} or {_FLOAT_ACTIVATIONS[2]}, "
                f"not {self.A_dtype}, which has at most 8 bits already"
            )
        if not self.format.is_integer:
            raise ConfigError(
                f"dynamic_quantization {value!r} needs a W_dtype of integers, uint1 to uint8 or int1 to int8, not "
                f"{self.W_dtype}, whose products with int8 are none"
            )
        if value == "group" and self.group == 1 and self.K > 1:
            raise ConfigError(
                "dynamic_quantization 'group' needs a group_size of at least 2, or -1: alone in its group, each activation "
                "would bring a scale of its own"
            )

    def _check_eps(self) -> None:
        eps = self.activation_eps
        if eps is None:
            return
        checked = check_eps("activation_eps", eps)
        if self.dynamic_quantization is None:
            raise ConfigError(f"activation_eps is {eps!r}, but nothing is quantized: dynamic_quantization is None")
        object.__setattr__(self, "activation_eps", checked)

    # -- derived facts ---------------------------------------------------------------------------------------------------

    @property
    def format(self) -> DataFormat:
        """The weights' `DataFormat`."""
        return parse_format(self.W_dtype)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The row counts to specialise for, ascending and each once."""
        return (self.M,) if isinstance(self.M, int) else tuple(sorted(set(self.M)))  # type: ignore[arg-type]

    @property
    def is_dynamic(self) -> bool:
        """Whether any number of rows is accepted."""
        return not isinstance(self.M, int)

    @property
    def group(self) -> int:
        """Number of consecutive k that share a scale: `group_size`, or K for -1."""
        return self.K if self.group_size == -1 else self.group_size

    @property
    def num_groups(self) -> int:
        """Number of groups along K."""
        return self.K // self.group

    @property
    def is_grouped(self) -> bool:
        """Whether there is anything for a group to share."""
        return self.with_scaling or self.with_zeros or self.activation_groups > 1

    @property
    def activation_groups(self) -> int:
        """Number of scales that each row of A is quantized with; 0 where it is not quantized."""
        if self.dynamic_quantization is None:
            return 0
        return self.num_groups if self.dynamic_quantization == "group" else 1

    @property
    def kernel(self) -> MatmulConfig:
        """The config of the kernels that serve this one: what differs at the door only is the same here.

        Kernels take A row by row, and the values of an int4 A in int8; a group that is the whole row is a row.
        """
        values = {f.name: getattr(self, f.name) for f in fields(MatmulConfig)}
        values["layout"] = "nt"
        values["A_dtype"] = "int8" if self.A_dtype == "int4" else self.A_dtype
        values["dynamic_quantization"] = "row" if self.activation_groups == 1 else self.dynamic_quantization
        return MatmulConfig(**values)

    @property
    def integer_products(self) -> bool:
        """Whether every product of an activation, perhaps quantized on the fly, and a weight is an integer."""
        if self.dynamic_quantization is not None:
            return True
        return self.A_dtype in _INTEGER_ACTIVATIONS and self.format.is_integer

    @property
    def zeros_packed(self) -> bool:
        """Whether zero points are integers packed along N."""
        return self.with_zeros and self.zeros_mode == "quantized"

    @property
    def integer_accumulation(self) -> bool:
        """Whether products are summed as integers over all of K: with no float operand inside the sum."""
        if not self.integer_products or self.activation_groups > 1:
            return False
        return (not self.with_scaling or self.num_groups == 1) and (not self.with_zeros or self.zeros_packed)

    @property
    def sum_dtype(self) -> str:
        """Dtype in which chunks of k are summed: one that holds sums of integers exactly, floats for the rest."""
        if not self.integer_products:
            return "float32"
        if not self.integer_accumulation:
            return self.scaling_dtype
        low, high = self.format.value_range
        largest = self.K * 128 * (max(-low, high) + (high if self.zeros_packed else 0))
        return "int32" if largest < 1 << 31 else "int64"

    @property
    def scaling_dtype(self) -> str:
        """Dtype in which sums of integers meet floats: float64 where exactness was asked for."""
        exact = self.integer_products and (self.accum_dtype == "int32" or self.out_dtype in _INTEGER_DTYPES)
        return "float64" if exact else "float32"

    @property
    def held_dtype(self) -> str:
        """Name of the torch dtype in which users hold A: its own, int8 for int4."""
        return FORMATS[self.A_dtype].torch_name or "int8"

    @property
    def activation_dtype(self) -> str:
        """Dtype in which A reaches the kernel: its own, int8 for the values of int4 and the bytes of float8."""
        return self.A_dtype if FORMATS[self.A_dtype].bits > 8 else "int8"

    @property
    def scale_dtype(self) -> str:
        """Dtype in which scale and zeros reach the kernel; beside an A of at most 8 bits other floats are converted to it."""
        return "float32" if self.activation_dtype == "int8" or self.scale_per_tensor else self.A_dtype

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """Dtypes in which scale and zeros may be given."""
        return SCALE_DTYPES if self.activation_dtype == "int8" or self.scale_per_tensor else (self.A_dtype,)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of scale: one number, or one for each column and group."""
        return (1,) if self.scale_per_tensor else (self.N, self.num_groups)

    @property
    def bias_dtype(self) -> str:
        """Dtype in which a bias reaches the kernel: one that holds both A's and the output's dtype."""
        if self.A_dtype in _INTEGER_ACTIVATIONS:
            return "int32" if self.out_dtype in _INTEGER_DTYPES else self.out_dtype
        return self.A_dtype if self.A_dtype == self.out_dtype else "float32"

    @property
    def recorded(self) -> MatmulConfig:
        """The config under which measurements are kept, by bucket."""
        return self.kernel

    def for_bucket(self, m: int | None) -> MatmulConfig:
        """The config of a kernel for one bucket of rows; None leaves them open. That of a fixed M keeps it."""
        kernel = self.kernel
        return kernel if m is not None and not self.is_dynamic else replace(kernel, M=m if m is None else (m,))

    def describe(self) -> str:
        """What is computed, for messages."""
        details = [f"{self.A_dtype} x {self.W_dtype} -> {self.out_dtype}", f"N={self.N} K={self.K}"]
        details += [f"groups of {self.group}"] if self.is_grouped and self.num_groups > 1 else []
        details += ["scales"] if self.with_scaling else []
        details += [f"{self.zeros_mode} zeros"] if self.with_zeros else []
        details += ["bias"] if self.with_bias else []
        details += [f"activations quantized by {self.dynamic_quantization}"] if self.dynamic_quantization else []
        return ", ".join(details)

    def fields(self) -> dict[str, object]:
        """All that shapes the result, as JSON values: what an artifact's key is made of."""
        return json_fields(self)
