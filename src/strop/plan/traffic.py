"""The requests that a plan is for."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from strop.core.errors import RequestError
from strop.models.spec import ModelSpec

DEFAULT_INPUT_TOKENS, DEFAULT_OUTPUT_TOKENS = 512, 128
_MOST_TOKENS = 1 << 24
_MOST_RATE = 1e9
BUSY_S = 60.0
"""Of recorded arrivals, the busiest stretch of so long gives the rate."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of equal lengths, or the means of unequal ones."""

    input_tokens: int = DEFAULT_INPUT_TOKENS
    output_tokens: int = DEFAULT_OUTPUT_TOKENS
    rate_per_s: float | None = None
    """Of arrivals; None: as many as the machines take."""
    context_len: int = DEFAULT_INPUT_TOKENS + DEFAULT_OUTPUT_TOKENS
    """Of the longest request, prompt and answer: memory is planned for it."""


def parse_traffic(text: str) -> Traffic:
    """Of "in=512,out=128,rate=4" (rate: requests per second); what is left out is as in `Traffic`.

    Raises:
        RequestError: an unknown or repeated name, or a value out of range.
    """
    given: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("in", "out", "rate") or name in given:
            problem = "is given twice" if name in given else "is unknown"
            raise RequestError(
                f"traffic {part!r:.80} {problem}: give 'in=TOKENS', 'out=TOKENS', 'rate=REQUESTS_PER_SECOND', or a CSV "
                "file"
            )
        given[name] = value
    input_tokens = _tokens("in", given.get("in", str(DEFAULT_INPUT_TOKENS)))
    output_tokens = _tokens("out", given.get("out", str(DEFAULT_OUTPUT_TOKENS)))
    rate_per_s = _rate(given["rate"]) if "rate" in given else None
    return Traffic(input_tokens, output_tokens, rate_per_s, input_tokens + output_tokens)


def _tokens(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= _MOST_TOKENS):
        raise RequestError(f"traffic {f'{name}={text}'!r:.40} is no number of tokens: give 1 to {_MOST_TOKENS}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= _MOST_RATE:
        raise RequestError(
            f"traffic {f'rate={text}'!r:.40} is no number above 0 and up to {_MOST_RATE:g}: give requests per second, "
            "such as 'rate=4'"
        )
    return rate


def recorded_traffic(times_s: Sequence[float], input_tokens: Sequence[int], output_tokens: Sequence[int]) -> Traffic:
    """Of requests that came at these ascending times, with these lengths.

    Lengths are means, the rate that of the busiest minute (or of all, if it is shorter), the context the longest.
    """
    count = len(times_s)
    window_s = min(BUSY_S, times_s[-1] - times_s[0])
    rate = None
    if window_s > 0:
        within = (i + 1 - bisect_left(times_s, times_s[i] - window_s) for i in range(count))
        rate = (max(within) - 1) / window_s
    return Traffic(
        max(1, round(sum(input_tokens) / count)),
        max(1, round(sum(output_tokens) / count)),
        rate,
        max(map(sum, zip(input_tokens, output_tokens, strict=True))),
    )


def traffic_for(spec: ModelSpec, traffic: Traffic | None) -> Traffic:
    """The traffic, or the default, shortened where the model's context is short.

    Raises:
        RequestError: a request is longer than the model's context.
    """
    most = spec.max_context_len
    if traffic is None:
        output_tokens = min(DEFAULT_OUTPUT_TOKENS, max(1, most // 4))
        traffic = Traffic(max(1, min(DEFAULT_INPUT_TOKENS, most - output_tokens)), output_tokens)
        return replace(traffic, context_len=traffic.input_tokens + traffic.output_tokens)
    if traffic.context_len > most:
        raise RequestError(
            f"traffic: requests of up to {traffic.context_len:,} tokens, prompt and answer, exceed the model's context "
            f"of {most:,}: give shorter ones"
        )
    return traffic
