"""Matmul: a config made callable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.autograd import forward_ad, profiler

from ..artifacts import Artifact
from ..build import expression_module, scheduled_module
from ..config import MatmulConfig
from ..errors import ArgumentError, ArtifactError, ConfigError
from ..locks import ForkLock
from ..plan import MatmulPlan, plan_matmul
from ..runtime import Kernels
from ..schedule import Tiling
from ..target import Target, resolve_target
from ..tuner import SECONDS
from ..tuner.record import choices, read_record
from . import provider
from .arguments import PLAIN, Door
from .bound import BoundMatmul, Place, are_plain
from .cuda_arguments import CudaDoor
from .facts import WithFacts
from .provider import Provided, load, provide, store
from .torch_operator import announce, makers, operator_spec
from .weights import WithWeights

if TYPE_CHECKING:
    import tvm
    from tvm import tirx
    from typing_extensions import Self

BACKENDS = ("tl", "tir")

#: How many modes, such as those of fake tensors, see what torch dispatches: they may give tensors without memory.
_num_modes = torch._C._len_torch_dispatch_stack


class Matmul(WithWeights, WithFacts):
    """out = A · dequantize(W)ᵀ (+ bias).

    Parameters
    ----------
    config : MatmulConfig
        What is asked.
    name : str
        A name for messages.
    target : None, str, dict, Target, or tvm.target.Target
        See `bitblas.target.resolve_target`.
    enable_tuning : bool
        Use a stored tuning record where there is one. Construction never measures.
    from_database : bool
        Load and build nothing now: the first call loads the operator from the database (`bitblas.cache`, once that is
        imported) or the store, and builds what is in neither.
    backend : str
        ``"tl"`` or ``"tir"``: accepted for compatibility, both mean the same.
    dense_cache : bool
        On cards, where so many rows are multiplied that decoding all weights first pays: keep the decoded copy, N·K elements of
        A_dtype, until W, scale or zeros is changed in place, or W dies.

    Attributes
    ----------
    config : MatmulConfig
        The config it was built from.
    target : Target
        What it was compiled for.
    plan : MatmulPlan
        The weight layout, and the rule and tiling of each kernel.

    Raises
    ------
    ConfigError
        The config is none, or the backend or target unknown.
    UnsupportedError
        No schedule rule serves the config, or this machine cannot run the target.
    BuildError
        A compiler is missing or failed.
    ArtifactError
        Others may write the artifact store.
    """

    #: The class of `config`.
    _config_class: ClassVar[type[MatmulConfig]] = MatmulConfig

    def __init__(
        self,
        config: MatmulConfig,
        name: str = "matmul",
        target: object = None,
        enable_tuning: bool = True,
        from_database: bool = False,
        backend: str = "tl",
        dense_cache: bool = False,
    ) -> None:
        if not isinstance(config, self._config_class):
            raise ConfigError(f"config is {config!r}; it must be a {self._config_class.__name__}")
        if backend not in BACKENDS:
            raise ConfigError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
        resolved = resolve_target(target)
        record = read_record(config, resolved) if enable_tuning else None
        tuned = choices(record) if record else None
        self._install(config, plan_matmul(config, resolved, tuned), None, name, backend, record, dense_cache)
        self._from_database = from_database
        if not from_database:
            self._provide()

    def _install(
        self,
        config: MatmulConfig,
        plan: MatmulPlan,
        provided: Provided | None,
        name: str,
        backend: str,
        record: dict[str, Any] | None = None,
        dense_cache: bool = False,
    ) -> None:
        self.config, self.name, self.backend, self._dense_cache = config, name, backend, bool(dense_cache)
        self._with_bias = config.with_bias
        self.target: Target = plan.target
        self.plan = plan
        self._tuning_record = record
        self._from_database = False
        self._lock = ForkLock()
        self._provided = provided
        self._kernels: Kernels | None = self._own(provided.kernels) if provided else None
        shape = tuple(self.retrieve_weight_shape())
        self._door = CudaDoor(config, shape, plan.target) if plan.target.kind == "cuda" else Door(config, shape)
        #: names this operator in a graph of torch
        self._spec = operator_spec(config, plan.target, self.layout.name, self._dense_cache)
        announce(self._spec, self)

    @classmethod
    def restore(
        cls,
        config: MatmulConfig,
        plan: MatmulPlan,
        provided: Provided | None = None,
        name: str = "matmul",
        backend: str = "tl",
        record: dict[str, Any] | None = None,
        dense_cache: bool = False,
    ) -> Self:
        """An operator whose plan, and perhaps kernels, are there already; without kernels the first call provides them."""
        op = cls.__new__(cls)
        op._install(config, plan, provided, name, backend, record, dense_cache)
        return op

    # -- calling ---------------------------------------------------------------------------------------------------------

    def forward(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        *extras: torch.Tensor | None,
        scale: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute A · dequantize(W)ᵀ (+ bias).

        Parameters
        ----------
        A : torch.Tensor
            (..., M, K), or (..., K, M) for the layouts tn and tt, in A_dtype, any strides; of one dimension: (K,). An operator
            for an int M needs other dimensions that multiply to M. int4: values in int8, or two's complement pairs of
            consecutive k in the bytes of an int8 tensor, the first in the low bits, with ceil(K / 2) in the place of K > 1.
        W : torch.Tensor
            What `transform_weight` returned; int8 or uint8.
        *extras : torch.Tensor
            The wanted ones of scale, zeros and bias, in that order; then `output`.
        scale : torch.Tensor
            (N, K / group_size), or (N,) where there is one group, in A_dtype (for an A of at most 8 bits float32, float16 or
            bfloat16).
        zeros : torch.Tensor
            As scale; where packed (`zeros_mode="quantized"`): int8 (K / group_size, ceil(N·bits/8)).
        bias : torch.Tensor
            (N,) in A_dtype or out_dtype.
        output : torch.Tensor
            (..., M, N) in out_dtype, contiguous, to be filled and returned.

        Returns
        -------
        torch.Tensor
            (..., M, N) in out_dtype.

        Raises
        ------
        ArgumentError
            A tensor is missing, superfluous, or of the wrong kind, shape, dtype or device. No kernel has run then.
        BuildError, ArtifactError, UnsupportedError
            As for the constructor, by the first call of an operator that was made with `from_database=True`.
        """
        named = None
        if scale is not None or zeros is not None or bias is not None:
            named = {"scale": scale, "zeros": zeros, "bias": bias}
        if torch.compiler.is_compiling() or type(A) not in PLAIN or _num_modes() or profiler._is_profiler_enabled:
            traced = isinstance(A, torch.Tensor)  # a profiler is to see `bitblas::matmul`
        else:
            traced = torch.is_grad_enabled() and (
                A.requires_grad or (self._with_bias and _any_requires_grad(*extras, bias))
            )
            if forward_ad._current_level >= 0:
                self._refuse_tangents(A, W, *extras, scale, zeros, bias)
        return (self._dispatch if traced else self.launch)(A, W, extras, named, output)

    __call__ = forward

    def launch(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        extras: Sequence[torch.Tensor | None],
        named: dict[str, torch.Tensor | None] | None,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward`, with the operands by name in a dict, for tensors that have data: without a gradient, and not traced."""
        m, operands, out = self._door.enter(A, W, extras, named, output)
        if m:
            self._ready().launch(m, operands, out if out.dim() == 2 else out.view(m, self.config.N))
        return out

    def bind(self, places: Sequence[Place], order_place: Place) -> BoundMatmul | None:
        """The operator with all operands but A checked once; None where one of them has to be converted at each call.

        Parameters
        ----------
        places : sequence of (mapping, str)
            Where W, scale, zeros and bias are found, in that order; None for those that are not wanted.
        order_place : (mapping, str)
            Where an index of A's columns is found, or None.
        """
        if not are_plain(tensor for home, name in places if (tensor := home.get(name)) is not None):
            return None
        bound = BoundMatmul(self._door, self._ready, places, order_place)
        return bound if are_plain(bound.tensors) and self._door.is_ready(bound.tensors) else None

    def _ready(self) -> Kernels:
        return self._kernels or self._provide()

    def _dispatch(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        extras: Sequence[torch.Tensor | None],
        named: dict[str, torch.Tensor | None] | None,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        """By torch's dispatcher, for graphs, gradients and tensors of other classes."""
        bound, output = self._door.bind(extras, named or {}, output)
        operands = A, W, bound.get("scale"), bound.get("zeros"), bound.get("bias")
        if output is None:
            return torch.ops.bitblas.matmul(*operands, self._spec)
        if torch.is_grad_enabled() and _any_requires_grad(A, bound.get("bias")):
            raise ArgumentError(
                "output was given, and A or bias requires a gradient; give no output, or use torch.no_grad()"
            )
        torch.ops.bitblas.matmul_into(*operands, output, self._spec)
        return output

    def _refuse_tangents(self, *tensors: torch.Tensor | None) -> None:
        """Torch would drop them without a word."""
        if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise ArgumentError(
                "an operand has a tangent (forward-mode derivatives, torch.func.jvp), which a matmul has not: use backward-mode"
            )

    def build(self) -> None:
        """Load or build the kernels now, unless they are there; the first call does so, too."""
        self._provide()

    # -- kernels ---------------------------------------------------------------------------------------------------------

    def _provide(self) -> Kernels:
        with self._lock.held():
            if self._provided is None:
                saved = None
                if self._from_database and provider.find_saved is not None:
                    saved = provider.find_saved(self.config, self.target)
                self._provided = saved or provide(self.plan)
                self.plan = self._provided.plan
                self._kernels = self._own(self._provided.kernels)
            return self._kernels or self._own(self._provided.kernels)

    def _own(self, kernels: Kernels) -> Kernels:
        """Kernels that others may share, with what this operator keeps."""
        return kernels.keep_dense() if self._dense_cache else kernels

    @property
    def provided(self) -> Provided | None:
        """The kernels, and where they came from; None where they are not there yet."""
        return self._provided

    @property
    def artifact(self) -> Artifact | None:
        """Where the kernels lie on disk; None where they are not built, or only in memory."""
        return self._provided.artifact if self._provided else None

    @property
    def origin(self) -> str:
        """Where the kernels came from: ``"loaded"``, ``"compiled"``, ``"in memory"``, or ``"not built"``."""
        return self._provided.origin if self._provided else "not built"

    @property
    def tuning_record(self) -> dict[str, Any] | None:
        """What was measured when its tilings were chosen, as JSON values; None where they are the defaults, or not known."""
        return self._tuning_record

    def hardware_aware_finetune(
        self, topk: int = 20, target: object = None, parallel_build: bool = True, seconds: float = SECONDS
    ) -> dict[int, dict[str, object]]:
        """Measure the rules' tilings for each bucket, choose those that are clearly faster, store the record, and use it.

        Candidates are built and run in child processes, so that one that crashes or hangs loses itself only. Ctrl-C ends it
        early, with a warning: what was found until then is kept and used, where at least one default was measured.

        Parameters
        ----------
        topk : int
            How many tilings of a bucket to try at most: the default, and those that a model of their costs prefers.
        target : None, str, dict, Target, or tvm.target.Target
            What to compile for from now on: a target whose kernels read weights in this operator's layout. None keeps the
            operator's.
        parallel_build : bool
            Whether to build as many candidates at once as there are physical cores.
        seconds : float
            How long to take, about. A bucket that the time does not reach keeps its default.

        Returns
        -------
        dict
            By bucket that was measured: ``"tiling"``, the fields of the choice, and ``"default"``, those of what it was
            compared with; ``"candidates"``, a list of ``{"tiling", "seconds"}`` with the median seconds of a call, and
            ``"lost"``, of ``{"tiling", "error"}``; ``"gain"``, how many times as long the default took, ``"noise"``, how far
            from 1 that had to be to count, and ``"rounds"``, in how many rounds it was measured.

        Raises
        ------
        ArgumentError
            `topk` is no int of at least 1, `seconds` no number above 0, or the target's kernels read weights in another
            layout.
        ConfigError
            The target is not understood.
        UnsupportedError
            No schedule rule serves the config on the target, or this machine cannot run it.
        BuildError
            Not one tiling of a bucket could be built and run.
        KeyboardInterrupt
            Ctrl-C, before a default was measured.
        """
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            raise ArgumentError(f"topk is {topk!r}; it must be an integer of at least 1")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ArgumentError(f"seconds is {seconds!r}; it must be a number above 0")
        chosen = self.target if target is None else resolve_target(target)
        needed = plan_matmul(self.config, chosen).layout
        if needed != self.layout:  # weights that were transformed before would be read wrongly
            raise ArgumentError(
                f"target is {target!r}, whose kernels read weights in the layout {needed.name!r}; those of this operator lie "
                f"in {self.layout.name!r}. Construct another operator for it"
            )
        from ..tuner.runs import tune_here

        found, record = tune_here(self.config, chosen, topk, seconds, parallel_build)
        plan = plan_matmul(self.config, chosen, choices(record))
        provided = provide(plan)
        with self._lock.held():
            self.target, self.plan, self._provided, self._kernels = chosen, plan, provided, self._own(provided.kernels)
            self._tuning_record = record
        return {m: row.fields() for m, row in found.buckets.items()}

    def profile_latency(self, dynamic_symbolic_constraints: dict[str, int] | None = None) -> float:
        """Median milliseconds of a call on random data, for the largest bucket or the m that is asked for.

        Parameters
        ----------
        dynamic_symbolic_constraints : dict, optional
            ``{"m": rows}``.

        Raises
        ------
        ArgumentError
            The rows are no int of at least 1, or not the M that the operator was built for.
        """
        wanted = dynamic_symbolic_constraints or {}
        if not isinstance(wanted, Mapping):
            raise ArgumentError(f'dynamic_symbolic_constraints is {wanted!r}; it must be a dict such as {{"m": 16}}')
        m = wanted.get("m", self.config.buckets[-1])
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ArgumentError(f"m is {m!r}; it must be an integer of at least 1")
        if not self.config.is_dynamic and m != self.config.M:
            raise ArgumentError(f"m is {m}; this operator was built for M = {self.config.M}")
        return self._time_rows(self._provide(), m) * 1e3

    def _time_rows(self, kernels: Kernels, m: int) -> float:
        from ..cards import time_on

        return time_on(self.target, kernels, self.config, self.layout, m)

    @property
    def lib(self) -> object:
        """The loaded library; not None once built."""
        return self._provided.kernels.module if self._provided else None

    def torch_func(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The operator as a plain function."""
        return self.forward(*args, **kwargs)

    def get_source(self) -> str:
        """The generated code of all kernels: LLVM IR, or CUDA C++."""
        self._provide()
        return _text(self._provided.source)  # type: ignore[union-attr]

    @property
    def prim_func(self) -> tirx.PrimFunc:
        """The unscheduled function of the largest bucket; printing it shows its script. Imports TVM."""
        return expression_module(self.plan)[self.plan.buckets[-1][1]]

    @property
    def scheduled_ir_module(self) -> tvm.IRModule:
        """The scheduled functions of all buckets. Imports TVM."""
        return scheduled_module(self.plan)

    # -- copies ---------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[object, ...]:
        root = self.artifact.path.parents[1] if self.artifact else store().root if self._provided else None
        return type(self)._unpickle, (
            *(self.config, self.target, self.plan.tilings, self.name, self.backend, root),
            self._tuning_record,
            self._dense_cache,
        )

    @classmethod
    def _unpickle(
        cls,
        config: MatmulConfig,
        target: Target,
        tilings: Mapping[int, Tiling],
        name: str,
        backend: str,
        root: Path | None,
        record: dict[str, Any] | None,
        dense_cache: bool,
    ) -> Self:
        """The operator with the same tilings; `root` is the store of its kernels, None where it had none yet."""
        plan = plan_matmul(config, target, tilings)
        provided = None
        if root is not None:
            with suppress(ArtifactError, OSError):  # it comes from another machine, where that directory was another
                provided = load(plan, root)
            provided = provided or provide(plan)
        return cls.restore(config, provided.plan if provided else plan, provided, name, backend, record, dense_cache)

    def __deepcopy__(self, memo: dict[int, object]) -> Matmul:
        return self  # it holds no state that a copy could change

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r}, target={str(self.target)!r})"


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator takes three times as long, at each call
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            return True
    return False


def _text(source: Path | str) -> str:
    return source.read_text() if isinstance(source, Path) else source


def _make_operator(config: MatmulConfig, target: Target, dense_cache: bool) -> Matmul:
    return Matmul(config, target=target, dense_cache=dense_cache)


makers["matmul"] = _make_operator
