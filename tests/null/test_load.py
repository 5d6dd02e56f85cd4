"""When requests arrive: traces, Poisson arrivals, closed loops."""

from pathlib import Path

import numpy as np
import pytest

from strop.bench.serve.load import ClosedLoop, Lengths, Poisson, Trace, read_trace
from strop.core.errors import RequestError

HEADER = "time_s,prompt_tokens,output_tokens\n"


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_trace_starts_at_zero_and_keeps_its_lengths(tmp_path: Path) -> None:
    arrivals = read_trace(written(tmp_path, HEADER + "100.5,10,20\n100.5,1,2\r\n102,7,8"))
    assert [(one.time_s, one.lengths) for one in arrivals] == [
        (0.0, Lengths(10, 20)),
        (0.0, Lengths(1, 2)),
        (1.5, Lengths(7, 8)),
    ]
    assert Trace("t", arrivals).arrivals(seed=1) == list(arrivals)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1 is ''"),
        ("time,prompt_tokens,output_tokens\n", r"line 1 is 'time,"),
        (HEADER, "no arrivals"),
        (HEADER + "0,1,1\n1,,1\n", r"line 3 is '1,,1': it needs 3 cells, none of them empty"),
        (HEADER + "0,1,1\n\n1,1,1\n", "line 3"),
        (HEADER + "0,1\n", "line 2"),
        (HEADER + "0,1,1,1\n", "line 2"),
        (HEADER + "0,1,1\n-0.5,1,1\n", r"line 3: 'time_s' is '-0.5'"),
        (HEADER + "nan,1,1\n", "line 2: 'time_s'"),
        (HEADER + "inf,1,1\n", "line 2: 'time_s'"),
        (HEADER + "soon,1,1\n", "line 2: 'time_s'"),
        (HEADER + "0,1,1\n2,1,1\n1,1,1\n", r"line 4: 'time_s' is 1, earlier .* sort the file"),
        (HEADER + "0,0,1\n", r"line 2: 'prompt_tokens' is '0'"),
        (HEADER + "0,1,1.5\n", r"line 2: 'output_tokens' is '1.5'"),
        (HEADER + "0,1,-1\n", r"line 2: 'output_tokens'"),
        (HEADER + "0,1,²\n", r"line 2: 'output_tokens'"),
        (HEADER.encode() + b"0,1,\xff\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_trace(written(tmp_path, text))


def test_an_absent_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.csv cannot be read \(No such file"):
        read_trace(tmp_path / "none.csv")


def test_poisson_gaps_are_exponential_and_seeded() -> None:
    load = Poisson(4.0, 20_000, (Lengths(1, 1),))
    times_s = np.array([one.time_s for one in load.arrivals(seed=3)])
    gaps_s = np.diff(times_s)
    assert times_s[0] == 0
    assert gaps_s.min() >= 0
    assert gaps_s.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps_s.std() == pytest.approx(0.25, rel=0.03)  # of an exponential distribution as large as the mean
    assert np.mean(gaps_s > 0.5) == pytest.approx(np.exp(-2), rel=0.1)
    counts = np.histogram(times_s, np.arange(0, int(times_s[-1])))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)  # Poisson counts in each second
    assert load.arrivals(seed=3) == load.arrivals(seed=3) != load.arrivals(seed=4)


def test_lengths_are_taken_in_turn() -> None:
    lengths = (Lengths(1, 2), Lengths(3, 4))
    for load in (ClosedLoop(2, 5, lengths), Poisson(1.0, 5, lengths)):
        assert [one.lengths for one in load.arrivals(seed=0)] == [*lengths, *lengths, lengths[0]]
