"""FlashAtten: fused attention, a config made callable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import ATTENTION, FlashAttenConfig
from ..errors import ArgumentError
from ..plan import AttentionPlan
from ..target import Target
from .arguments import PLAIN, check_kind
from .attention_arguments import AttentionDoor
from .cuda_attention_arguments import CudaAttentionDoor
from .operator import Operator
from .registry import announce, makers
from .torch_attention import NO_GRADIENT, attention_spec
from .watching import check_has_memory, is_seen, refuse_derivatives


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

    def _adopt(self, plan: AttentionPlan) -> None:
        super()._adopt(plan)
        config = self.config
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
        if (
            torch.compiler.is_compiling()
            or is_seen()
            or type(q) not in PLAIN
            or type(k) not in PLAIN
            or type(v) not in PLAIN
            or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        ):
            return self._dispatch(q, k, v, output)
        return self.launch(q, k, v, output)

    __call__ = forward

    def launch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """`forward` for tensors that have data: without a gradient, and not traced."""
        sizes, operands, out = self._door.enter(q, k, v, output)
        if out.numel():
            if sizes.seq_len_kv == 0:
                return out.zero_()
            (self._kernels or self._provide()).launch(sizes.rows, operands, out)
        return out

    def _dispatch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """By torch's dispatcher, for graphs, gradients, transforms and tensors of other classes."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_kind(name, tensor)
        if not torch.compiler.is_compiling():
            refuse_derivatives("FlashAtten has no derivatives", NO_GRADIENT, q, k, v)
        if output is None:
            return torch.ops.bitblas.flash_atten(q, k, v, self._spec)
        check_kind("output", output)
        if not torch.compiler.is_compiling():
            check_has_memory(q, k, v, output)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ArgumentError(
                "output was given, and q, k or v requires a gradient; give no output, or use torch.no_grad()"
            )
        torch.ops.bitblas.flash_atten_into(q, k, v, output, self._spec)
        return output

    def profile_latency(self, dynamic_symbolic_constraints: Mapping[str, int] | None = None) -> float:
        """Median milliseconds of a call on random data, with keys and values that come from memory.

        Parameters
        ----------
        dynamic_symbolic_constraints : mapping, optional
            Sizes: ``"batch"``, ``"heads"``, ``"heads_kv"``, ``"seq_len"``, ``"seq_len_kv"``. One that is not named is the
            config's; where that leaves it open, one batch, 8 heads or more (as many as there are threads, or multiprocessors),
            as many heads of keys, 1024 queries, and as many keys as queries, but at least 1024.

        Raises
        ------
        ArgumentError
            A size is no int of at least 1, is not the one that the operator was built for, or has another name; or heads_kv
            does not divide heads.
        """
        from ..cards import time_on
        from ..operands import choose_sizes, draw_attention

        wanted = dynamic_symbolic_constraints or {}
        if not isinstance(wanted, Mapping):
            raise ArgumentError(
                f'dynamic_symbolic_constraints is {wanted!r}; it must be a dict such as {{"seq_len": 16}}'
            )
        sizes = choose_sizes(self.config, self.target, wanted)
        return time_on(self.target, self._provide(), draw_attention(self.config, sizes)) * 1e3

    def _check_retargeting(self, named: object, target: Target) -> None:
        if target.kind != self.target.kind:
            raise ArgumentError(
                f"target is {named!r}; this operator is for {self.target}. Construct another one for other devices"
            )


def _make_operator(fields: Mapping[str, Any], target: Target) -> FlashAtten:
    return FlashAtten(FlashAttenConfig(**fields["config"]), target=target)


makers[ATTENTION] = _make_operator
