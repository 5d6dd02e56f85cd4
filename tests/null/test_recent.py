"""What happened lately, against a plain list of all that happened."""

import random

import pytest

from strop.serve.recent import Recent, RecentDurations


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_sums_and_rates_are_of_the_last_seconds() -> None:
    clock = Clock()
    recent = Recent(clock)
    happened = []
    chance = random.Random(1)
    for _ in range(2000):
        clock.now_s += chance.choice((0.0, 0.01, 0.3))
        recent.add(chance.choice("ab"), 2.0)
        happened.append((clock.now_s, 2.0))
    for seconds in (0.5, 3.0, 59.0):
        total = sum(recent.sums(seconds).values())
        least, most = (sum(n for at, n in happened if at >= clock.now_s - s) for s in (seconds, seconds + 0.5))
        assert least <= total <= most
    clock.now_s += 30
    assert not recent.sums(25.0)
    assert recent.rate_per_s("a", 25.0) == 0.0


def test_a_steady_flow_has_its_rate() -> None:
    clock = Clock()
    recent = Recent(clock)
    for _ in range(1000):
        clock.now_s += 0.02
        recent.add("tokens", 3.0)
        if clock.now_s > 1010:
            assert recent.rate_per_s("tokens", 2.0) == pytest.approx(150, rel=0.05)


def test_nothing_is_kept_for_more_than_a_minute() -> None:
    clock = Clock()
    recent = Recent(clock)
    for _ in range(10_000):
        clock.now_s += 0.5
        recent.add("a")
    assert sum(recent.sums(1e9).values()) <= 122


def test_percentiles_are_close_to_those_of_all_durations() -> None:
    chance = random.Random(2)
    durations = RecentDurations(Clock())
    assert durations.percentile_s(0.5, 10.0) is None
    values = sorted(chance.lognormvariate(-4, 1) for _ in range(5000))
    for value in values:
        durations.observe(value)
    for share in (0.01, 0.5, 0.95, 0.99, 1.0):
        assert durations.percentile_s(share, 10.0) == pytest.approx(values[round(share * 5000) - 1], rel=0.03)
    durations.observe(0.0)  # a clock that stands still is no error
