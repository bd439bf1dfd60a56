"""What weights are scaled and shifted by: scales and zero points, as blocks over groups and columns."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import te, tirx
from tvm.ir import Expr

from ..config import MatmulConfig
from .storage import placed_dtype, widen
from .streams import stream_code


@dataclass(frozen=True)
class Factors:
    """The scales and zero points of a config.

    Attributes
    ----------
    config : MatmulConfig
        The question.
    padded_n : int
        How many columns blocks have; those beyond N repeat the last.
    threads : bool
        See `bitblas.expr.MatmulExpr`.
    """

    config: MatmulConfig
    padded_n: int
    threads: bool

    def column(self, n: Expr) -> Expr:
        """Column n, or the last one for those that pad the last tile."""
        return n if self.padded_n == self.config.N else te.min(n, self.config.N - 1)

    def scale(self) -> tuple[te.Tensor, te.Tensor]:
        """The argument S, and block scale, (groups, padded N) float32."""
        cfg = self.config
        S = te.placeholder(cfg.scale_shape, placed_dtype(cfg.scale_dtype, self.threads), name="S")

        def scale(g: Expr, n: Expr) -> Expr:
            return widen(S[0] if cfg.scale_per_tensor else S[self.column(n), g])

        return S, te.compute((cfg.num_groups, self.padded_n), scale, name="scale")

    def zero(self) -> tuple[te.Tensor, te.Tensor]:
        """The argument Z, and block zero, (groups, padded N) float32."""
        cfg, bits = self.config, self.config.format.bits
        shape = (cfg.num_groups, self.padded_n)
        if not cfg.zeros_packed:
            Z = te.placeholder((cfg.N, cfg.num_groups), placed_dtype(cfg.scale_dtype, self.threads), name="Z")
            return Z, te.compute(shape, lambda g, n: widen(Z[self.column(n), g]), name="zero")
        row_bytes = (cfg.N * bits + 7) // 8
        Z = te.placeholder((cfg.num_groups * row_bytes,), "int8", name="Z")

        def zero(g: Expr, n: Expr) -> Expr:
            code = stream_code(Z, g * row_bytes, self.column(n), bits, cfg.num_groups * row_bytes)
            return tirx.bitwise_and(code, tirx.const((1 << bits) - 1, "int32")).astype("float32")

        return Z, te.compute(shape, zero, name="zero")
