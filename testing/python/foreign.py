"""Packers for other projects' checkpoints, written from the documentation of their formats, with Python's integers.

They share no code with `bitblas`, nor with the projects. Sources: for GPTQ the tensors as AutoGPTQ describes them (codes along
K, zero points along N and stored minus one); for AWQ the order of columns in `gemm_pack` of AutoAWQ; for compressed-tensors the
documentation of `pack_to_int32`. Beside them, what a layer that was read has to be.
"""

from __future__ import annotations

import numpy as np
import torch

from bitblas.codecs import QuantizedWeight


def stream_words(codes: np.ndarray, bits: int) -> list[int]:
    """Words of 32 bits, signed, of a little-endian stream of codes; the last one is filled up with 0."""
    stream = 0
    for place, code in enumerate(codes.tolist()):
        assert 0 <= code < 1 << bits
        stream |= code << (place * bits)
    count = -(-len(codes) * bits // 32)
    words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(count)]
    return [word - (word >> 31 << 32) for word in words]


def pack_columns(codes: np.ndarray, bits: int) -> torch.Tensor:
    """(K, N) -> int32 (ceil(K·bits/32), N): a stream in each column."""
    columns = [stream_words(column, bits) for column in codes.T]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def pack_lines(codes: np.ndarray, bits: int) -> torch.Tensor:
    """(R, C) -> int32 (R, ceil(C·bits/32)): a stream in each row."""
    return torch.tensor([stream_words(row, bits) for row in codes], dtype=torch.int32)


def pack_gptq(
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    bits: int,
    version: int = 1,
    g_idx: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    """Tensors of a GPTQ layer.

    Parameters
    ----------
    codes : numpy.ndarray
        (N, K) integers, 0 to 2^bits - 1.
    zeros : numpy.ndarray
        (N, G) zero points; for version 1 at least 1.
    scales : numpy.ndarray
        (N, G).
    g_idx : numpy.ndarray, optional
        (K,); None: in order.
    """
    k, groups = codes.shape[1], scales.shape[1]
    g_idx = np.arange(k) // (k // groups) if g_idx is None else g_idx
    return {
        "qweight": pack_columns(codes.T, bits),
        "qzeros": pack_lines(zeros.T - (version == 1), bits),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)).to(torch.float16),
        "g_idx": torch.from_numpy(g_idx).to(torch.int32),
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, torch.Tensor]:
    """Tensors of an AWQ layer, version "gemm"; arguments as for `pack_gptq`, N a multiple of 8."""

    def interleaved(rows: np.ndarray) -> torch.Tensor:
        words = rows.reshape(rows.shape[0], -1, 8)[:, :, list(AWQ_ORDER)]
        return pack_lines(words.reshape(rows.shape[0], -1), 4)

    return {
        "qweight": interleaved(codes.T),
        "qzeros": interleaved(zeros.T),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)).to(torch.float16),
    }


def pack_compressed(
    codes: np.ndarray, zeros: np.ndarray | None, scales: np.ndarray, bits: int, g_idx: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of a "pack-quantized" layer; arguments as for `pack_gptq`, no `zeros` where it is symmetric."""
    found = {
        "weight_packed": pack_lines(codes, bits),
        "weight_scale": torch.from_numpy(scales).to(torch.bfloat16),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zeros is not None:
        found["weight_zero_point"] = pack_columns(zeros, bits)
    if g_idx is not None:
        found["weight_g_idx"] = torch.from_numpy(g_idx).to(torch.int32)
    return found


def values(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray | None = None) -> np.ndarray:
    """What such a layer multiplies with, (codes - zero point)·scale, float64 (N, K)."""
    k, groups = codes.shape[1], scales.shape[1]
    g_idx = np.arange(k) // (k // groups) if g_idx is None else g_idx
    return (codes.astype(np.float64) - zeros[:, g_idx]) * scales.astype(np.float64)[:, g_idx]


def draw(n, k, bits, groups, act_order=False, least_zero=1, seed=0):
    """(codes, zeros, scales, g_idx) of a layer; zero points from `least_zero` on."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = rng.integers(least_zero, 1 << bits, (n, groups))
    scales = rng.uniform(0.001, 0.1, (n, groups)).astype(np.float16)
    g_idx = np.arange(k) // (k // groups)
    return codes, zeros, scales, rng.permutation(g_idx) if act_order else g_idx


def row_bytes(codes, bits):
    """The packed form of rows of codes, by Python's integers."""
    size = -(-codes.shape[1] * bits // 8)
    return pack_lines(codes, bits).view(torch.int8)[:, :size]


def check(weight, codes, zeros, scales, g_idx, bits):
    """Fail unless `weight` is the layer: bytes, order and values.

    Parameters
    ----------
    weight : QuantizedWeight
        What a codec returned.
    scales : numpy.ndarray or torch.Tensor
        (N, G), what its scales have to be.
    """
    order = np.argsort(g_idx, kind="stable")
    identity = np.array_equal(order, np.arange(len(order)))
    assert isinstance(weight, QuantizedWeight)
    assert (weight.out_features, weight.in_features) == codes.shape
    assert torch.equal(weight.scales, scales if isinstance(scales, torch.Tensor) else torch.from_numpy(scales))
    assert (weight.perm is None) if identity else weight.perm.tolist() == order.tolist()
    assert torch.equal(weight.packed, row_bytes(codes[:, order] ^ (128 if weight.W_dtype == "int8" else 0), bits))
    expected = torch.from_numpy(values(codes, zeros, weight.scales.float().numpy(), g_idx))
    assert torch.equal(weight.dequantize(torch.float64), expected)  # at most 20 bits: nothing is rounded


def pack_bitnet(values: np.ndarray) -> torch.Tensor:
    """Ternary values, (N, K), as transformers stores them, uint8 (ceil(N/4), K), by Python's integers.

    Its documentation: each value plus 1 takes two bits; the rows are cut into four parts of ceil(N/4), of which the first takes
    the lowest two bits of the bytes, the second the next, and so on.
    """
    n, k = values.shape
    height = -(-n // 4)
    out = [[0] * k for _ in range(height)]
    for row in range(n):
        part, line = divmod(row, height)
        for column, value in enumerate(values[row].tolist()):
            assert value in (-1, 0, 1)
            out[line][column] |= (value + 1) << 2 * part
    return torch.tensor(out, dtype=torch.uint8)
