"""Many rows: weights are decoded to a matrix, which torch's own kernels multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...config import MatmulConfig
from ...layout import PackedLayout
from ..rule import MatmulTiling, Problem, ScheduleRule

if TYPE_CHECKING:
    from tvm import tirx

_FLOATS = ("float16", "bfloat16")
#: Rows from which on decoding pays, by arithmetic: reading codes and writing 16 bits takes a part of the product's time that
#: falls with the rows. From capability 9.0 on torch has instructions that our kernels have not, so that less is enough.
_ENOUGH_ROWS, _ENOUGH_ROWS_90 = 1024, 512
#: Kernels index the decoded matrix with 32 bits.
_MOST_WEIGHTS = 1 << 31


@dataclass(frozen=True)
class DenseTiling(MatmulTiling):
    """How the kernel that decodes walks the (N, K) weights: a thread writes block_k consecutive k of one of block_n rows.

    Attributes
    ----------
    threads : int
        Threads of a block.
    """

    threads: int = 256

    kind: ClassVar[str] = "dense"

    def blocks(self, config: MatmulConfig, layout: PackedLayout) -> dict[str, Any]:
        """See `MatmulTiling`."""
        return {"row_multiple": 1, "lane_multiple": 1, "chunk": config.group}

    def row_elements(self, config: MatmulConfig, layout: PackedLayout) -> int:
        """See `MatmulTiling`: rows of activations are torch's business."""
        return 1


class DenseRule(ScheduleRule[DenseTiling]):
    """A kernel (W, [scale], [zeros], dense) that writes dequantize(W), (N, K) in A's dtype; see `bitblas.cuda.dense`.

    Weights that are such a matrix already are multiplied as they are, for any number of rows.
    """

    name = "cuda_dense"
    target_kind: ClassVar[str] = "cuda"
    layouts = ("packed", "mma16", "mma8")

    def decline(self, problem: Problem) -> str | None:
        """See `ScheduleRule`."""
        return super().decline(problem) or self._decline(problem)

    def _decline(self, problem: Problem) -> str | None:
        config, target = problem.config, problem.target
        if config.out_dtype != config.A_dtype or config.dynamic_quantization:
            return "multiplies by torch, whose results have the dtype of activations"
        if is_dense(config):
            return None
        if config.A_dtype not in _FLOATS:
            return f"multiplies {' and '.join(_FLOATS)}, not {config.A_dtype}"
        if config.A_dtype == "bfloat16" and target.capability < 80:
            return f"multiplies bfloat16 from capability 8.0 on, not on {target}"
        if config.N * config.K >= _MOST_WEIGHTS:
            return f"decodes fewer than {_MOST_WEIGHTS} weights at once"
        enough = _ENOUGH_ROWS_90 if target.capability >= 90 else _ENOUGH_ROWS
        return f"is for {enough} rows and more" if problem.m < enough else None

    def tilings(self, problem: Problem) -> list[DenseTiling]:
        """See `ScheduleRule`."""
        step = next(step for step in (8, 4, 2, 1) if problem.config.K % step == 0)
        return [DenseTiling(1, 1, step, threads) for threads in (256, 128)]

    def apply(self, func: tirx.PrimFunc, problem: Problem, tiling: DenseTiling) -> tirx.PrimFunc:
        """See `ScheduleRule`."""
        from tvm import s_tir

        from ...expr.dense import dense_func

        name = str(func.attrs["global_symbol"])
        schedule = s_tir.Schedule(dense_func(problem.config, problem.layout, name))
        value, dense = schedule.get_sblock("value"), schedule.get_sblock("dense")
        schedule.set_scope(value, 0, "local")
        n, k = schedule.get_loops(dense)
        outer, inner = schedule.split(k, [None, tiling.block_k])
        block, thread = schedule.split(schedule.fuse(n, outer), [None, tiling.threads])
        schedule.bind(block, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        schedule.compute_at(value, thread)
        if tiling.block_k > 1:
            schedule.unroll(schedule.get_loops(value)[-1])
            # before 8.0 TVM rounds to bfloat16 by integers, in vectors that C++ does not have
            if problem.config.A_dtype != "bfloat16" or problem.target.capability >= 80:
                schedule.vectorize(inner)
        return schedule.mod["main"].with_attr({"global_symbol": name})


def is_dense(config: MatmulConfig) -> bool:
    """Whether the weights are what torch multiplies with: floats of A's dtype, without scale and zeros."""
    same = config.format.is_native and config.W_dtype == config.A_dtype and config.A_dtype in (*_FLOATS, "float32")
    return same and not config.with_scaling and not config.with_zeros
