"""What was decided for one operator on one target: the weight layout, and a rule and tiling for each bucket of M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import ATTENTION, Config, FlashAttenConfig, MatmulConfig, config_fields
from .errors import UnsupportedError
from .layout import PackedLayout
from .schedule import RULES, AttentionProblem, Problem, Tiling, native_layout, read_tiling, select_rule
from .target import Target

#: Kernels index weights with 32 bits.
MAX_WEIGHT_BYTES = 1 << 31
#: … and activations and outputs, of which they compute a tile of rows at once.
MAX_SIDE = 1 << 26
#: Ten times the compute capability of the oldest cards.
OLDEST_CAPABILITY = 75


@dataclass(frozen=True)
class KernelPlan:
    """One kernel of an operator.

    Attributes
    ----------
    name : str
        The function's name in the library.
    rule : str
        Name of the schedule rule.
    tiling : Tiling
        How it walks its loops.
    buckets : tuple of int
        The buckets it serves, ascending.
    """

    name: str
    rule: str
    tiling: Tiling
    buckets: tuple[int, ...]

    def fields(self) -> dict[str, object]:
        """As JSON values."""
        return {"name": self.name, "rule": self.rule, "tiling": self.tiling.fields(), "buckets": list(self.buckets)}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> KernelPlan:
        """The kernel with these `fields`; KeyError or TypeError where there is none."""
        return cls(fields["name"], fields["rule"], read_tiling(fields["tiling"]), tuple(fields["buckets"]))


class Plan:
    """What all plans have: fields of the frozen dataclasses that derive from it; `config` is that of the kernels."""

    config: Config
    target: Target
    kernels: tuple[KernelPlan, ...]

    @property
    def tilings(self) -> dict[int, Tiling]:
        """The tiling by bucket: what `make_plan` takes to decide the same again."""
        return {m: kernel.tiling for kernel in self.kernels for m in kernel.buckets}

    @property
    def buckets(self) -> list[tuple[int, str]]:
        """(bucket, kernel name), ascending: m takes the first bucket that is not smaller, beyond them the last."""
        return sorted((m, kernel.name) for kernel in self.kernels for m in kernel.buckets)

    def problem_of(self, m: int) -> Problem | AttentionProblem:
        """What the kernels do for `m` rows."""
        raise NotImplementedError

    def problem(self, kernel: KernelPlan) -> Problem | AttentionProblem:
        """The problem that a kernel was planned for: its largest bucket."""
        return self.problem_of(kernel.buckets[-1])

    def describe(self) -> str:
        """What is computed, for which buckets, and by which instructions: for messages."""
        buckets = ", ".join(str(m) for m, _ in self.buckets)
        return f"{self.config.describe()} for buckets {buckets} on {self.target.isa}"


@dataclass(frozen=True)
class MatmulPlan(Plan):
    """The kernels of one operator; every kernel computes any number of rows, its buckets are what it is fast for.

    `config` is the kernels' (`MatmulConfig.kernel`): operators that differ at the door only share them.
    """

    config: MatmulConfig
    target: Target
    layout: PackedLayout
    kernels: tuple[KernelPlan, ...]

    def problem_of(self, m: int) -> Problem:
        """See `Plan`."""
        return Problem(self.config, self.layout, self.target, m)

    def fields(self) -> dict[str, object]:
        """All that decides about the library's bytes, apart from versions, as JSON values."""
        return {
            **config_fields(self.config),
            "target": self.target.fields(),
            "layout": self.layout.name,
            "kernels": [kernel.fields() for kernel in self.kernels],
        }


@dataclass(frozen=True)
class AttentionPlan(Plan):
    """The kernels of one attention; every kernel computes any lengths, its buckets of rows are what it is fast for.

    `config` is the kernels' (`FlashAttenConfig.kernel`).
    """

    config: FlashAttenConfig
    target: Target
    kernels: tuple[KernelPlan, ...]

    def problem_of(self, m: int) -> AttentionProblem:
        """See `Plan`."""
        return AttentionProblem(self.config, self.target, m)

    def fields(self) -> dict[str, object]:
        """All that decides about the library's bytes, apart from versions, as JSON values."""
        return {
            **config_fields(self.config),
            "target": self.target.fields(),
            "kernels": [kernel.fields() for kernel in self.kernels],
        }


