"""The float64 reference of attention: what it must give, how close, and random problems. It shares no code with the product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from reference import ROUNDOFF

_HALF_SUBNORMAL = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-150}
#: Relative error of a power of two, beside roundings, by what weights are rounded to: what docs/PythonAPI.md promises.
POWER = {"float32": 2e-9, "float16": 7.5e-5, "bfloat16": 7.5e-5}
#: Fewest keys that a kernel looks at together: such a block scales what was summed before, where it has a larger score.
_LEAST_BLOCK = 32


@dataclass(frozen=True)
class Problem:
    """The operands of one call, as the operator takes them.

    Attributes
    ----------
    config : object
        Read for its plain fields only.
    q, k, v : torch.Tensor
        (batch, seq_len, heads, dim); (batch, seq_len_kv, heads_kv, dim), or (batch, dim, heads_kv, seq_len_kv) for ntn;
        (batch, seq_len_kv, heads_kv, dim_v).
    seed : int
        What they were drawn by.
    """

    config: object
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seed: int = 0

    def to(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The operands, on a device."""
        return self.q.to(device), self.k.to(device), self.v.to(device)

    def heads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float64 q (batch, heads, seq_len, dim), k (batch, heads, dim, seq_len_kv), v (batch, heads, seq_len_kv, dim_v)."""
        q = self.q.to(torch.float64).permute(0, 2, 1, 3)
        k = self.k.to(torch.float64).permute(0, 2, *((3, 1) if self.config.layout == "nnn" else (1, 3)))
        v = self.v.to(torch.float64).permute(0, 2, 1, 3)
        group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def seen(self) -> torch.Tensor:
        """bool (seq_len, seq_len_kv): which query sees which key."""
        queries, keys = self.q.shape[1], self.v.shape[1]
        if not self.config.is_causal:
            return torch.ones(queries, keys, dtype=torch.bool)
        return torch.arange(keys)[None, :] <= torch.arange(queries)[:, None] + (keys - queries)

    def scores(self) -> torch.Tensor:
        """float64 (batch, heads, seq_len, seq_len_kv), -inf where a key is not seen."""
        q, k, _ = self.heads()
        return torch.where(self.seen(), (q @ k) * self.config.softmax_scale, -math.inf)

    def weights(self) -> torch.Tensor:
        """The softmax of the scores; zeros for a query that sees no key, or none with a score above -inf."""
        scores = self.scores()
        if not scores.shape[-1]:
            return scores
        top = scores.amax(-1, keepdim=True)
        powers = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
        total = powers.sum(-1, keepdim=True)
        return powers / torch.where(total == 0, 1.0, total)

    def output(self) -> torch.Tensor:
        """The float64 (batch, seq_len, heads, dim_v) result. A value that is not seen counts for nothing, be it NaN."""
        _, _, v = self.heads()
        out = self.weights() @ v.nan_to_num(nan=0.0)
        touched = self.seen().to(torch.float64) @ v.isnan().to(torch.float64)
        return torch.where(touched > 0, math.nan, out).permute(0, 2, 1, 3)


def draw(
    config: object,
    batch: int,
    heads: int,
    seq_len: int,
    heads_kv: int | None = None,
    seq_len_kv: int | None = None,
    seed: int = 0,
    size: float = 1.0,
) -> Problem:
    """A random problem: normal numbers, and Q times `size`."""
    generator = torch.Generator().manual_seed(seed)
    heads_kv, keys = heads if heads_kv is None else heads_kv, seq_len if seq_len_kv is None else seq_len_kv

    def normal(shape: tuple[int, ...], dtype: str, factor: float = 1.0) -> torch.Tensor:
        return (factor * torch.randn(shape, generator=generator)).to(getattr(torch, dtype))

    dim = config.dim
    k_shape = (batch, keys, heads_kv, dim) if config.layout == "nnn" else (batch, dim, heads_kv, keys)
    return Problem(
        config,
        normal((batch, seq_len, heads, dim), config.Q_dtype, size),
        normal(k_shape, config.K_dtype),
        normal((batch, keys, heads_kv, config.dim_v), config.V_dtype),
        seed,
    )


def bound(problem: Problem, weights_dtype: str | None = None, roundoff: float = ROUNDOFF["float32"]) -> torch.Tensor:
    """Largest allowed distance from the float64 result, (batch, seq_len, heads, dim_v).

    With u the roundoff of sums, p the weights, s the scores and S = |softmax_scale|·Σ|q·k|, a weight is wrong by at most the
    part E = (2·√dim + 3)·u·S + u·|s - max| + (POWER + 2u)·(1 + rises): a sum of `dim` products, the factors that scale it, the
    difference, and powers of two, one for the weight and one for each block of keys in which the maximum rises. An output is
    then wrong by Σ p·E·|v|, the total by Σ p·E, and both sums by 2·√keys·u; weights that are rounded before they are multiplied
    with values cost their roundoff twice, in the output and in the total, and those near 0 half the least number.

    Parameters
    ----------
    weights_dtype : str, optional
        What the weights are rounded to: by default bfloat16 where Q, K and V are, which CPUs multiply, and else float32.
    roundoff : float
        u: by default that of float32; tensor cores cut off what does not fit a sum, which costs twice as much.
    """
    config, u = problem.config, roundoff
    q, k, v = problem.heads()
    keys = v.shape[2]
    scores, p = problem.scores(), problem.weights()
    top = scores.amax(-1, keepdim=True) if keys else scores
    below = torch.where(scores == -math.inf, 0.0, (scores - top).abs())
    size = abs(config.softmax_scale) * (q.abs() @ k.abs())
    if weights_dtype is None:
        all_brain = {config.Q_dtype, config.K_dtype, config.V_dtype} == {"bfloat16"}
        weights_dtype = "bfloat16" if all_brain else "float32"
    values = v.abs().nan_to_num(nan=0.0)  # of which those who see one have no bound
    magnitude = p @ values
    powers = (POWER[weights_dtype] + 2 * u) * (1 + _rises(scores))
    wrong = (2 * math.sqrt(config.dim) + 3) * u * size + u * below + powers
    wrong = torch.where(p > 0, p * wrong, 0.0)
    allowed = wrong @ values + wrong.sum(-1, keepdim=True) * magnitude
    allowed = allowed + (4 * math.sqrt(keys) * u + 2 * u + 2 * ROUNDOFF[weights_dtype]) * magnitude
    allowed = allowed + _HALF_SUBNORMAL[weights_dtype] * (values.sum(-2, keepdim=True) + keys * magnitude)
    allowed = allowed.permute(0, 2, 1, 3)
    return allowed + ROUNDOFF[config.Out_dtype] * problem.output().abs() + _HALF_SUBNORMAL[config.Out_dtype]


def _rises(scores: torch.Tensor) -> torch.Tensor:
    """In how many blocks of keys the maximum of a row rises: (..., 1)."""
    blocks = [block.amax(-1) for block in scores.split(_LEAST_BLOCK, -1) if block.shape[-1]]
    if len(blocks) < 2:
        return torch.zeros_like(scores[..., :1])
    highest = torch.stack(blocks, -1).nan_to_num(nan=-math.inf).cummax(-1).values
    return (highest[..., 1:] > highest[..., :-1]).sum(-1, keepdim=True)


def assert_close(
    out: torch.Tensor, problem: Problem, weights_dtype: str | None = None, roundoff: float = ROUNDOFF["float32"]
) -> None:
    """Fail where a result is farther from the reference than `bound` allows, or NaN where it is not, or not NaN where it is."""
    config, expected = problem.config, problem.output()
    assert out.shape == expected.shape, f"shape {tuple(out.shape)} for {tuple(expected.shape)}"
    assert out.dtype is getattr(torch, config.Out_dtype), f"{out.dtype} for {config.Out_dtype}"
    assert out.is_contiguous()
    got = out.to("cpu", torch.float64)
    right = (got - expected).abs() <= bound(problem, weights_dtype, roundoff)
    right |= got.isnan() & expected.isnan()
    if right.all():
        return
    place = tuple(int(i) for i in (~right).nonzero()[0])
    raise AssertionError(
        f"{int((~right).sum())} of {right.numel()} results are wrong, first at {place}: {float(got[place])!r} for "
        f"{float(expected[place])!r}; q {tuple(problem.q.shape)}, k {tuple(problem.k.shape)}, seed = {problem.seed}, {config}"
    )


def error(out: torch.Tensor, problem: Problem) -> float:
    """The largest distance from the reference, relative to the largest result."""
    expected = problem.output()
    return float((out.to(torch.float64) - expected).abs().max() / expected.abs().max())
