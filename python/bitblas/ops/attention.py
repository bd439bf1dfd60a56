"""FlashAtten: fused attention, a config made callable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd import forward_ad, profiler

from ..config import FlashAttenConfig
from ..errors import ArgumentError
from ..plan import AttentionPlan
from ..target import Target
from .arguments import PLAIN
from .attention_arguments import AttentionDoor
from .cuda_attention_arguments import CudaAttentionDoor
from .operator import Operator
from .provider import Provided
from .registry import announce, makers
from .torch_attention import attention_spec

#: How many modes, such as those of fake tensors, see what torch dispatches: they may give tensors without memory.
_num_modes = torch._C._len_torch_dispatch_stack


class FlashAtten(Operator):
    """out = softmax(Q · Kᵀ · softmax_scale) · V, some keys at a time: no matrix of seq_len x seq_len is ever held.

    Parameters
    ----------
    config : FlashAttenConfig
        What is asked.
    name : str
        A name for messages.
    target : None, str, dict, Target, or tvm.target.Target
        See `bitblas.target.resolve_target`.
    enable_tuning : bool
        Use a stored tuning record where there is one. Construction never measures.
    from_database : bool
        Load and build nothing now: the first call does.
    backend : str
        ``"tl"`` or ``"tir"``: accepted for compatibility, both mean the same.

    Attributes
    ----------
    config : FlashAttenConfig
        The config it was built from.
    target : Target
        What it was compiled for.
    plan : AttentionPlan
        The rule and tiling of each kernel.

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

    config: FlashAttenConfig
    plan: AttentionPlan

    _usual_name = "flash_atten"

    def __init__(
        self,
        config: FlashAttenConfig,
        name: str = "flash_atten",
        target: object = None,
        enable_tuning: bool = False,
        from_database: bool = False,
        backend: str = "tl",
    ) -> None:
        self._construct(config, FlashAttenConfig, name, target, enable_tuning, from_database, backend)

    def _install(
        self,
        config: FlashAttenConfig,
        plan: AttentionPlan,
        provided: Provided | None,
        name: str,
        backend: str,
        record: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super()._install(config, plan, provided, name, backend, record, **options)
        self._door = CudaAttentionDoor(config, plan) if plan.target.kind == "cuda" else AttentionDoor(config)
        #: names this operator in a graph of torch
        self._spec = attention_spec(config, plan.target)
        announce(self._spec, self)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute softmax(Q · Kᵀ · softmax_scale) · V for each head.

        Parameters
        ----------
        q : torch.Tensor
            (batch, seq_len, heads, dim) in Q_dtype, any strides; those whose last is 1 are read in place.
        k : torch.Tensor
            (batch, seq_len_kv, heads_kv, dim), or (batch, dim, heads_kv, seq_len_kv) for the layout ntn, in K_dtype; likewise.
        v : torch.Tensor
            (batch, seq_len_kv, heads_kv, dim_v) in V_dtype; likewise.
        output : torch.Tensor, optional
            (batch, seq_len, heads, dim_v) in Out_dtype, contiguous, to be filled and returned.

        Returns
        -------
        torch.Tensor
            (batch, seq_len, heads, dim_v) in Out_dtype: zeros for a query that sees no key, or none with a score above -inf.

        Raises
        ------
        ArgumentError
            A tensor is of the wrong kind, shape, dtype or device. No kernel has run then.
        BuildError, ArtifactError, UnsupportedError
            As for the constructor, by the first call of an operator that was made with `from_database=True`.
        """
        if torch.compiler.is_compiling() or _num_modes() or profiler._is_profiler_enabled:
            return self._dispatch(q, k, v, output)
        for tensor in (q, k, v):
            if not isinstance(tensor, torch.Tensor):
                break  # which the door tells
            if type(tensor) not in PLAIN or (tensor.requires_grad and torch.is_grad_enabled()):
                return self._dispatch(q, k, v, output)
        if forward_ad._current_level >= 0:
            _refuse_tangents(q, k, v)
        return self.launch(q, k, v, output)

    __call__ = forward

    def launch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """`forward` for tensors that have data: without a gradient, and not traced."""
        sizes, operands, out = self._door.enter(q, k, v, output)
        if sizes.seq_len_kv == 0 or self.config.dim_v == 0:
            return out.zero_()
        if out.numel():
            self._ready().launch(sizes.rows, operands, out)
        return out

    def _dispatch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """By torch's dispatcher, for graphs, gradients and tensors of other classes."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if not isinstance(tensor, torch.Tensor):
                raise ArgumentError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
        if output is None:
            return torch.ops.bitblas.flash_atten(q, k, v, self._spec)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ArgumentError(
                "output was given, and q, k or v requires a gradient; give no output, or use torch.no_grad()"
            )
        torch.ops.bitblas.flash_atten_into(q, k, v, output, self._spec)
        return output


def _refuse_tangents(*tensors: torch.Tensor) -> None:
    """Torch would drop them without a word."""
    if any(isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise ArgumentError("an operand has a tangent (forward-mode derivatives, torch.func.jvp); FlashAtten has none")


def _make_operator(fields: Mapping[str, Any], target: Target) -> FlashAtten:
    return FlashAtten(FlashAttenConfig(**fields["config"]), target=target)


makers["attention"] = _make_operator
