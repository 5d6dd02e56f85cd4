"""What happened in the last minute, kept at a cost that does not grow with how much it was."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable

_BIN_S = 0.5
_STEP = math.log(1.05)  # durations within 2.5 % of each other count as one

Clock = Callable[[], float]
"""Seconds since some moment."""


class Recent:
    """Amounts of the last minute, by key."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._bins: deque[tuple[int, defaultdict[str | int, float]]] = deque(maxlen=math.ceil(60 / _BIN_S) + 1)

    def add(self, key: str | int, amount: float = 1.0) -> None:
        """So much of it, now."""
        number = int(self._clock() / _BIN_S)
        if not self._bins or self._bins[-1][0] != number:
            self._bins.append((number, defaultdict(float)))
        self._bins[-1][1][key] += amount

    def sums(self, seconds: float) -> dict[str | int, float]:
        """Of the last `seconds`, and of up to half a second before; a key that is absent had none."""
        oldest = int((self._clock() - seconds) / _BIN_S)
        sums: dict[str | int, float] = defaultdict(float)
        for number, amounts in self._bins:
            if number >= oldest:
                for key, amount in amounts.items():
                    sums[key] += amount
        return sums

    def rate_per_s(self, key: str | int, seconds: float) -> float:
        """How much a second, lately."""
        now_s = self._clock()
        began_s = int((now_s - seconds) / _BIN_S) * _BIN_S
        return self.sums(seconds).get(key, 0.0) / (now_s - began_s)


class RecentDurations:
    """Percentiles of the durations of the last minute, within 2.5 %."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._recent = Recent(clock)

    def observe(self, duration_s: float) -> None:
        """Something took so long."""
        self._recent.add(round(math.log(max(duration_s, 1e-6)) / _STEP))

    def percentile_s(self, share: float, seconds: float) -> float | None:
        """What `share` (0 to 1) of the durations of the last `seconds` did not exceed; None if there were none."""
        counts = sorted((int(key), count) for key, count in self._recent.sums(seconds).items())
        wanted = share * sum(count for _, count in counts)
        for key, count in counts:
            wanted -= count
            if wanted <= 1e-9:
                return math.exp(key * _STEP)
        return None
