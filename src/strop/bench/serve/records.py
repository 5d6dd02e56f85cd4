"""What came of each request, and the figures that follow: pure arithmetic."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from strop.bench.serve.load import Lengths
from strop.core.errors import RequestError


@dataclass(slots=True)
class Record:
    """One request. Times are in seconds from the round's start."""

    asked: Lengths
    due_s: float = 0.0
    sent_s: float = 0.0
    """When the client began: opening a connection, where none was open, counts as the server's time."""
    chunk_s: list[float] = field(default_factory=list)
    """When each chunk with text was received."""
    end_s: float | None = None
    """When the answer was complete, or failed; None if it was cut off with the measurement."""
    prompt_tokens: int | None = None
    """These three as the server counted them."""
    output_tokens: int | None = None
    cached_tokens: int = 0
    """Prompt tokens that it had in its prefix cache."""
    finish_reason: str | None = None
    failure: tuple[str, str] | None = None
    """Kind and message."""

    @property
    def is_complete(self) -> bool:
        """Whether it was answered."""
        return self.end_s is not None and self.failure is None and bool(self.chunk_s)

    @property
    def num_tokens(self) -> int:
        """Generated tokens; the chunks with text, where the server does not count."""
        return self.output_tokens or len(self.chunk_s)

    @property
    def ttft_s(self) -> float:
        """Time to first token: from the request to the first text. Of a complete record, as those below."""
        return self.chunk_s[0] - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between chunks with text."""
        return [after - before for before, after in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: unlike a gap it does not depend on how tokens are put into chunks."""
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def e2e_s(self) -> float:
        """From the request to the end of the answer."""
        assert self.end_s is not None
        return self.end_s - self.sent_s


@dataclass(frozen=True, slots=True)
class Objective:
    """Limits in seconds that a good request keeps; None is no limit."""

    ttft: float | None = None
    itl: float | None = None
    """For the 99th percentile of the request's own gaps."""
    tpot: float | None = None
    e2e: float | None = None

    def is_met(self, record: Record) -> bool:
        """Whether a request was answered, within all limits."""
        if not record.is_complete:
            return False
        gaps_s = record.itl_s
        pairs = (
            (self.ttft, record.ttft_s),
            (self.itl, float(np.percentile(gaps_s, 99)) if gaps_s else None),
            (self.tpot, record.tpot_s),
            (self.e2e, record.e2e_s),
        )
        return all(limit is None or value_s is None or value_s <= limit for limit, value_s in pairs)


def parse_objective(text: str) -> Objective:
    """From `ttft=200ms,itl=30ms,e2e=2.5s`. RequestError for anything else."""
    names = [one.name for one in fields(Objective)]
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, limit = part.strip().partition("=")
        number = limit.removesuffix("s").removesuffix("m")
        try:
            value = float(number) * (1e-3 if limit.endswith("ms") else 1.0)
        except ValueError:
            value = 0.0
        if name not in names or name in limits or not limit.endswith("s") or not 0 < value < float("inf"):
            raise RequestError(
                f"--objective {part.strip()!r} is not a limit: give one each for some of {', '.join(names)}, "
                "in ms or s, like ttft=200ms,itl=30ms,e2e=2.5s"
            )
        limits[name] = value
    return Objective(**limits)


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a latency, in seconds; percentiles are interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p99: float


def spread(values_s: Sequence[float]) -> Spread | None:
    """None of nothing."""
    if not values_s:
        return None
    p50, p90, p99 = np.percentile(values_s, [50, 90, 99]).tolist()
    return Spread(float(np.mean(values_s)), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one round. Latencies are over the complete requests, ITL over all gaps of all of them."""

    num_requests: int
    num_complete: int
    num_cut_off: int
    """Under way when the measurement was interrupted."""
    failures: dict[str, int]
    """How many of each kind."""
    duration_s: float
    """From the first request to the last end."""
    ttft_s: Spread | None
    itl_s: Spread | None
    tpot_s: Spread | None
    e2e_s: Spread | None
    output_tokens_per_s: float
    """Of complete requests."""
    requests_per_minute: float
    good_requests_per_minute: float | None
    """Those that met the objective: goodput."""
    good_share: float | None
    """Of all requests but those cut off."""
    cost_per_request: float | None
    cost_per_million_output_tokens: float | None
    prompt_tokens: float | None
    """Mean."""
    output_tokens: float | None
    """Mean."""
    tokens_per_chunk: float | None
    cached_share: float | None
    """Of the prompt tokens."""
    num_short: int
    """Answers with fewer tokens than asked for."""


def summarize(records: Sequence[Record], objective: Objective | None, price_per_hour: float | None) -> Summary:
    """The figures of one round's records."""
    done = [record for record in records if record.is_complete]
    ended = [record for record in records if record.end_s is not None]
    begin_s = min((record.sent_s for record in ended), default=0.0)
    duration_s = max((record.end_s or 0.0 for record in ended), default=0.0) - begin_s
    num_tokens = sum(record.num_tokens for record in done)
    good = None if objective is None else sum(map(objective.is_met, ended))
    cost = None if price_per_hour is None else price_per_hour * duration_s / 3600
    prompt_tokens = [record.prompt_tokens for record in done if record.prompt_tokens is not None]
    return Summary(
        num_requests=len(records),
        num_complete=len(done),
        num_cut_off=len(records) - len(ended),
        failures=dict(Counter(record.failure[0] for record in records if record.failure)),
        duration_s=duration_s,
        ttft_s=spread([record.ttft_s for record in done]),
        itl_s=spread([gap_s for record in done for gap_s in record.itl_s]),
        tpot_s=spread([value for record in done if (value := record.tpot_s) is not None]),
        e2e_s=spread([record.e2e_s for record in done]),
        output_tokens_per_s=_ratio(num_tokens, duration_s) or 0.0,
        requests_per_minute=_ratio(60 * len(done), duration_s) or 0.0,
        good_requests_per_minute=None if good is None else _ratio(60 * good, duration_s) or 0.0,
        good_share=None if good is None else _ratio(good, len(ended)),
        cost_per_request=None if cost is None else _ratio(cost, len(done)),
        cost_per_million_output_tokens=None if cost is None else _ratio(1e6 * cost, num_tokens),
        prompt_tokens=_ratio(sum(prompt_tokens), len(prompt_tokens)),
        output_tokens=_ratio(num_tokens, len(done)),
        tokens_per_chunk=_ratio(num_tokens, sum(len(record.chunk_s) for record in done)),
        cached_share=_ratio(sum(record.cached_tokens for record in done), sum(prompt_tokens)),
        num_short=sum(record.num_tokens < record.asked.output_tokens for record in done),
    )


def tokens_over_time(records: Iterable[Record], bin_s: float, num_bins: int) -> list[float]:
    """Output tokens per second in each of `num_bins` bins of `bin_s` seconds, failed requests' too.

    A request's tokens are spread evenly over its chunks.
    """
    rates = [0.0] * num_bins
    for record in records:
        for chunk_s in record.chunk_s:
            rates[min(int(chunk_s / bin_s), num_bins - 1)] += record.num_tokens / len(record.chunk_s) / bin_s
    return rates


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
