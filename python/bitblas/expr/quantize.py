"""How float activations become int8 on the fly: one scale for each row, or for each row and group of k."""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack, unpack
from typing import Any

from tvm import te, tirx
from tvm.ir import Expr

from ..config import LEAST_EPS, MatmulConfig
from .absmax import absmax_bits
from .decode import float_of_bits
from .storage import widen

#: The largest value of a quantized activation; -128 is not used.
_LARGEST = 127.0


@dataclass(frozen=True)
class Quantizer:
    """How the rows of A are quantized.

    With the largest magnitude of a row's group, `absmax`, as the bits of a float32, which are ordered like the values, and NaN
    above all, and eps that of the config::

        activation_scale[i, g] = max(absmax[i, g], eps) / 127
        activation[i, k]       = a / activation_scale[i, k / group] to nearest, ties to even; 0 where that is NaN

    An infinity or a NaN makes its whole group 0, beside a scale that is infinite or NaN: their product is NaN.

    Attributes
    ----------
    scale : te.Tensor
        activation_scale, float32 (rows, groups).
    group : int
        Consecutive k that share them.
    threads : bool
        See `bitblas.expr.MatmulExpr`.
    """

    scale: te.Tensor
    group: int
    threads: bool = False

    def quantize(self, value: Expr, i: Expr, k: Expr) -> Expr:
        """The whole number, as a float32 from -127 to 127, that stands for the float32 `value` of A in row i at k."""
        scaled = value / self.scale[i, self.group_of(k)]
        # of a NaN no integer is made, which nobody defines; TVM vectorizes neither isnan nor its own nearbyint
        number = scaled >= tirx.const(-_LARGEST - 1, "float32")
        whole = (
            tirx.nearbyint(scaled) if self.threads else tirx.call_llvm_pure_intrin("float32", "llvm.nearbyint", scaled)
        )
        return tirx.Select(number, whole, tirx.const(0.0, "float32"))

    def group_of(self, k: Expr) -> Expr:
        """The group of k."""
        return k // self.group if self.scale.shape[1] != 1 else 0


def quantizer(config: MatmulConfig, A: te.Tensor, rows: Any, threads: bool = False) -> Quantizer:
    """Blocks absmax_lanes, absmax and activation_scale for A (m, K); rows beyond M repeat the last."""
    groups = config.activation_groups
    group = config.K // groups

    def value(i: Expr, k: Expr) -> Expr:
        return widen(A[te.min(i, A.shape[0] - 1), k])

    bits = absmax_bits(value, rows, groups, group, threads)

    # both by way of their bits: a division by a constant would be turned into a product, which rounds otherwise
    least = tirx.const(_bits(LEAST_EPS if config.activation_eps is None else config.activation_eps), bits.dtype)
    largest = float_of_bits(_bits(_LARGEST), threads)

    def scale(i: Expr, g: Expr) -> Expr:
        return tirx.reinterpret("float32", te.max(bits[i, g], least)) / largest

    return Quantizer(te.compute((rows, groups), scale, name="activation_scale"), group, threads)


def _bits(value: float) -> int:
    """The bits of a float32."""
    return int(unpack("<i", pack("<f", value))[0])
