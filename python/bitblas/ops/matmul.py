"""Matmul: a config made callable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..config import MatmulConfig
from ..errors import ArgumentError
from ..plan import MatmulPlan, plan_matmul
from ..runtime import Kernels
from ..target import Target
from .arguments import PLAIN, Door, check_kind
from .bound import BoundMatmul, Place, are_plain
from .cuda_arguments import CudaDoor
from .facts import WithFacts
from .operator import Operator
from .provider import Provided
from .registry import announce, makers
from .torch_operator import operator_spec
from .watching import check_has_memory, is_seen, refuse_derivatives
from .weights import WithWeights

#: What whoever asks for derivatives that there are not is told.
_NO_TANGENT = "a matmul has none: use backward-mode"
_NO_FUNCTIONAL_GRADIENT = "torch.func differentiates no matmul of bitblas; use torch.autograd, such as out.backward()"


class Matmul(Operator, WithWeights, WithFacts):
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

    config: MatmulConfig
    plan: MatmulPlan

    #: The class of `config`.
    _config_class: ClassVar[type[MatmulConfig]] = MatmulConfig
    _usual_name = "matmul"

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
        self._construct(
            config,
            self._config_class,
            name,
            target,
            enable_tuning,
            from_database,
            backend,
            dense_cache=dense_cache,
        )

    def _install(
        self,
        config: MatmulConfig,
        plan: MatmulPlan,
        provided: Provided | None,
        name: str,
        backend: str,
        record: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._dense_cache = bool(options.get("dense_cache"))
        super()._install(config, plan, provided, name, backend, record)
        self._with_bias = config.with_bias

    def _adopt(self, plan: MatmulPlan) -> None:
        super()._adopt(plan)
        config, shape = self.config, tuple(self.retrieve_weight_shape())
        self._door = CudaDoor(config, shape, plan.target) if plan.target.kind == "cuda" else Door(config, shape)
        #: names this operator in a graph of torch
        self._spec = operator_spec(config, plan.target, self.layout.name, self._dense_cache)
        announce(self._spec, self)

    def _own(self, kernels: Kernels) -> Kernels:
        return kernels.keep_dense() if self._dense_cache else kernels

    def _options(self) -> dict[str, Any]:
        return {"dense_cache": self._dense_cache}

    def _check_retargeting(self, named: object, target: Target) -> None:
        needed = plan_matmul(self.config, target).layout
        if needed != self.layout:  # weights that were transformed before would be read wrongly
            raise ArgumentError(
                f"target is {named!r}, whose kernels read weights in the layout {needed.name!r}; those of this operator lie "
                f"in {self.layout.name!r}. Construct another operator for it"
            )

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
        if torch.compiler.is_compiling() or is_seen() or type(A) not in PLAIN:
            dispatched = isinstance(A, torch.Tensor)
        else:
            dispatched = torch.is_grad_enabled() and (
                A.requires_grad or (self._with_bias and _any_requires_grad(*extras, bias))
            )
        return (self._dispatch if dispatched else self.launch)(A, W, extras, named, output)

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
        for name, tensor in zip(("A", "W", "scale", "zeros", "bias", "output"), (*operands, output), strict=True):
            if tensor is not None:
                check_kind(name, tensor)
        if not torch.compiler.is_compiling():
            refuse_derivatives(_NO_TANGENT, _NO_FUNCTIONAL_GRADIENT, *operands)
        if output is None:
            return torch.ops.bitblas.matmul(*operands, self._spec)
        if not torch.compiler.is_compiling():
            check_has_memory(*operands, output)
        if torch.is_grad_enabled() and _any_requires_grad(A, bound.get("bias")):
            raise ArgumentError(
                "output was given, and A or bias requires a gradient; give no output, or use torch.no_grad()"
            )
        torch.ops.bitblas.matmul_into(*operands, output, self._spec)
        return output

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
        from ..operands import draw_call

        return time_on(self.target, kernels, draw_call(self.plan.problem_of(m)))


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator takes three times as long, at each call
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            return True
    return False


def _make_operator(fields: Mapping[str, Any], target: Target) -> Matmul:
    op = Matmul(MatmulConfig(**fields["config"]), target=target, dense_cache=fields["dense_cache"])
    if op.layout.name != fields["layout"]:
        raise ArgumentError(
            f"the graph's weights lie in the layout {fields['layout']!r}, those of this version's {target} in "
            f"{op.layout.name!r}: export the program again"
        )
    return op


makers["matmul"] = _make_operator
