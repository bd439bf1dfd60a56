"""Many rows: a kernel decodes the weights to a matrix, torch multiplies, and the matrix may be kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..config import MatmulConfig
from . import driver


@dataclass(frozen=True)
class _Kept:
    """A decoded matrix, what it was made from, on which stream, and when that has happened."""

    matrix: torch.Tensor
    sources: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[tuple[int, int], ...]
    stream: int
    done: torch.cuda.Event | None

    def is_of(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether it was made from these tensors as they are now; identity alone does not tell, nor does an address."""
        same = all(ref() is source for ref, source in zip(self.sources, sources, strict=True))
        return same and self.versions == _versions(sources)


def _versions(sources: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((source.data_ptr(), source._version) for source in sources)


class DenseMatmul:
    """A function (A, W, [scale], [zeros], [bias], out), of A (m, K), that computes A · dequantize(W)ᵀ + bias by torch.

    The decoded matrix, N·K elements of A's dtype, comes from torch's allocator and returns to it after the call, unless it is
    kept: then until one of W, scale and zeros is changed in place, or dies. While a graph is being captured nothing is kept
    and nothing that was kept is used: the graph decodes the weights that are there when it runs.

    Parameters
    ----------
    decode : callable or None
        The kernel (W, [scale], [zeros], dense); None where the weights are that matrix already.
    config : MatmulConfig
        Of the kernels.
    keep : bool
        Whether to keep the decoded matrix.
    """

    def __init__(self, decode: Callable[..., None] | None, config: MatmulConfig, keep: bool = False) -> None:
        self._decode, self._config, self._keep = decode, config, keep
        self._dtype: torch.dtype = getattr(torch, config.A_dtype)
        self._num_extras = config.with_scaling + config.with_zeros
        self._kept: dict[int, _Kept] = {}  # by id(W)

    def keeping(self) -> DenseMatmul:
        """The same function, which keeps what it decodes."""
        return DenseMatmul(self._decode, self._config, keep=True)

    def __call__(self, a: torch.Tensor, w: torch.Tensor, *others: torch.Tensor) -> None:
        *given, out = others
        extras, bias = given[: self._num_extras], given[self._num_extras :]
        with torch.no_grad():
            dense = self._dense(w, extras).t()
            if bias:
                torch.addmm(bias[0].to(out.dtype), a, dense, out=out)
            else:
                torch.mm(a, dense, out=out)

    def _dense(self, w: torch.Tensor, extras: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._decode is None:
            return w.view(self._config.N, self._config.K)
        sources = (w, *extras)
        if not self._keep or any(source.is_inference() for source in sources):  # whose changes nobody counts
            return self._decoded(w, extras)
        device = w.get_device()
        if device >= 0 and driver.is_capturing(device):
            return self._decoded(w, extras)
        stream = driver.current_stream(device) if device >= 0 else 0
        known = self._kept.get(id(w))
        if known is not None and known.is_of(sources):
            return _on_stream(known, stream, device)
        matrix, done = self._decoded(w, extras), None
        if device >= 0:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
        refs = tuple(weakref.ref(source, self._dropper(id(w))) for source in sources)
        self._kept[id(w)] = _Kept(matrix, refs, _versions(sources), stream, done)
        return matrix

    def _dropper(self, key: int) -> Callable[[object], object]:
        kept = self._kept  # and not this object, which it would keep alive
        return lambda _dead: kept.pop(key, None)

    def _decoded(self, w: torch.Tensor, extras: Sequence[torch.Tensor]) -> torch.Tensor:
        matrix = torch.empty(self._config.N, self._config.K, dtype=self._dtype, device=w.device)
        assert self._decode is not None
        self._decode(w, *extras, matrix)
        return matrix


def _on_stream(kept: _Kept, stream: int, device: int) -> torch.Tensor:
    """The matrix, to be read on a stream: another than where it was made waits for it, and its memory for that stream."""
    if stream != kept.stream and kept.done is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(kept.done)
        kept.matrix.record_stream(current)
    return kept.matrix
