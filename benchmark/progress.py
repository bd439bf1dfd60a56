"""How long a run will take, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

from bitblas import MatmulConfig

#: Of the estimate, which the run itself corrects: drawing and packing operands for each candidate and weight of 4096 × 4096,
#: and a slow peer's multiply-accumulates a second.
_SETUP_SECONDS, _HEADLINE, _SLOW_RATE = 0.35, 4096 * 4096, 5e10
#: Calls that a candidate gets at least, and how long a turn takes beside the calls that count.
_CALLS, _TURN_FACTOR = 7, 3.0


def estimate(config: MatmulConfig, m: int, num_peers: int, seconds: float) -> float:
    """Seconds that a cell will take, about."""
    size = config.N * config.K
    setup = _SETUP_SECONDS * size / _HEADLINE
    each = max(_TURN_FACTOR * seconds, _CALLS * m * size / _SLOW_RATE)
    # some half of the peers do not serve a cell; the ceilings do
    return (1 + num_peers / 2) * (setup + each) + 3 * _TURN_FACTOR * seconds


class Progress:
    """A bar over the estimated seconds, and a line for each cell.

    Parameters
    ----------
    seconds : float
        Estimated for all cells.
    cells : int
        Their number.
    say : callable
        Takes the lines.
    """

    def __init__(self, seconds: float, cells: int, say: Callable[[str], None]) -> None:
        from tqdm.auto import tqdm

        self._total, self._done, self._began = seconds, 0.0, time.monotonic()
        self._cells, self.cells_left, self._say = cells, cells, say
        say(f"{cells} cells, about {_minutes(seconds)}")
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
        self._bar = tqdm(total=seconds, desc=f"0/{cells} cells", bar_format=layout, disable=None, leave=False)

    def advance(self, seconds: float, line: str) -> None:
        """A cell that was estimated at so many seconds is done."""
        self._done += seconds
        self.cells_left -= 1
        spent = time.monotonic() - self._began
        left = spent * max(0.0, self._total / self._done - 1)
        self._bar.clear()
        self._say(f"[{self._cells - self.cells_left}/{self._cells}, {_minutes(left)} left] {line}")
        self._bar.set_description(f"{self._cells - self.cells_left}/{self._cells} cells", refresh=False)
        self._bar.update(seconds)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
