"""The float64 reference: what a matmul must give, how close, and random problems.

It shares no code with the product: formats, bit streams and sums are written here a second time, from the documents that
define them. A ``config`` is read for its plain fields only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

#: Unit roundoff of a dtype to which results are rounded, and half the distance of its subnormal numbers.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
_HALF_SUBNORMAL = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-150}
_INTEGERS = ("int8", "int32")
#: Activations that are integers, and those of at most 8 bits, beside which scales are floats of another dtype.
_INTEGER_A = ("int8", "int4")
_NARROW_A = (*_INTEGER_A, "float8_e4m3", "float8_e5m2")

#: QLoRA, arXiv:2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


# -- formats ---------------------------------------------------------------------------------------------------------------


def width(fmt: str) -> int:
    """Bits of a code of the format."""
    if fmt in ("nf4", "fp4_e2m1"):
        return 4
    if fmt.startswith("float8"):
        return 8
    return int(fmt.lstrip("bfloatuin"))


def _minifloat(code: int, exponent_bits: int, mantissa_bits: int, special: str) -> float:
    """IEEE-like small floats; `special` says what the largest exponent means: "none", "fn" (only all-ones is NaN), "ieee"."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        if special == "ieee":
            return math.nan if mantissa else sign * math.inf
        if special == "fn" and mantissa == (1 << mantissa_bits) - 1:
            return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def _code_value(fmt: str, code: int) -> float:
    bits = width(fmt)
    if fmt == "nf4":
        return NF4[code]
    if fmt == "fp4_e2m1":
        return _minifloat(code, 2, 1, "none")
    if fmt == "float8_e4m3":
        return _minifloat(code, 4, 3, "fn")
    if fmt == "float8_e5m2":
        return _minifloat(code, 5, 2, "ieee")
    if fmt.startswith("uint"):
        return float(code)
    if bits == 1:
        return 2.0 * code - 1.0
    if bits == 8:
        return float(code - 256 if code > 127 else code)
    return float(code - 2 ** (bits - 1))


def table(fmt: str) -> torch.Tensor:
    """The float64 value of every code of a format of at most eight bits."""
    return torch.tensor([_code_value(fmt, code) for code in range(1 << width(fmt))], dtype=torch.float64)


def decode(codes: torch.Tensor, fmt: str) -> torch.Tensor:
    """The float64 values of int64 codes."""
    if width(fmt) <= 8:
        return table(fmt)[codes]
    raw = codes.numpy()
    if fmt == "float16":
        values = raw.astype(np.uint16).view(np.float16)
    elif fmt == "bfloat16":
        values = (raw.astype(np.uint32) << 16).astype(np.uint32).view(np.float32)
    else:
        values = raw.astype(np.uint32).view(np.float32)
    return torch.from_numpy(values.astype(np.float64))


def float_codes(values: torch.Tensor, fmt: str) -> torch.Tensor:
    """The int64 codes of a native floating-point format, rounded to nearest."""
    rounded = values.to(getattr(torch, fmt))
    raw = rounded.view(torch.int16 if width(fmt) == 16 else torch.int32).to(torch.int64)
    return raw & ((1 << width(fmt)) - 1)


def as_weights(codes: torch.Tensor, fmt: str) -> torch.Tensor:
    """The codes as a user holds them: what `Matmul.transform_weight` takes."""
    if fmt in ("float16", "bfloat16", "float32"):
        return decode(codes, fmt).to(getattr(torch, fmt))
    if fmt.startswith("float8"):
        return codes.to(torch.uint8)
    if fmt.startswith("int"):
        return decode(codes, fmt).to(torch.int8)
    return codes.to(torch.uint8)


def integers(cfg: object) -> bool:
    """Whether the weights are integers."""
    return cfg.W_dtype.startswith(("uint", "int"))


def held(name: str) -> torch.dtype:
    """The torch dtype in which activations of a dtype are held."""
    return {"int4": torch.int8, "float8_e4m3": torch.float8_e4m3fn}.get(name) or getattr(torch, name)


def pairs(A: torch.Tensor) -> torch.Tensor:
    """int8 (..., K) values from -8 to 7 -> int8 (..., ceil(K / 2)), two to a byte, the first in the low bits."""
    if A.shape[-1] % 2:
        A = torch.cat([A, torch.zeros_like(A[..., :1])], dim=-1)
    values = A.to(torch.int64) % 16
    joined = values[..., 0::2] + 16 * values[..., 1::2]
    return torch.where(joined > 127, joined - 256, joined).to(torch.int8)


