"""What all operators are: a config, its plan, and the kernels that come from the store, or go there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifacts import Artifact
from ..build import expression_module, scheduled_module
from ..config import Config
from ..errors import ArgumentError, ArtifactError, ConfigError
from ..locks import ForkLock
from ..plan import AnyPlan, make_plan
from ..runtime import Kernels
from ..schedule import Tiling
from ..target import Target, resolve_target
from ..tuner import SECONDS
from ..tuner.record import choices, read_record
from . import provider
from .provider import Provided, load, provide, store

if TYPE_CHECKING:
    import tvm
    from tvm import tirx
    from typing_extensions import Self

BACKENDS = ("tl", "tir")


class Operator:
    """A config made callable, by kernels that are loaded or built when they are needed; classes say which config and plan."""

    config: Any
    plan: Any

    def _construct(
        self,
        config: Config,
        kind: type,
        name: str,
        target: object,
        enable_tuning: bool,
        from_database: bool,
        backend: str,
        **options: Any,
    ) -> None:
        """What a constructor does: check, plan, and provide the kernels unless they are to come from a database later."""
        if not isinstance(config, kind):
            raise ConfigError(f"config is {config!r}; it must be a {kind.__name__}")
        if backend not in BACKENDS:
            raise ConfigError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
        resolved = resolve_target(target)
        record = read_record(config, resolved) if enable_tuning else None
        tuned = choices(record) if record else None
        plan = make_plan(config, resolved, tuned)
        self._install(config, plan, None, name, backend, record, **options)
        self._from_database = from_database
        if not from_database:
            self._provide()

    def _install(
        self,
        config: Any,
        plan: Any,
        provided: Provided | None,
        name: str,
        backend: str,
        record: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Become an operator; a class takes the `options` that it was made with."""
        self.config, self.name, self.backend = config, name, backend
        self._adopt(plan)
        self._tuning_record = record
        self._from_database = False
        self._lock = ForkLock()
        self._provided = provided
        self._kernels: Kernels | None = self._own(provided.kernels) if provided else None

    def _adopt(self, plan: Any) -> None:
        """Take a plan, and all that depends on its target: what checks arguments, and what a graph calls the operator."""
        self.plan = plan
        self.target: Target = plan.target

    @classmethod
    def restore(
        cls,
        config: Config,
        plan: AnyPlan,
        provided: Provided | None = None,
        name: str | None = None,
        backend: str = "tl",
        record: dict[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """An operator whose plan, and perhaps kernels, are there already; without kernels the first call provides them."""
        op = cls.__new__(cls)
        op._install(config, plan, provided, name or cls._usual_name, backend, record, **options)
        return op

    #: What it is called in messages where no name is given.
    _usual_name = "operator"

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
                if self._provided.plan != self.plan:
                    self._adopt(self._provided.plan)
                self._kernels = self._own(self._provided.kernels)
            return self._kernels or self._own(self._provided.kernels)

    def _ready(self) -> Kernels:
        return self._kernels or self._provide()

    def _own(self, kernels: Kernels) -> Kernels:
        """Kernels that others may share, with what this operator keeps."""
        return kernels

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
        self._check_retargeting(target, chosen)
        from ..tuner.runs import tune_here

        found, record = tune_here(self.config, chosen, topk, seconds, parallel_build)
        plan = make_plan(self.config, chosen, choices(record))
        provided = provide(plan)
        with self._lock.held():
            self._adopt(plan)
            self._provided, self._kernels = provided, self._own(provided.kernels)
            self._tuning_record = record
        return {m: row.fields() for m, row in found.buckets.items()}

    def _check_retargeting(self, named: object, target: Target) -> None:
        """Raise ArgumentError where what was made ready for this operator would be read wrongly by kernels for `target`."""

    @property
    def lib(self) -> object:
        """The loaded library; not None once built."""
        return self._provided.kernels.module if self._provided else None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute."""
        raise NotImplementedError

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

    def _options(self) -> dict[str, Any]:
        """What an operator like this one is made with, beside its config: arguments of `restore`."""
        return {}

    def __reduce__(self) -> tuple[object, ...]:
        root = self.artifact.path.parents[1] if self.artifact else store().root if self._provided else None
        return type(self)._unpickle, (
            *(self.config, self.target, self.plan.tilings, self.name, self.backend, root),
            self._tuning_record,
            self._options(),
        )

    @classmethod
    def _unpickle(
        cls,
        config: Config,
        target: Target,
        tilings: Mapping[int, Tiling],
        name: str,
        backend: str,
        root: Path | None,
        record: dict[str, Any] | None,
        options: dict[str, Any],
    ) -> Self:
        """The operator with the same tilings; `root` is the store of its kernels, None where it had none yet."""
        plan = make_plan(config, target, tilings)
        provided = None
        if root is not None:
            with suppress(ArtifactError, OSError):  # it comes from another machine, where that directory was another
                provided = load(plan, root)
            provided = provided or provide(plan)
        return cls.restore(config, provided.plan if provided else plan, provided, name, backend, record, **options)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # it holds no state that a copy could change

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r}, target={str(self.target)!r})"


def _text(source: Path | str) -> str:
    return source.read_text() if isinstance(source, Path) else source
