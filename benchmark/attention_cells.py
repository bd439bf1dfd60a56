"""Cells of the benchmark of attention: operands, their float64 reference, and who is timed on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn import functional

from bitblas import FlashAtten, FlashAttenConfig
from bitblas.bench import Candidate, Comparison, Probes, Skipped, Timing, Verdict, num_copies, side_by_side
from bitblas.bench.card import CardMachine, turns_on_card
from bitblas.bench.matmul import MEMORY_CAP, bytes_of
from bitblas.cards import Stopwatch
from bitblas.measuring import read_bytes

from .peers.openvino_attention import NAME as OPENVINO
from .peers.openvino_attention import openvino_sdpa

OURS, SDPA = "bitblas", "torch SDPA"
#: How far a result may be from the reference, over the root mean square of its row, by dtype.
LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 6e-2}
#: Queries of each head that are compared with the reference, spread over all of them.
CHECKED = 64
#: With fewer rows for each head of K, keys and values come from memory, as they do while a text is written.
FEW_ROWS = 64


@dataclass(frozen=True)
class AttentionCase:
    """One cell.

    Attributes
    ----------
    config : FlashAttenConfig
        The question; all sizes are given.
    """

    config: FlashAttenConfig

    @property
    def name(self) -> str:
        """The kind: dtype, and whether it is causal."""
        return self.config.Q_dtype + (", causal" if self.config.is_causal else "")

    @property
    def rows(self) -> tuple[int, ...]:
        """Queries, one number."""
        return (self.config.seq_len,)  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, ...]:
        """All sizes but that."""
        config = self.config
        return config.batch, config.heads, config.heads_kv, config.seq_len_kv, config.dim  # type: ignore[return-value]


def sizes_of(row: Comparison) -> tuple[int, ...]:
    """The shape of the case that a cell was measured for."""
    names = ("batch", "heads", "heads_kv", "seq_len_kv", "dim")
    return tuple(int(str(row.workload[name])) for name in names)


def make_case(
    dtype: str,
    causal: bool,
    queries: int,
    dim: int,
    heads: int = 8,
    heads_kv: int | None = None,
    keys: int | None = None,
) -> AttentionCase:
    """A cell of batch 1; as many keys as queries where nothing else is said."""
    dtypes = dict.fromkeys(("Q_dtype", "K_dtype", "V_dtype", "Out_dtype"), dtype)
    config = FlashAttenConfig(
        1, heads, queries, dim, **dtypes, is_causal=causal, heads_kv=heads_kv, seq_len_kv=keys or "seq_len"
    )
    return AttentionCase(config)


# -- operands --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """The operands of a call.

    Attributes
    ----------
    config : FlashAttenConfig
        The question; all sizes are given.
    q, k, v : torch.Tensor
        As `FlashAtten` takes them.
    checked : torch.Tensor
        Which queries are compared with the reference, ascending: all of a few, else the first, the last, and one of each
        of `CHECKED` parts of the others.
    """

    config: FlashAttenConfig
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    checked: torch.Tensor

    @property
    def group(self) -> int:
        """Heads of Q that share one of K."""
        return self.config.heads // self.config.heads_kv  # type: ignore[operator]

    @property
    def output_shape(self) -> torch.Size:
        """(batch, seq_len, heads, dim_v)."""
        return torch.Size((*self.q.shape[:3], self.config.dim_v))

    @cached_property
    def expected(self) -> torch.Tensor:
        """The float64 result for the queries that are checked, (batch, heads_kv, group, queries, dim_v)."""
        config = self.config
        q = self.q[:, self.checked].to(torch.float64).unflatten(2, (-1, self.group))
        scores = torch.einsum("bnhgd,bjhd->bhgnj", q, self.k.to(torch.float64)) * config.softmax_scale
        if config.is_causal:
            keys = torch.arange(self.k.shape[1], device=q.device)
            scores.masked_fill_(keys > self.checked[:, None] + len(keys) - self.q.shape[1], -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(nan=0.0)  # of a query without a key
        return torch.einsum("bhgnj,bjhd->bhgnd", weights, self.v.to(torch.float64))

    def check(self, out: object) -> Verdict:
        """Judge a result, (batch, seq_len, heads, dim_v), by the distance of each element over the size of its row."""
        assert isinstance(out, torch.Tensor)
        if out.shape != self.output_shape or not out.isfinite().all():
            return Verdict(math.inf, False)
        found = out[:, self.checked].to(torch.float64).unflatten(2, (-1, self.group)).permute(0, 2, 3, 1, 4)
        sizes = self.expected.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        error = float(((found - self.expected).abs() / sizes).max())
        return Verdict(error, error <= LIMITS[self.config.Out_dtype])

    def copies(self, cache: int | None = None) -> int:
        """Through how many copies of K and V calls lead: past a cache of so many bytes, or this CPU's, where rows are few."""
        few = self.q.shape[1] * self.group < FEW_ROWS
        return num_copies(bytes_of([self.k, self.v]), MEMORY_CAP, cache) if few else 1


