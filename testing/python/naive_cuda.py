"""A CUDA rule for tests of all that lies around rules: one thread for each output, no tricks."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest

import bitblas
from bitblas.layout import PackedLayout
from bitblas.schedule.rule import MatmulTiling, Problem, ScheduleRule

THREADS = 64


@dataclass(frozen=True)
class NaiveTiling(MatmulTiling):
    """`partial_rows`: rows of sums in a workspace that the kernel asks for, and does not use; 0 asks for none."""

    partial_rows: int = 0

    kind: ClassVar[str] = "naive"

    def blocks(self, config, layout):
        return {"row_multiple": 1, "lane_multiple": 1, "chunk": config.group}

    def workspace(self, config, m):
        return (self.partial_rows * m * config.N, m) if self.partial_rows else (0, 0)


class NaiveRule(ScheduleRule[NaiveTiling]):
    """float16 or bfloat16 × uint4, with or without scale, and float16 × float16."""

    name = "naive_cuda"
    target_kind = "cuda"
    layouts = ("packed",)

    def decline(self, problem):
        config = problem.config
        if config.with_zeros or config.with_bias or config.W_dtype not in ("uint4", "float16"):
            return "is for tests"
        return super().decline(problem)

    def tilings(self, problem):
        return [NaiveTiling(1, THREADS, problem.m), NaiveTiling(1, THREADS, problem.m, 2)]

    def apply(self, func, problem, tiling):
        from tvm import s_tir, te

        cfg = problem.config
        m, k = te.var("m"), te.reduce_axis((0, cfg.K), name="k")
        a = te.placeholder((m, cfg.K), cfg.A_dtype, name="A")
        if cfg.W_dtype == "float16":
            w = te.placeholder((cfg.N, cfg.K), "float16", name="W")
        else:
            w = te.placeholder((cfg.N, cfg.K // 2), "uint8", name="W")
        arguments = [a, w]
        if cfg.with_scaling:
            arguments.append(te.placeholder((cfg.N, cfg.num_groups), cfg.scale_dtype, name="scale"))

        def value(n, k):
            if cfg.W_dtype == "float16":
                return w[n, k].astype("float32")
            code = (w[n, k // 2] >> (k % 2 * 4).astype("uint8")) & te.const(15, "uint8")
            code = code.astype("float32")
            return code * arguments[2][n, k // cfg.group].astype("float32") if cfg.with_scaling else code

        product = te.compute(
            (m, cfg.N), lambda i, n: te.sum(a[i, k].astype("float32") * value(n, k), axis=k), name="product"
        )
        out = te.compute((m, cfg.N), lambda i, n: product[i, n].astype(cfg.out_dtype), name="out")
        arguments.append(out)
        if tiling.partial_rows:
            arguments += [te.placeholder((te.var("p"),), "float32", name="partial")]
            arguments += [te.placeholder((te.var("c"),), "int32", name="counters")]
        schedule = s_tir.Schedule(te.create_prim_func(arguments))
        block = schedule.get_sblock("out")
        row, column = schedule.get_loops(block)
        outer, thread = schedule.split(column, [None, THREADS])
        for loop, axis in ((row, "blockIdx.y"), (outer, "blockIdx.x"), (thread, "threadIdx.x")):
            schedule.bind(loop, axis)
        schedule.compute_at(schedule.get_sblock("product"), thread)
        schedule.set_scope(schedule.get_sblock("product"), 0, "local")
        return schedule.mod["main"].with_attr("global_symbol", str(func.attrs["global_symbol"]))


@contextmanager
def naive_rules():
    """Let cards have this rule only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitblas.schedule.RULES", (NaiveRule(),))
        patch.setattr("bitblas.plan.RULES", (NaiveRule(),))
        patch.setitem(bitblas.schedule._TILINGS, "naive", NaiveTiling)
        patch.setattr("bitblas.schedule.cuda_layout", _packed)
        yield


def _packed(config, target):
    return PackedLayout(config.N, config.K, config.format.bits, "packed")


__all__ = ["NaiveRule", "NaiveTiling", "Problem", "naive_rules"]
