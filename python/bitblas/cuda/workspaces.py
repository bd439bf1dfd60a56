"""Memory that kernels share sums in, where K is split among blocks: one pair of tensors for each device and stream."""

from __future__ import annotations

import torch

from . import driver

#: Counters that a captured graph gets, and how many such slices of zeros are made at once; below the last, more are.
SLICE, SLICES, FEW_SLICES = 4096, 64, 16


class Workspaces:
    """Pairs of (sums, counters): float32 of any content, and int32 that are 0 before and after each kernel, both flat.

    Kernels on one stream run one after the other, so that they can share a pair; it grows, and what was there before is freed
    in the order of the stream. A captured graph is another matter: it runs at any time, on any stream, and what it captured
    does not run before. So each capture has, for each of its streams, counters of its own, for ever: a slice of a tensor that
    an earlier call has zeroed, and waited for; where there has been none, or no slice is large enough, zeros whose filling is
    part of the graph. Its sums come from the graph's own memory, and are free for the graph after each kernel.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._slices: dict[int, list[torch.Tensor]] = {}
        self._captured: dict[
            tuple[int, int], tuple[int, torch.Tensor]
        ] = {}  # the last capture of a stream, its counters

    def get(self, device: int, num_sums: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a kernel on a device's current stream may use: at least so many elements of each."""
        stream = driver.current_stream(device)
        if driver.is_capturing(device):
            return self._while_capturing(device, stream, num_sums, num_counters)
        pair = self._pairs.get((device, stream))
        if pair is None or pair[0].numel() < num_sums or pair[1].numel() < num_counters:
            pair = self._grow(device, stream, num_sums, num_counters)
        if len(self._slices.get(device, ())) < FEW_SLICES:
            self._make_slices(device)
        return pair

    def _grow(self, device: int, stream: int, num_sums: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
        place = driver.place(device)
        sums, counters = self._pairs.get((device, stream), (None, None))
        if sums is None or sums.numel() < num_sums:
            sums = torch.empty(_rounded(num_sums), dtype=torch.float32, device=place)
        if counters is None or counters.numel() < num_counters:
            counters = torch.zeros(_rounded(num_counters), dtype=torch.int32, device=place)
        self._pairs[device, stream] = sums, counters
        return sums, counters

    def _make_slices(self, device: int) -> None:
        """Have zeros ready for captures, which cannot make any before they run."""
        zeros = torch.zeros(SLICES, SLICE, dtype=torch.int32, device=driver.place(device))
        driver.synchronize(device)  # a graph may run on another stream, as soon as it is captured
        self._slices.setdefault(device, []).extend(zeros.unbind())

    def _while_capturing(
        self, device: int, stream: int, num_sums: int, num_counters: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place = driver.place(device)
        sums = torch.empty(num_sums, dtype=torch.float32, device=place)
        capture = driver.capture_id(stream)
        known, counters = self._captured.get((device, stream), (0, None))
        if counters is None or known != capture:
            counters = None
            if capture and num_counters <= SLICE and self._slices.get(device):
                counters = self._slices[device].pop()
                self._captured[device, stream] = capture, counters
        if counters is None or counters.numel() < num_counters:
            return sums, torch.zeros(num_counters, dtype=torch.int32, device=place)
        return sums, counters


def _rounded(count: int) -> int:
    return 1 << max(10, (count - 1).bit_length())


#: Those of this process.
workspaces = Workspaces()