def one_scale(cfg: object) -> bool:
    """Whether all weights share one scale; other configs know nothing of it."""
    return bool(getattr(cfg, "scale_per_tensor", None))


def dynamic(cfg: object) -> str | None:
    """How float activations are quantized on the fly: "row", "group", or None; other configs know nothing of it."""
    return getattr(cfg, "dynamic_quantization", None)


def quantize(A: torch.Tensor, groups: int, eps: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """float32 whole numbers (m, groups, K / groups) for float activations (m, K), and their float32 scales (m, groups, 1).

    As documented: in float32, rounded to nearest even; a group with an infinity or a NaN has NaN for a scale.
    """
    a = A.to(torch.float32).numpy().reshape(A.shape[0], groups, A.shape[1] // groups)
    size = np.abs(a).max(axis=2, keepdims=True)
    with np.errstate(invalid="ignore"):
        bounded = np.where(np.isnan(size), size, np.maximum(size, np.float32(2.0**-119 if eps is None else eps)))
        step = bounded / np.float32(127)
        return np.rint(a / step), np.where(np.isfinite(size), step, np.float32(np.nan))


# -- bit streams -----------------------------------------------------------------------------------------------------------


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(R, C) codes -> int8 (R, ceil(C·bits/8)): a little-endian bit stream per row."""
    planes = (codes.numpy().astype(np.uint64)[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    stream = planes.astype(np.uint8).reshape(codes.shape[0], -1)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int8).copy())


def unpack_bits(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_bits`, as int64 codes."""
    stream = np.unpackbits(packed.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    planes = stream[:, : columns * bits].reshape(packed.shape[0], columns, bits).astype(np.int64)
    return torch.from_numpy((planes << np.arange(bits)).sum(-1))


def bit_at(packed: torch.Tensor, byte: int, bit: int) -> int:
    """One bit of a tensor's memory, seen as consecutive bytes."""
    return int(packed.contiguous().view(-1).view(torch.uint8)[byte]) >> bit & 1


# -- problems --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The operands of one call, and what they mean.

    Attributes
    ----------
    A : torch.Tensor
        (m, K) in A_dtype.
    codes : torch.Tensor
        int64 (N, K).
    scale, zeros, bias : torch.Tensor or None
        As the operator takes them; zeros packed where zeros_mode is "quantized".
    zero_values : torch.Tensor or None
        float64 (N, groups): what `zeros` means.
    codebook : str or None
        The dtype to which the values of a codebook are rounded before they are multiplied, where they are.
    rounded : str or None
        The dtype to which the weights, with scale and zeros, are rounded before they are multiplied, where they are.
    """

    config: object
    A: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    zero_values: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    seed: int = field(default=0)
    codebook: str | None = None
    rounded: str | None = None

    @property
    def weights(self) -> torch.Tensor:
        """(N, K) as `transform_weight` takes them."""
        return as_weights(self.codes, self.config.W_dtype)

    @property
    def activations(self) -> torch.Tensor:
        """The float64 (m, K) values that are multiplied: A, or what is left of it where it is quantized on the fly."""
        if dynamic(self.config) is None:
            return self.A.to(torch.float64)
        groups = _groups(self.config) if dynamic(self.config) == "group" else 1
        whole, scale = quantize(self.A, groups, getattr(self.config, "activation_eps", None))
        return torch.from_numpy((whole.astype(np.float64) * scale.astype(np.float64)).reshape(self.A.shape))

    @property
    def extras(self) -> dict[str, torch.Tensor]:
        """The operands beside A and W, by name."""
        rows = {"scale": self.scale, "zeros": self.zeros, "bias": self.bias}
        return {name: tensor for name, tensor in rows.items() if tensor is not None}

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float64 (N, K) q, s and z, spread over the groups."""
        cfg = self.config
        q = decode(self.codes, cfg.W_dtype)
        if self.codebook is not None:
            q = q.to(getattr(torch, self.codebook)).to(torch.float64)
        s = torch.ones_like(q) if self.scale is None else self._spread(self.scale.to(torch.float64))
        z = torch.zeros_like(q) if self.zero_values is None else self._spread(self.zero_values)
        return q, s, z

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        if values.dim() == 1:  # of all
            values = values.expand(self.codes.shape[0], 1)
        values = values.reshape(self.codes.shape[0], -1)
        return values.repeat_interleave(self.codes.shape[1] // values.shape[1], dim=1)

    def dense(self) -> torch.Tensor:
        """The float64 (N, K) weight."""
        q, s, z = self.parts()
        return q * s - z if self.config.zeros_mode == "rescale" else (q - z) * s

    def magnitude(self) -> torch.Tensor:
        """S of the bound: (m, N)."""
        q, s, z = (part.abs() for part in self.parts())
        dense = q * s + z if self.config.zeros_mode == "rescale" else (q + z) * s
        return self.activations.abs() @ dense.T

    def rounding(self) -> torch.Tensor:
        """u(decode) · ‖A ∘ (|q| + |z|)·s‖₂ of the bound: (m, N)."""
        if self.rounded is None or self.config.W_dtype == self.config.A_dtype:
            return torch.zeros(())
        q, s, z = (part.abs() for part in self.parts())
        dense = q * s + z if self.config.zeros_mode == "rescale" else (q + z) * s
        return ROUNDOFF[self.rounded] * (self.activations.square() @ dense.square().T).sqrt()

    def output(self) -> torch.Tensor:
        """The float64 (m, N) result, before it is rounded to out_dtype."""
        out = self.activations @ self.dense().T
        return out if self.bias is None else out + self.bias.to(torch.float64)

    @property
    def is_integer(self) -> bool:
        """Whether every operand is an integer, so that nothing may be rounded before out_dtype."""
        operands = [self.A, *self.extras.values()]
        return integers(self.config) and all(not t.is_floating_point() for t in operands)


def _randint(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Integers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=generator)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def on_tensor_cores(problem: Problem) -> Problem:
    """The problem as tensor cores of cards solve it: with nf4 rounded to what they multiply."""
    if problem.config.W_dtype != "nf4":
        return problem
    return replace(problem, codebook="bfloat16" if problem.config.A_dtype == "bfloat16" else "float16")


def by_torch(problem: Problem) -> Problem:
    """The problem as it is solved where weights are decoded for torch: with all of them rounded to A's dtype."""
    return replace(problem, rounded=problem.config.A_dtype)


def _draw_codes(cfg: object, shape: tuple[int, int], exact: bool, generator: torch.Generator) -> torch.Tensor:
    fmt = cfg.W_dtype
    if width(fmt) > 8:
        if exact:
            return float_codes(_randint(-16, 16, shape, generator) / 4, fmt)
        return float_codes(torch.randn(shape, generator=generator), fmt)
    values = table(fmt)
    allowed = torch.ones(len(values), dtype=torch.bool)
    if fmt.startswith("float8"):
        allowed = values.abs() <= 8  # NaN and infinity fall out
    if exact and not fmt.startswith(("uint", "int")):
        allowed &= values * 4 == (values * 4).round()
    choices = allowed.nonzero().flatten()
    return choices[_randint(0, len(choices) - 1, shape, generator)]


def _draw_activations(cfg: object, m: int, exact: bool, generator: torch.Generator) -> torch.Tensor:
    shape = (m, cfg.K)
    if exact:  # no zeros, so that no flipped code hides
        sign = 2 * _randint(0, 1, shape, generator) - 1
        if dynamic(cfg) is not None:
            return (sign * _draw_whole(cfg, shape, generator) / 8).to(held(cfg.A_dtype))
        return (sign * _randint(1, 3, shape, generator)).to(held(cfg.A_dtype))
    if cfg.A_dtype not in _INTEGER_A:
        return torch.randn(shape, generator=generator).to(held(cfg.A_dtype))
    top = 7 if cfg.A_dtype == "int4" else 127
    limit = {"float16": 6e4, "int8": 3e2}.get(cfg.out_dtype)
    if limit is not None and not cfg.with_scaling:  # few results that saturate
        largest = max(1.0, _largest(cfg.W_dtype))
        top = int(min(top, max(1, limit / (2 * largest * math.sqrt(cfg.K)))))
    return _randint(-top - (top in (7, 127)), top, shape, generator).to(torch.int8)


def _draw_whole(cfg: object, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """What int8 quantizes exactly: 1 to 3, and in each row or group, somewhere, 127."""
    groups = _groups(cfg) if dynamic(cfg) == "group" else 1
    found = _randint(1, 3, (shape[0], groups, shape[1] // groups), generator)
    place = _randint(0, found.shape[2] - 1, (*found.shape[:2], 1), generator)
    return found.scatter(2, place, 127).reshape(shape)


def _largest(fmt: str) -> float:
    """Largest magnitude of a code's value that is drawn."""
    if width(fmt) > 8:
        return 4.0
    if fmt.startswith("float8"):
        return 8.0
    return float(table(fmt).abs().max())


def _draw_scale(cfg: object, exact: bool, generator: torch.Generator) -> torch.Tensor:
    shape = (1,) if one_scale(cfg) else (cfg.N, _groups(cfg))
    sign = 1 - 2 * (_uniform(0, 1, shape, generator) < 0.125).to(torch.float64)
    if exact:
        return sign * 2.0 ** _randint(-2, 1, shape, generator)
    size = 1.0 / _largest(cfg.W_dtype)
    if cfg.A_dtype in _INTEGER_A:
        size *= {"int8": 4.0, "int32": 1e3}.get(cfg.out_dtype, 1.0) / math.sqrt(cfg.K)
    return sign * size * _uniform(0.5, 1.5, shape, generator)


def _draw_zeros(cfg: object, scale: torch.Tensor | None, exact: bool, generator: torch.Generator) -> torch.Tensor:
    shape, values = (cfg.N, _groups(cfg)), table(cfg.W_dtype)
    low, high = int(values.min()), int(values.max())
    whole = _randint(low, high, shape, generator).to(torch.float64)
    if cfg.zeros_mode == "quantized":
        return whole
    if cfg.zeros_mode == "original":
        return whole if exact else _uniform(low, high, shape, generator)
    if exact:
        return _randint(-16, 16, shape, generator) / 4.0
    size = high if scale is None else high * scale.abs()
    return size * _uniform(-1, 1, shape, generator)


def _draw_bias(cfg: object, dtype: torch.dtype, exact: bool, generator: torch.Generator) -> torch.Tensor:
    shape = (cfg.N,)
    if exact:
        return (_randint(-16, 16, shape, generator) / (4 if dtype.is_floating_point else 1)).to(dtype)
    if dtype.is_floating_point:
        return (3 * torch.randn(shape, generator=generator)).to(dtype)
    return _randint(-100, 100, shape, generator).to(dtype)


def _groups(cfg: object) -> int:
    return 1 if cfg.group_size in (-1, None) else cfg.K // cfg.group_size


def draw(
    config: object,
    m: int,
    seed: int = 0,
    exact: bool = False,
    scale_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
) -> Problem:
    """A random problem for the fields of `config` with m rows.

    Parameters
    ----------
    exact : bool
        Small integer activations, power-of-two scales, zeros and weights that are multiples of 1/4: float32 holds every
        partial sum, in any order, so that a result is bit-equal to the reference's. Activations that are quantized on the fly
        are eighths of integers, in each row or group 127 among them, so that nothing is lost.
    scale_dtype, bias_dtype : torch.dtype, optional
        By default A's dtype and out_dtype, and float32 for the scale beside an A of at most 8 bits.
    """
    generator = torch.Generator().manual_seed(seed)
    cfg = config
    codes = _draw_codes(cfg, (cfg.N, cfg.K), exact, generator)
    A = _draw_activations(cfg, m, exact, generator)
    if scale_dtype is None:
        wide = cfg.A_dtype in _NARROW_A or one_scale(cfg)
        scale_dtype = torch.float32 if wide else getattr(torch, cfg.A_dtype)
    problem = Problem(cfg, A, codes, seed=seed)
    if cfg.with_scaling:
        problem = replace(problem, scale=_draw_scale(cfg, exact, generator).to(scale_dtype))
    if cfg.with_zeros:
        zeros = _draw_zeros(cfg, problem.scale, exact, generator)
        if cfg.zeros_mode == "quantized":
            packed = pack_bits(zeros.T.to(torch.int64).contiguous(), width(cfg.W_dtype))
            problem = replace(problem, zeros=packed, zero_values=zeros)
        else:
            zeros = zeros.to(scale_dtype)
            problem = replace(problem, zeros=zeros, zero_values=zeros.to(torch.float64))
    if cfg.with_bias:
        dtype = bias_dtype or getattr(torch, cfg.out_dtype)
        problem = replace(problem, bias=_draw_bias(cfg, dtype, exact, generator))
    return problem


# -- comparisons -----------------------------------------------------------------------------------------------------------


def rounded(values: torch.Tensor, out_dtype: str) -> torch.Tensor:
    """float64 values as out_dtype holds them: rounded to nearest even; integers saturate."""
    dtype = getattr(torch, out_dtype)
    if out_dtype in _INTEGERS:
        info = torch.iinfo(dtype)
        return values.round().clamp(info.min, info.max).to(dtype)
    # by way of float32, as every kernel does: the exact cases lose nothing in that step
    return values.to(torch.float32).to(dtype)


def bound(problem: Problem) -> torch.Tensor:
    """Largest allowed distance from the float64 result, (m, N).

    2·√K·u(accum)·S + 4·u(decode)·‖A ∘ (|q| + |z|)·s‖₂ + u(out)·|ref|, and half a subnormal number of out_dtype, where u
    stops being relative. u(decode) is 0 where decoding is done in float32, and the problem not one of `by_torch`. Integer
    operands are accumulated exactly, and an int8 A beside floats in float32, or in float64 where int32 is asked for; that
    reaches 16 bits by way of float32. An A that is quantized on the fly is as one of int8, and its scale costs two
    roundings more.
    """
    cfg = problem.config
    exact = cfg.accum_dtype == "int32" or cfg.out_dtype in _INTEGERS
    accum = ("float64" if exact else "float32") if cfg.A_dtype in _INTEGER_A and integers(cfg) else cfg.accum_dtype
    if dynamic(cfg) is not None:
        accum = "float32"
    u = 0.0 if problem.is_integer else ROUNDOFF[accum]
    allowed = (2 * math.sqrt(cfg.K) + (2 if dynamic(cfg) else 0)) * u * problem.magnitude()
    if cfg.out_dtype in _INTEGERS:
        return allowed + 0.5 if not problem.is_integer else allowed
    rounding = ROUNDOFF[cfg.out_dtype] + (ROUNDOFF["float32"] if accum == "float64" else 0.0)
    allowed = allowed + 4 * problem.rounding()
    return allowed + rounding * problem.output().abs() + _HALF_SUBNORMAL[cfg.out_dtype]


def _describe(out: torch.Tensor, reference: torch.Tensor, wrong: torch.Tensor, problem: Problem) -> str:
    i, n = (int(v) for v in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} results are wrong, first at [{i}, {n}]: {float(out[i, n])!r} for "
        f"{float(reference[i, n])!r}; m = {out.shape[0]}, seed = {problem.seed}, {problem.config}"
    )


def _check_kind(out: torch.Tensor, problem: Problem) -> None:
    shape = (problem.A.shape[0], problem.config.N)
    assert tuple(out.shape) == shape, f"shape {tuple(out.shape)} for {shape}"
    assert out.dtype is getattr(torch, problem.config.out_dtype), f"{out.dtype} for {problem.config.out_dtype}"


def assert_close(out: torch.Tensor, problem: Problem) -> None:
    """Fail where a result is farther from the reference than the bound allows; NaN is, always."""
    _check_kind(out, problem)
    reference, allowed = problem.output(), bound(problem)
    got = out.to(torch.float64)
    info = torch.iinfo(out.dtype) if not out.is_floating_point() else torch.finfo(out.dtype)
    if out.is_floating_point():  # what rounds beyond the largest number is infinite
        overflow = got.isinf() & (got.sign() == reference.sign()) & (reference.abs() + allowed > info.max)
        right = overflow | ((got - reference).abs() <= allowed)
    else:
        right = (got - reference.clamp(info.min, info.max)).abs() <= allowed
    assert right.all(), _describe(got, reference, ~right, problem)


def assert_exact(out: torch.Tensor, problem: Problem) -> None:
    """Fail unless every result is bit-equal to the rounded reference."""
    _check_kind(out, problem)
    expected = rounded(problem.output(), problem.config.out_dtype)
    wrong = ~(out == expected)
    assert torch.equal(out, expected), _describe(out.to(torch.float64), expected.to(torch.float64), wrong, problem)