def plan_matmul(config: MatmulConfig, target: Target, tuned: Mapping[int, Tiling] | None = None) -> MatmulPlan:
    """Decide how to compute `config` on `target`.

    Parameters
    ----------
    config : MatmulConfig
        The question.
    target : Target
        The machine.
    tuned : mapping of int to Tiling, optional
        Measured choices by bucket; a bucket without one takes its rule's default.

    Raises
    ------
    UnsupportedError
        No rule serves a bucket, the card is older than compute capability 7.5, or the weights have 2^31 bytes and more.
    """
    config = config.kernel
    _check_card(target)
    layout = native_layout(config, target)
    if max(config.N, config.K) >= MAX_SIDE:
        raise UnsupportedError(f"N = {config.N}, K = {config.K}: kernels take at most {MAX_SIDE - 1} of each")
    if layout.num_bytes >= MAX_WEIGHT_BYTES:
        raise UnsupportedError(
            f"weights of {config.N} x {config.K} {config.W_dtype} have {layout.num_bytes} bytes; kernels index fewer than "
            f"{MAX_WEIGHT_BYTES}. Split N over several operators"
        )
    kernels = _choose("matmul", [Problem(config, layout, target, m) for m in config.buckets], tuned)
    return MatmulPlan(config, target, layout, kernels)


def plan_attention(
    config: FlashAttenConfig, target: Target, tuned: Mapping[int, Tiling] | None = None
) -> AttentionPlan:
    """Decide how to compute `config` on `target`: see `plan_matmul`.

    Raises
    ------
    UnsupportedError
        No rule serves a bucket, or the card is older than compute capability 7.5.
    """
    config = config.kernel
    _check_card(target)
    kernels = _choose(ATTENTION, [AttentionProblem(config, target, m) for m in config.buckets], tuned)
    return AttentionPlan(config, target, kernels)


def make_plan(config: Config, target: Target, tuned: Mapping[int, Tiling] | None = None) -> AnyPlan:
    """`plan_matmul` or `plan_attention`, whichever is for such a config."""
    if isinstance(config, FlashAttenConfig):
        return plan_attention(config, target, tuned)
    return plan_matmul(config, target, tuned)


AnyPlan = MatmulPlan | AttentionPlan


def plan_problem(problem: Problem | AttentionProblem, kernel: KernelPlan) -> AnyPlan:
    """The plan of a problem that is solved by one kernel."""
    if isinstance(problem, AttentionProblem):
        return AttentionPlan(problem.config, problem.target, (kernel,))
    return MatmulPlan(problem.config, problem.target, problem.layout, (kernel,))


def _check_card(target: Target) -> None:
    if target.kind == "cuda" and target.capability < OLDEST_CAPABILITY:
        raise UnsupportedError(
            f"target {target}: cards of compute capability {OLDEST_CAPABILITY / 10} and later are supported, those of CUDA 13; "
            "name another target, such as 'llvm' for this CPU"
        )


def _choose(
    prefix: str, problems: Sequence[Problem | AttentionProblem], tuned: Mapping[int, Tiling] | None
) -> tuple[KernelPlan, ...]:
    """A kernel for each rule and tiling that a bucket has: the measured tiling where a rule offers it, else its default."""
    chosen: dict[tuple[str, Tiling], list[int]] = {}
    for problem in problems:
        rule = select_rule(RULES, problem)
        tilings = rule.tilings(problem)
        tiling = (tuned or {}).get(problem.m, tilings[0])
        chosen.setdefault((rule.name, tiling if tiling in tilings else tilings[0]), []).append(problem.m)
    return tuple(
        KernelPlan(f"{prefix}_{index}", rule, tiling, tuple(buckets))
        for index, ((rule, tiling), buckets) in enumerate(chosen.items())
    )
