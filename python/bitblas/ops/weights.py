"""The weights of an operator: from values and codes to what its kernels read, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .. import packing
from ..config import MatmulConfig
from ..dequantization import BLOCK_ROWS, dequantize, unpack_zeros
from ..errors import ArgumentError
from ..layout import PackedLayout
from ..plan import MatmulPlan
from .arguments import check_dense


class WithWeights:
    """What an operator with a config and a plan can do with weights."""

    config: MatmulConfig
    plan: MatmulPlan

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

        The order of the bits is for this operator, and for others of the same `layout`: that depends on the target. What is to
        be kept for other machines is the codes (`unpack_weight`, and there `pack`).

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
        if weight.element_size() * weight.numel() != self.layout.num_bytes:
            raise ArgumentError(f"weight has dtype {weight.dtype}; it must be what transform_weight returned")
        return packing.unpack(weight.detach(), self.layout)

    def weight_blocks(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        rows: int = BLOCK_ROWS,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """What a weight in this operator's layout stands for, some rows of N at a time.

        Parameters
        ----------
        weight, scale, zeros : torch.Tensor
            As they are handed over at a call; a scale and zeros of shape (N,) as (N, 1), one number for all in any shape.
        rows : int
            How many to decode at once.

        Yields
        ------
        (slice, torch.Tensor)
            Rows, and their values, (rows, K) float32.
        """
        config = self.config
        codes = self.unpack_weight(weight)
        points = zeros.reshape(config.N, -1) if zeros is not None and not config.zeros_packed else zeros
        if points is not None and config.zeros_packed:
            points = unpack_zeros(points, config.N, config.format.bits)
        scales = None if scale is None else scale.detach().reshape(-1, config.num_groups).expand(config.N, -1)
        for first in range(0, config.N, rows):
            place = slice(first, min(first + rows, config.N))
            factors, shifts = (None if t is None else t[place] for t in (scales, points))
            yield place, dequantize(codes[place], config.format, factors, shifts, config.zeros_mode)

    def dequantize(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """The (N, K) values, of `dtype`, of a weight in this operator's layout; parameters as of `weight_blocks`."""
        out = torch.empty((self.config.N, self.config.K), dtype=dtype, device=weight.device)
        for place, values in self.weight_blocks(weight, scale, zeros):
            out[place] = values
        return out

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
            check_dense("codes", codes)
            codes = codes.view(torch.uint8) if codes.dtype is torch.int8 else codes
            return self.pack(codes ^ 128 if signed_bytes else codes)

        return transform
