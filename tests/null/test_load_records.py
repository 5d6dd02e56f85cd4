"""From times to figures: latencies, percentiles, objectives, throughput, cost."""

import pytest

from strop.bench.serve.load import Lengths
from strop.bench.serve.records import Objective, Record, Spread, parse_objective, spread, summarize, tokens_over_time
from strop.core.errors import RequestError


def record(sent_s: float, chunk_s: list[float], end_s: float | None, **more: object) -> Record:
    return Record(Lengths(10, 4), sent_s=sent_s, chunk_s=chunk_s, end_s=end_s, **more)  # type: ignore[arg-type]


GOOD = record(1.0, [1.5, 1.75, 2.25], 2.5, prompt_tokens=10, output_tokens=4, cached_tokens=5)
FAST = record(0.5, [0.625, 0.75], 0.75, prompt_tokens=10, output_tokens=2)
FAILED = record(1.0, [1.25], 4.5, failure=("HTTP 500", "oh"))
CUT_OFF = record(4.0, [4.25], None)


def test_latencies_of_one_request() -> None:
    assert GOOD.ttft_s == 0.5
    assert GOOD.itl_s == [0.25, 0.5]
    assert GOOD.tpot_s == 0.25  # three tokens after the first, in two chunks
    assert GOOD.e2e_s == 1.5
    assert record(0, [1.0], 1.0).tpot_s is None
    assert record(0, [1.0, 2.0], 2.0).num_tokens == 2  # no usage: its chunks


def test_percentiles_interpolate() -> None:
    assert spread([]) is None
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)
    found = spread([float(i) for i in range(100, -1, -1)])
    assert found == Spread(50.0, 50.0, 90.0, 99.0)
    assert spread([0.0, 1.0]) == Spread(0.5, 0.5, pytest.approx(0.9), pytest.approx(0.99))


def test_a_summary_counts_everything_and_measures_what_was_answered() -> None:
    found = summarize([GOOD, FAST, FAILED, CUT_OFF], Objective(ttft=0.2), price_per_hour=9.0)
    assert (found.num_requests, found.num_complete, found.num_cut_off, found.failures) == (4, 2, 1, {"HTTP 500": 1})
    assert found.duration_s == 4.0  # a failure takes its time
    assert found.output_tokens_per_s == 1.5
    assert found.requests_per_minute == 30.0
    assert found.ttft_s is not None and found.ttft_s.mean == 0.3125
    assert found.itl_s is not None and found.itl_s.mean == pytest.approx((0.25 + 0.5 + 0.125) / 3)
    assert found.good_requests_per_minute == 15.0
    assert found.good_share == pytest.approx(1 / 3)  # the failure counts, the request cut off does not
    assert found.cost_per_request == pytest.approx(9.0 * 4 / 3600 / 2)
    assert found.cost_per_million_output_tokens == pytest.approx(1e6 * 9.0 * 4 / 3600 / 6)
    assert (found.prompt_tokens, found.output_tokens, found.cached_share) == (10, 3, 0.25)
    assert found.tokens_per_chunk == 1.2
    assert found.num_short == 1


def test_a_summary_of_nothing_has_no_figures() -> None:
    for records in ([], [CUT_OFF]):
        found = summarize(records, Objective(), 1.0)
        assert found.ttft_s is found.itl_s is found.e2e_s is found.cost_per_request is None
        assert found.output_tokens_per_s == found.requests_per_minute == 0.0
    found = summarize([FAILED], None, None)
    assert found.failures == {"HTTP 500": 1}
    assert found.good_requests_per_minute is found.cost_per_request is None


@pytest.mark.parametrize(
    ("text", "is_met"),
    [
        ("ttft=500ms", True),
        ("ttft=499ms", False),
        ("itl=0.5s", True),
        ("itl=400ms", False),
        ("tpot=250ms,ttft=1s", True),
        ("tpot=249ms", False),
        ("e2e=1.5s,itl=500ms,ttft=0.5s", True),
        ("e2e=1.4s,itl=500ms", False),
    ],
)
def test_an_objective_needs_all_its_limits(text: str, is_met: bool) -> None:
    assert parse_objective(text).is_met(GOOD) is is_met
    assert not parse_objective(text).is_met(FAILED)


def test_a_request_of_one_chunk_has_no_gap_to_miss() -> None:
    assert parse_objective("itl=1ms,tpot=1ms").is_met(record(0, [1.0], 1.0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ttft",
        "ttft=200",
        "ttft=-1ms",
        "ttft=0s",
        "ttft=nans",
        "ttft=infs",
        "ttft=1ms,ttft=2ms",
        "p99=1s",
        "itl=1ms;e2e=1s",
    ],
)
def test_a_malformed_objective_is_refused(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"--objective .* is not a limit: give one each for some of ttft, itl, tpot, e2e"
    ):
        parse_objective(text)


def test_tokens_over_time_add_up() -> None:
    rates = tokens_over_time([GOOD, FAST], 0.5, 5)
    assert rates == [0.0, pytest.approx(2 * 2), 0.0, pytest.approx(2 * 8 / 3), pytest.approx(2 * 4 / 3)]
    assert sum(rates) * 0.5 == pytest.approx(6)
