"""Matmul: a config made callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from .. import packing, tuner
from ..artifacts import Artifact
from ..build import expression_module, scheduled_module
from ..config import MatmulConfig
from ..errors import ArgumentError, ArtifactError, ConfigError
from ..layout import PackedLayout
from ..locks import ForkLock
from ..plan import MatmulPlan, plan_matmul
from ..runtime import Kernels
from ..schedule import Tiling
from ..target import Target, resolve_target
from .arguments import Door, check_dense
from .provider import Provided, load, provide, store

if TYPE_CHECKING:
    import tvm
    from tvm import tirx
    from typing_extensions import Self

BACKENDS = ("tl", "tir")


class Matmul:
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
        Load and build nothing now: the first call loads, or builds what is not there.
    backend : str
        ``"tl"`` or ``"tir"``: accepted for compatibility, both mean the same.

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
    ) -> None:
        if not isinstance(config, self._config_class):
            raise ConfigError(f"config is {config!r}; it must be a {self._config_class.__name__}")
        if backend not in BACKENDS:
            raise ConfigError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
        resolved = resolve_target(target)
        tuned = tuner.load_record(config, resolved) if enable_tuning else None
        self._install(config, plan_matmul(config, resolved, tuned), None, name, backend)
        if not from_database:
            self._provide()

    def _install(
        self, config: MatmulConfig, plan: MatmulPlan, provided: Provided | None, name: str, backend: str
    ) -> None:
        self.config, self.name, self.backend = config, name, backend
        self.target: Target = plan.target
        self.plan = plan
        self._lock = ForkLock()
        self._provided = provided
        self._kernels: Kernels | None = provided.kernels if provided else None
        self._door = Door(config, tuple(self.retrieve_weight_shape()))

    @classmethod
    def restore(
        cls,
        config: MatmulConfig,
        plan: MatmulPlan,
        provided: Provided | None = None,
        name: str = "matmul",
        backend: str = "tl",
    ) -> Self:
        """An operator whose plan, and perhaps kernels, are there already; without kernels the first call provides them."""
        op = cls.__new__(cls)
        op._install(config, plan, provided, name, backend)
        return op

    # -- weights ---------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> PackedLayout:
        """Where the bits of this operator's weights lie."""
        return self.plan.layout

    def retrieve_weight_shape(self) -> list[int]:
        """Shape of the tensor that `transform_weight` returns: [N, ceil(K·bits/8)], or [N, K] for native dtypes."""
        if self.config.format.is_native:
            return [self.config.N, self.config.K]
        return [self.config.N, self.layout.row_bytes]

    def transform_weight(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode and lay out a weight for this operator.

        Parameters
        ----------
        weight : torch.Tensor
            (N, K), or (K, N) for the layouts nn and tn: codes 0 .. 2^b - 1 of uint and codebook formats, values of int formats
            (int1: -1 and 1), both in any dtype of numbers; torch.float8 tensors or their bytes, or floating-point weights of
            native dtypes.
        scale, zeros, bias : torch.Tensor, optional
            Accepted and left as they are: they are handed over at each call.

        Returns
        -------
        torch.Tensor
            Of `retrieve_weight_shape`, int8 (native dtypes: that dtype), on the device of `weight`.

        Raises
        ------
        ArgumentError
            Wrong shape or dtype, or a value that the format cannot hold.
        """
        check_dense("weight", weight)
        config, by_k = self.config, self.config.layout.endswith("n")
        expected = (config.K, config.N) if by_k else (config.N, config.K)
        if tuple(weight.shape) != expected:
            names = "(K, N)" if by_k else "(N, K)"
            raise ArgumentError(
                f"weight has shape {tuple(weight.shape)}; expected {names} = {expected} for layout {config.layout!r}"
            )
        weight = weight.detach()
        return self.pack(packing.encode(weight.mT if by_k else weight, config.format, "weight"))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Lay out (N, K) codes; the inverse of `unpack_weight`.

        Parameters
        ----------
        codes : torch.Tensor
            (N, K) integers 0 .. 2^b - 1 of any integer dtype; for float16 and bfloat16 int16 bit patterns, for float32 int32.

        Returns
        -------
        torch.Tensor
            As `transform_weight`.

        Raises
        ------
        ArgumentError
            Wrong shape or dtype, or a code out of range.
        """
        check_dense("codes", codes)
        fmt = self.config.format
        if codes.is_floating_point() or codes.dtype is torch.bool or codes.is_complex():
            raise ArgumentError(f"codes have dtype {codes.dtype}; they must be integers")
        if fmt.is_native:
            if codes.dtype is not packing.code_dtype(fmt):
                raise ArgumentError(f"codes have dtype {codes.dtype}; {fmt.name} takes {packing.code_dtype(fmt)}")
            return packing.pack(codes, self.layout).view(getattr(torch, fmt.torch_name))
        if codes.dtype is not torch.uint8 or fmt.bits < 8:
            low, high = (int(v) for v in torch.aminmax(packing.comparable(codes))) if codes.numel() else (0, 0)
            if low < 0 or high >= 1 << fmt.bits:
                wrong = low if low < 0 else high
                raise ArgumentError(f"codes hold {wrong}; allowed for {fmt.name}: 0 to {(1 << fmt.bits) - 1}")
        return packing.pack(codes.to(torch.uint8), self.layout)

    def unpack_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The (N, K) codes of a weight in this operator's layout; the inverse of `pack`.

        Returns
        -------
        torch.Tensor
            (N, K) uint8, or int16 and int32 bit patterns of native dtypes, on the device of `weight`.

        Raises
        ------
        ArgumentError
            Wrong kind or shape.
        """
        check_dense("weight", weight)
        if list(weight.shape) != self.retrieve_weight_shape():
            raise ArgumentError(
                f"weight has shape {tuple(weight.shape)}; expected {tuple(self.retrieve_weight_shape())}"
            )
        return packing.unpack(weight.detach(), self.layout)

    @property
    def weight_transform(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """None where a row of codes, packed, is what the kernels read; else what makes that of unsigned codes.

        It takes (N, K) codes on the CPU, in int8 or uint8: those of a uint format, value + 2^(b - 1) of an int format, int8
        included; and it returns what `transform_weight` does.
        """
        signed_bytes = self.config.W_dtype == "int8"
        if self.layout.name == "packed" and not signed_bytes:
            return None

        def transform(codes: torch.Tensor) -> torch.Tensor:
            codes = codes.view(torch.uint8) if codes.dtype is torch.int8 else codes
            return self.pack(codes ^ 128 if signed_bytes else codes)

        return transform

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
        m, operands, out = self._door.enter(A, W, extras, named, output)
        if m:
            kernels = self._kernels or self._provide()
            kernels.launch(m, operands, out if out.dim() == 2 else out.view(m, self.config.N))
        return out

    __call__ = forward

    # -- kernels ---------------------------------------------------------------------------------------------------------

    def _provide(self) -> Kernels:
        with self._lock.held():
            if self._provided is None:
                self._provided = provide(self.plan)
                self._kernels = self._provided.kernels
            return self._provided.kernels

    @property
    def artifact(self) -> Artifact | None:
        """Where the kernels lie on disk; None where they are not built, or only in memory."""
        return self._provided.artifact if self._provided else None

    @property
    def origin(self) -> str:
        """Where the kernels came from: ``"loaded"``, ``"compiled"``, ``"in memory"``, or ``"not built"``."""
        return self._provided.origin if self._provided else "not built"

    def hardware_aware_finetune(
        self, topk: int = 20, target: object = None, parallel_build: bool = True
    ) -> dict[int, dict[str, object]]:
        """Measure the rules' tilings for each bucket, keep the fastest, store the record, and use it.

        Parameters
        ----------
        topk : int
            How many tilings of a bucket to try at most.
        target : None, str, dict, Target, or tvm.target.Target
            What to compile for from now on: a target whose kernels read weights in this operator's layout. None keeps the
            operator's.
        parallel_build : bool
            Accepted; candidates are built one after the other.

        Returns
        -------
        dict
            By bucket: ``"tiling"``, the fields of the fastest, and ``"candidates"``, a list of ``{"tiling", "seconds"}`` with
            the median seconds of a call.

        Raises
        ------
        ArgumentError
            `topk` is no int of at least 1, or the target's kernels read weights in another layout.
        ConfigError
            The target is not understood.
        UnsupportedError
            No schedule rule serves the config on the target, or this machine cannot run it.
        BuildError
            Not one tiling of a bucket could be built.
        """
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            raise ArgumentError(f"topk is {topk!r}; it must be an integer of at least 1")
        chosen = self.target if target is None else resolve_target(target)
        needed = plan_matmul(self.config, chosen).layout
        if needed != self.layout:  # weights that were transformed before would be read wrongly
            raise ArgumentError(
                f"target is {target!r}, whose kernels read weights in the layout {needed.name!r}; those of this operator lie "
                f"in {self.layout.name!r}. Construct another operator for it"
            )
        found = tuner.tune(self.config, chosen, topk, lambda plan: provide(plan).kernels, self._time_rows)
        tuner.save_record(self.config, chosen, found)
        with self._lock.held():
            self.target = chosen
            self.plan = plan_matmul(self.config, chosen, {m: row.tiling for m, row in found.items()})
            self._provided = provide(self.plan)
            self._kernels = self._provided.kernels
        return {m: row.fields() for m, row in found.items()}

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
        m = (dynamic_symbolic_constraints or {}).get("m", self.config.buckets[-1])
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ArgumentError(f"m is {m!r}; it must be an integer of at least 1")
        if not self.config.is_dynamic and m != self.config.M:
            raise ArgumentError(f"m is {m}; this operator was built for M = {self.config.M}")
        return self._time_rows(self._provide(), m) * 1e3

    def _time_rows(self, kernels: Kernels, m: int) -> float:
        return tuner.measure(kernels, self.config, self.layout, m)

    @property
    def lib(self) -> object:
        """The loaded library; not None once built."""
        return self._provided.kernels.module if self._provided else None

    def torch_func(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The operator as a plain function."""
        return self.forward(*args, **kwargs)

    def get_source(self) -> str:
        """The generated code of all kernels: LLVM IR."""
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

    # -- what clients read -----------------------------------------------------------------------------------------------

    M = property(lambda self: self.config.M)
    N = property(lambda self: self.config.N)
    K = property(lambda self: self.config.K)
    A_dtype = property(lambda self: self.config.A_dtype)
    W_dtype = property(lambda self: self.config.W_dtype)
    out_dtype = property(lambda self: self.config.out_dtype)
    accum_dtype = property(lambda self: self.config.accum_dtype)
    storage_dtype = property(lambda self: self.config.storage_dtype)
    with_scaling = property(lambda self: self.config.with_scaling)
    with_zeros = property(lambda self: self.config.with_zeros)
    with_bias = property(lambda self: self.config.with_bias)
    group_size = property(lambda self: self.config.group_size)
    zeros_mode = property(lambda self: self.config.zeros_mode)
    fast_decoding = property(lambda self: self.config.fast_decoding)
    propagate_a = property(lambda self: False)
    propagate_b = property(lambda self: False)

    @property
    def bit(self) -> int:
        """Bits of a weight."""
        return self.config.format.bits

    @property
    def source_format(self) -> str:
        """The format's family, as the original BitBLAS names it: uint, int, nf, fp, fp_e4m3, fp_e5m2 or bf."""
        names = {"nf4": "nf", "float8_e4m3": "fp_e4m3", "float8_e5m2": "fp_e5m2", "bfloat16": "bf"}
        fmt = self.config.format
        return fmt.kind if fmt.is_integer else names.get(fmt.name, "fp")

    @cached_property
    def lut(self) -> torch.Tensor | None:
        """The (16,) values of nf4, in the dtype of scales, on the CPU; None for other formats."""
        if self.config.W_dtype != "nf4":
            return None
        dtype = getattr(torch, self.config.scale_dtype)
        return torch.tensor(self.config.format.codebook, dtype=dtype, device="cpu")  # whatever the default device is

    def __reduce__(self) -> tuple[object, ...]:
        root = self.artifact.path.parents[1] if self.artifact else store().root if self._provided else None
        return type(self)._unpickle, (self.config, self.target, self.plan.tilings, self.name, self.backend, root)

    @classmethod
    def _unpickle(
        cls,
        config: MatmulConfig,
        target: Target,
        tilings: Mapping[int, Tiling],
        name: str,
        backend: str,
        root: Path | None,
    ) -> Self:
        """The operator with the same tilings; `root` is the store of its kernels, None where it had none yet."""
        plan = plan_matmul(config, target, tilings)
        provided = None
        if root is not None:
            with suppress(ArtifactError, OSError):  # it comes from another machine, where that directory was another
                provided = load(plan, root)
            provided = provided or provide(plan)
        return cls.restore(config, plan, provided, name, backend)

    def __deepcopy__(self, memo: dict[int, object]) -> Matmul:
        return self  # it holds no state that a copy could change

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r}, target={str(self.target)!r})"


def _text(source: Path | str) -> str:
    return source.read_text() if isinstance(source, Path) else source
