"""When requests arrive and how long they are: closed loops, Poisson arrivals, traces."""

import csv
import math
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from strop.core.errors import RequestError

TRACE_COLUMNS = ("time_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of one request, in tokens."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it is due, in seconds from the round's start, and its lengths."""

    time_s: float
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` clients, each of which sends its next request when the last was answered."""

    concurrency: int
    num_requests: int
    lengths: tuple[Lengths, ...]
    """Taken in turn, over and over."""

    @property
    def label(self) -> str:
        """For people."""
        return f"concurrency {self.concurrency}"

    @property
    def warmup(self) -> int:
        """How many requests make the server ready for it."""
        return self.concurrency

    def arrivals(self, seed: int) -> list[Arrival]:
        """All due at once; the loop decides."""
        return [Arrival(0.0, lengths) for lengths in islice(cycle(self.lengths), self.num_requests)]


@dataclass(frozen=True, slots=True)
class Poisson:
    """Requests that come on average `rate_per_s` times a second, whatever the server does."""

    rate_per_s: float
    num_requests: int
    lengths: tuple[Lengths, ...]
    """Taken in turn, over and over."""

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.rate_per_s:g} requests/s"

    @property
    def warmup(self) -> int:
        """How many requests make the server ready for it."""
        return 4

    def arrivals(self, seed: int) -> list[Arrival]:
        """Exponential gaps; the first request is due at once."""
        gaps_s = np.random.default_rng(seed).exponential(1 / self.rate_per_s, self.num_requests)
        times_s = np.cumsum(gaps_s) - gaps_s[0]
        lengths = islice(cycle(self.lengths), self.num_requests)
        return [Arrival(float(time_s), one) for time_s, one in zip(times_s, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests as they once came."""

    name: str
    all_arrivals: tuple[Arrival, ...]

    @property
    def label(self) -> str:
        """For people."""
        return f"trace {self.name}"

    @property
    def warmup(self) -> int:
        """How many requests make the server ready for it."""
        return 4

    def arrivals(self, seed: int) -> list[Arrival]:
        """The same in every round."""
        return list(self.all_arrivals)


Load = ClosedLoop | Poisson | Trace


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """A CSV file with the columns time_s, prompt_tokens and output_tokens; times are moved so that the first is 0.

    Raises:
        RequestError: it cannot be read, or a line has an empty cell, a time before 0 or before the last line's, or a
            length that is not a whole number of 1 or more. The message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a mark
            rows = csv.reader(file)
            header = next(rows, [])
            if tuple(header) != TRACE_COLUMNS:
                raise RequestError(
                    f"{path}, line 1 is {','.join(header)!r:.80}: it must be {','.join(TRACE_COLUMNS)!r}"
                )
            arrivals: list[Arrival] = []
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                arrivals.append(_arrival(row, where))
                if len(arrivals) > 1 and arrivals[-1].time_s < arrivals[-2].time_s:
                    raise RequestError(f"{where}: 'time_s' is {row[0]}, earlier than the line before: sort the file")
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}): give a CSV file of arrivals") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not arrivals:
        raise RequestError(f"{path} has no arrivals: give a line for each request after the header")
    start_s = arrivals[0].time_s
    return tuple(Arrival(arrival.time_s - start_s, arrival.lengths) for arrival in arrivals)


def _arrival(row: list[str], where: str) -> Arrival:
    if len(row) != len(TRACE_COLUMNS) or not all(cell.strip() for cell in row):
        raise RequestError(f"{where} is {','.join(row)!r:.80}: it needs {len(TRACE_COLUMNS)} cells, none of them empty")
    try:
        time_s = float(row[0])
    except ValueError:
        time_s = math.nan
    if not 0 <= time_s < math.inf:
        raise RequestError(f"{where}: 'time_s' is {row[0]!r:.40}: give seconds of 0 or more")
    return Arrival(time_s, Lengths(_length(row, 1, where), _length(row, 2, where)))


def _length(row: list[str], column: int, where: str) -> int:
    text = row[column].strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) >= 1):
        raise RequestError(
            f"{where}: {TRACE_COLUMNS[column]!r} is {row[column]!r:.40}: give a whole number of 1 or more"
        )
    return int(text)