def draw_attention(config: FlashAttenConfig, device: torch.device | str = "cpu", seed: int = 0) -> Attention:
    """Normal operands of a config all of whose sizes are given, of the layout "nnn"."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, heads, heads_kv, queries, keys = (
        int(str(getattr(config, name))) for name in ("batch", "heads", "heads_kv", "seq_len", "seq_len_kv")
    )

    def drawn(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))

    part = max(1, queries // CHECKED)
    starts = torch.arange(0, queries, part, device=device)
    picked = starts + torch.randint(0, part, starts.shape, generator=generator, device=device)
    ends = torch.tensor([0, queries - 1], device=device)
    return Attention(
        config,
        drawn((batch, queries, heads, config.dim), config.Q_dtype),
        drawn((batch, keys, heads_kv, config.dim), config.K_dtype),
        drawn((batch, keys, heads_kv, config.dim_v), config.V_dtype),
        torch.cat([picked.clamp(max=queries - 1), ends]).unique(),
    )


def macs_of(config: FlashAttenConfig) -> int:
    """Multiply-accumulates of both products, for pairs of query and key that are not masked."""
    queries, keys = int(str(config.seq_len)), int(str(config.seq_len_kv))
    pairs = queries * keys
    if config.is_causal:
        pairs = sum(min(keys, max(0, keys - queries + i + 1)) for i in range(queries))
    return int(str(config.batch)) * int(str(config.heads)) * pairs * (config.dim + config.dim_v)


# -- candidates ------------------------------------------------------------------------------------------------------------

#: Makes a candidate of operands; the number is the size of the cache that K and V are to come past, None for this CPU's.
Peer = Callable[[Attention, "int | None"], "Candidate | Skipped"]


def unit_of(op: FlashAtten) -> str:
    """Which unit multiplies: "fma" or "bf16" on CPUs; on cards products are named by their dtype."""
    if op.target.kind == "cuda":
        return op.config.Q_dtype
    return getattr(op.plan.kernels[-1].tiling, "dot", "") or "fma"


def ours(op: FlashAtten) -> Peer:
    """Our operator, which allocates its output, as all do here."""

    def make(work: Attention, cache: int | None) -> Candidate:
        count = work.copies(cache)
        pairs = [(work.k, work.v), *((work.k.clone(), work.v.clone()) for _ in range(count - 1))]
        return Candidate(OURS, lambda index: op(work.q, *pairs[index % count]), work.check, unit_of(op), copies=count)

    return make


def native(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous (batch, heads, length, dim), as torch's own attention takes it; always a copy."""
    return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def scaled_dot_product(config: FlashAttenConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention; its causal mask begins at the first key, which is ours where there are as many queries."""
    grouped = config.heads != config.heads_kv
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=config.is_causal, scale=config.softmax_scale, enable_gqa=grouped
    )


def sdpa(work: Attention, cache: int | None) -> Candidate | Skipped:
    """torch's scaled_dot_product_attention, by whatever it chooses, on tensors that lie as it likes."""
    config, count = work.config, work.copies(cache)
    if config.is_causal and config.seq_len != config.seq_len_kv:
        return Skipped(SDPA, "aligns a causal mask at the first key")
    q, pairs = native(work.q), [(native(work.k), native(work.v)) for _ in range(count)]

    def check(out: object) -> Verdict:
        assert isinstance(out, torch.Tensor)
        return work.check(out.transpose(1, 2))

    return Candidate(
        SDPA, lambda index: scaled_dot_product(config, q, *pairs[index % count]), check, config.Q_dtype, copies=count
    )


PEERS: dict[str, Peer] = {SDPA: sdpa, OPENVINO: openvino_sdpa}


# -- measuring -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where cells are measured: a CPU, or a card where there is a stopwatch.

    Attributes
    ----------
    probes : Probes or None
        Loops that show what binds, on a CPU.
    stopwatch, machine, device
        Of the card.
    """

    probes: Probes | None = None
    stopwatch: Stopwatch | None = None
    machine: CardMachine | None = None
    device: torch.device = field(default=torch.device("cpu"))


@torch.inference_mode()
def compare(op: FlashAtten, peers: Sequence[Peer], seconds: float, place: Place) -> Comparison:
    """Time an operator whose config gives all sizes beside peers, each for so many seconds.

    Raises
    ------
    RuntimeError
        On a card: ours cannot be run.
    """
    config, threads, unit = op.config, torch.get_num_threads(), unit_of(op)
    work = draw_attention(config, place.device)
    cache = place.machine.l2_bytes if place.machine else None
    made = [peer(work, cache) for peer in (ours(op), *peers)]
    candidates = [each for each in made if isinstance(each, Candidate)]
    found: Sequence[Timing | Skipped]
    if place.stopwatch is not None and place.machine is not None:
        found = turns_on_card(candidates, place.stopwatch, seconds)
        rates = {"bandwidth": place.machine.bandwidth, unit: place.machine.peaks.get(unit)}
        ceilings = {name: rate for name, rate in rates.items() if rate}
    else:
        bounds = [place.probes.unit(unit, threads)] if place.probes else []
        if place.probes and candidates[0].copies > 1:
            bounds.append(place.probes.bandwidth(read_bytes(), threads))
        known = [bound for bound in bounds if bound]
        timed = side_by_side([candidates[0], *(b.candidate() for b in known), *candidates[1:]], seconds)
        by_bound = zip(known, timed[1:], strict=False)
        ceilings = {bound.name: bound.work / timing.seconds for bound, timing in by_bound if timing.seconds}
        found = [timed[0], *timed[1 + len(known) :]]
    return Comparison(
        workload={**config.fields(), "m": config.seq_len},
        m=int(str(config.seq_len)),
        macs=macs_of(config),
        moved=bytes_of([work.q, work.k, work.v]) + work.output_shape.numel() * work.q.element_size(),
        threads=0 if place.stopwatch else threads,
        timings=tuple(each for each in found if isinstance(each, Timing)),
        skipped=tuple(each for each in (*made, *found) if isinstance(each, Skipped)),
        ceilings=ceilings,
        unit=unit,
    )
