"""Words of queries, keys, values and weights, as the products of an attention take them. Importing this imports TVM.

A word is what one lane multiplies at once: one float32, or two bfloat16 that are summed over. *Along* a row, a word's elements
are side by side; *across* rows, they are those of consecutive rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...expr.pairs import PAIR, join_pair
from .products import BF16_LIBRARY
from .transpose import transpose_function

#: From the place of an element in a row to the indices of a tensor.
Row = Callable[[Expr], list[Expr]]


#: bfloat16 as float32. TVM takes a bfloat16 in the value of a variable for the integer that holds it.
_WIDEN = """
define linkonce_odr hidden <LANES x float> @bitblas_widen(ptr %a) alwaysinline {
  %v = load <LANES x i16>, ptr %a, align 2
  %w = zext <LANES x i16> %v to <LANES x i32>
  %s = shl <LANES x i32> %w, splat (i32 16)
  %r = bitcast <LANES x i32> %s to <LANES x float>
  ret <LANES x float> %r
}
"""

_PAIRS = (
    BF16_LIBRARY
    + """
define linkonce_odr hidden <16 x i32> @bitblas_pairs_along(ptr %a) alwaysinline {
  %r = load <16 x i32>, ptr %a, align 2
  ret <16 x i32> %r
}
define linkonce_odr hidden <16 x i32> @bitblas_halves(ptr %a) alwaysinline {
  %v = load <16 x i16>, ptr %a, align 2
  %r = zext <16 x i16> %v to <16 x i32>
  ret <16 x i32> %r
}
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define linkonce_odr hidden <16 x i32> @bitblas_round_pairs(<16 x float> %low, <16 x float> %high) alwaysinline {
  %c = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %v = bitcast <32 x bfloat> %c to <32 x i16>
  %p = shufflevector <32 x i16> %v, <32 x i16> poison, <32 x i32> <ORDER>
  %r = bitcast <32 x i16> %p to <16 x i32>
  ret <16 x i32> %r
}
""".replace("ORDER", ", ".join(f"i32 {i // 2 + i % 2 * 16}" for i in range(32)))
)


class FloatOperands:
    """Words of one float32, from elements of any float dtype."""

    depth = 1
    dtype = "float32"
    #: Whether queries are scaled as they are taken; else scores are.
    scales_queries = True

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    @property
    def library(self) -> str:
        """Functions that the program calls, as LLVM IR."""
        return _WIDEN.replace("LANES", str(self.lanes)) + transpose_function(self.lanes)

    def _call(self, dtype: str, name: str, *arguments: Expr) -> Expr:
        return tirx.call_pure_extern(f"{dtype}x{self.lanes}", f"bitblas_{name}", *arguments)

    def along(self, tensor: tirx.Buffer, row: Row, word: Expr) -> Expr:
        """A vector of words of one row, from `word` on."""
        if str(tensor.dtype) == "bfloat16":
            return self._call("float32", "widen", B.address_of(tensor[tuple(row(word))]))
        return tensor.vload(row(word), f"{tensor.dtype}x{self.lanes}").astype(f"float32x{self.lanes}")

    def one_along(self, tensor: tirx.Buffer, row: Row, word: Expr, size: int = 1) -> Expr:
        """One word of a row, of which only `size` elements are there."""
        return tensor[tuple(row(word))].astype("float32")

    def across(self, tensor: tirx.Buffer, rows: Sequence[Row], place: Expr) -> Expr:
        """A vector of words, side by side, of one or `depth` rows."""
        return self.along(tensor, rows[0], place)

    def one_across(self, tensor: tirx.Buffer, rows: Sequence[Row], place: Expr) -> Expr:
        """One word of one or `depth` rows."""
        return self.one_along(tensor, rows[0], place)

    def weights(self, values: Sequence[Expr]) -> Expr:
        """A vector of words of `depth` vectors of float32."""
        return values[0]

    def add_product(self, total: Expr, left: Expr, right: Expr) -> Expr:
        """The products of two vectors of words, added to float32."""
        return total + left * right

    def add_weights(self, total: Expr, words: Expr) -> Expr:
        """The elements of a vector of words, added to float32."""
        return total + words


class PairOperands(FloatOperands):
    """Words of two bfloat16, sixteen of them in a register, that one instruction multiplies: see `PAIR_UNITS`."""

    depth = PAIR
    dtype = "int32"
    scales_queries = False

    @property
    def library(self) -> str:
        """See `FloatOperands`."""
        return _PAIRS + transpose_function(self.lanes)

    def along(self, tensor: tirx.Buffer, row: Row, word: Expr) -> Expr:
        """See `FloatOperands`."""
        return self._call("int32", "pairs_along", B.address_of(tensor[tuple(row(word * PAIR))]))

    def one_along(self, tensor: tirx.Buffer, row: Row, word: Expr, size: int = PAIR) -> Expr:
        """See `FloatOperands`."""
        low = tensor[tuple(row(word * PAIR))].astype("float32")
        high = tensor[tuple(row(word * PAIR + 1))].astype("float32") if size == PAIR else tirx.const(0.0, "float32")
        return join_pair(low, high)

    def across(self, tensor: tirx.Buffer, rows: Sequence[Row], place: Expr) -> Expr:
        """See `FloatOperands`."""
        halves = [self._call("int32", "halves", B.address_of(tensor[tuple(row(place))])) for row in rows]
        if len(halves) == 1:
            return halves[0]
        sixteen = tirx.Broadcast(tirx.const(16, "int32"), self.lanes)
        return tirx.bitwise_or(halves[0], tirx.shift_left(halves[1], sixteen))

    def one_across(self, tensor: tirx.Buffer, rows: Sequence[Row], place: Expr) -> Expr:
        """See `FloatOperands`."""
        found = [tensor[tuple(row(place))].astype("float32") for row in rows]
        return join_pair(found[0], found[1] if len(found) == PAIR else tirx.const(0.0, "float32"))

    def weights(self, values: Sequence[Expr]) -> Expr:
        """See `FloatOperands`; each rounded to nearest."""
        return self._call("int32", "round_pairs", *values)

    def add_product(self, total: Expr, left: Expr, right: Expr) -> Expr:
        """See `FloatOperands`."""
        return self._call("float32", "dpbf16ps", total, left, right)

    def add_weights(self, total: Expr, words: Expr) -> Expr:
        """See `FloatOperands`; those that were rounded, so that weights add up to what they are divided by."""
        return self.add_product(total, words, tirx.Broadcast(tirx.const(0x3F803F80, "int32"), self.lanes))
