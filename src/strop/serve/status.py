"""What the page at `/` shows beside the chat: the model's card and live figures, as JSON."""

import time

import msgspec

from strop import __version__
from strop.serve.metrics import Metrics
from strop.serve.service import Service

_WINDOW_S = 10.0


class Card(msgspec.Struct):
    """The model that is loaded."""

    names: tuple[str, ...]
    """What requests may call it; the first is what answers call it."""
    version: str
    """Of Strop."""
    isa: str
    """The instruction set of the kernels."""
    runner: str
    """"generate" or "pooling"."""
    has_chat_template: bool
    weight_bytes: int
    context_tokens: int
    request_tokens: int
    """Prompt and answer of one request, at most."""
    num_seqs: int
    """Sequences in one step, at most."""
    cache_bytes_per_token: int
    memory: str
    """The memory plan in words."""


class Live(msgspec.Struct):
    """Figures of now; latencies are of the last ten seconds, None without a request in them."""

    tokens_per_s: float
    """Generated."""
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    num_running: int
    num_waiting: int
    cache_use: float
    """0 to 1."""
    share_of_limit: float | None
    """The least time that the last minute's steps could have taken, over what they took; idle time does not count."""
    prefix_hit_tokens: int
    """Prompt tokens found in the prefix cache, since the engine started."""
    requests_per_minute: float
    cost_per_request: float | None
    """In the currency of --price-per-hour; None without it."""


class Status(msgspec.Struct):
    """What /status answers."""

    trouble: str | None
    """Why no request should be sent now; None: all is well."""
    uptime_s: float
    num_restarts: int
    """Of the engine's process."""
    card: Card | None
    """None until the model is loaded."""
    live: Live


def status_body(service: Service) -> bytes:
    """The JSON. It is there whatever the engine does."""
    metrics, client = service.metrics, service.client
    uptime_s = time.monotonic() - metrics.began_s
    return msgspec.json.encode(Status(service.trouble, uptime_s, client.num_restarts, _card(service), _live(metrics)))


def _card(service: Service) -> Card | None:
    facts = service.client.facts
    if facts is None:
        return None
    return Card(
        service.config.model_names,
        __version__,
        facts.isa,
        "generate" if facts.embedding_len is None else "pooling",
        service.tokenizer.chat_template is not None,
        facts.weight_bytes,
        facts.max_context_len,
        facts.max_request_tokens,
        facts.max_num_seqs,
        facts.cache_bytes_per_token,
        facts.memory,
    )


def _live(metrics: Metrics) -> Live:
    stats, ttft, itl = metrics.stats, metrics.ttft_s.recent, metrics.itl_s.recent
    return Live(
        metrics.tokens_per_s,
        ttft.percentile_s(0.5, _WINDOW_S),
        ttft.percentile_s(0.95, _WINDOW_S),
        itl.percentile_s(0.5, _WINDOW_S),
        itl.percentile_s(0.99, _WINDOW_S),
        stats.num_running,
        metrics.num_waiting,
        stats.cache_use,
        metrics.share_of_limit,
        stats.num_prefix_hit_tokens,
        metrics.requests_per_minute,
        metrics.cost_per_request,
    )
