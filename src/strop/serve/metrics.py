"""What Prometheus sees: `vllm:` begins names that mean what vLLM's mean, `strop:` those that are ours."""

import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from strop.engine.messages import EngineStats, Stepped
from strop.serve.admission import Admission
from strop.serve.engine_client import EngineClient
from strop.serve.recent import Recent, RecentDurations

_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_ITL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
_TOKENS = tuple(2**power for power in range(18))
_COST_WINDOW_S = 600.0
_LIMIT_WINDOW_S = 60.0
_RATE_WINDOW_S = 2.0
_SHARE_HELP = (
    "The least time that the steps of the last minute could have taken on this machine, over the time they took: of "
    "busy steps only, idle time does not count; the machine was probed for a moment when the engine started"
)


class Metrics:
    """Counters and histograms of requests; gauges are read from the engine's last message when asked for."""

    def __init__(self, model: str, client: EngineClient, admission: Admission, price_per_hour: float | None) -> None:
        self.registry = registry = CollectorRegistry()
        self._model = model

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, ("model_name", *labels), registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, ("model_name",), buckets=buckets, registry=registry).labels(model)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of answered requests").labels(model)
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated").labels(model)
        self._successes = counter("vllm:request_success", "Choices that ended", "finished_reason")
        self._requests = counter("strop:http_requests", "HTTP requests answered", "path", "status")
        self._cancelled = counter("strop:requests_cancelled", "Requests whose client left", "stage")
        self.ttft_s = Latency(histogram("vllm:time_to_first_token_seconds", "Request in to first token", _SECONDS))
        self.itl_s = Latency(histogram("vllm:inter_token_latency_seconds", "Between tokens of a choice", _ITL_SECONDS))
        self.e2e_s = histogram("vllm:e2e_request_latency_seconds", "Request in to last token", _SECONDS)
        self.num_prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.num_generation_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request", _TOKENS
        )
        self._step_tokens = histogram("vllm:iteration_tokens_total", "Tokens of a step", _TOKENS)
        self._finished: deque[float] = deque(maxlen=100_000)
        self.began_s = time.monotonic()
        self._price_per_hour = price_per_hour
        self._client, self._admission = client, admission
        self._recent = Recent()
        client.on_step = self._stepped
        registry.register(_EngineGauges(model, client, admission, self))

    def finished(self, reason: str) -> None:
        """A choice ended."""
        self._successes.labels(self._model, reason).inc()

    def answered(self, e2e_s: float, num_prompt_tokens: int, num_generation_tokens: int) -> None:
        """A request got all it asked for."""
        self._finished.append(time.monotonic())
        self.e2e_s.observe(e2e_s)
        self.num_prompt_tokens.observe(num_prompt_tokens)
        self.num_generation_tokens.observe(num_generation_tokens)

    def requested(self, path: str, status: int) -> None:
        """An HTTP request was answered with this status."""
        self._requests.labels(self._model, path, str(status)).inc()

    def cancelled(self, stage: str) -> None:
        """A client left."""
        self._cancelled.labels(self._model, stage).inc()

    @property
    def stats(self) -> EngineStats:
        """Of the engine that runs; zeros while there is none."""
        return self._client.stats if self._client.facts else EngineStats()

    @property
    def num_waiting(self) -> int:
        """Requests without a first token that are not in the batch."""
        stats = self.stats
        return max(stats.num_waiting, self._admission.num_requests - stats.num_running)

    @property
    def requests_per_minute(self) -> float:
        """Answered ones, over the last minutes."""
        now_s = time.monotonic()
        window_s = min(_COST_WINDOW_S, max(now_s - self.began_s, 1e-9))
        while self._finished and now_s - self._finished[0] > _COST_WINDOW_S:
            self._finished.popleft()
        return 60.0 * len(self._finished) / window_s

    @property
    def cost_per_request(self) -> float | None:
        """What the machine's time costs for one, at the last minutes' rate; None without a price or a request."""
        rate = self.requests_per_minute
        return None if self._price_per_hour is None or not rate else self._price_per_hour / 60.0 / rate

    @property
    def tokens_per_s(self) -> float:
        """Generated in the last seconds."""
        return self._recent.rate_per_s("tokens", _RATE_WINDOW_S)

    @property
    def share_of_limit(self) -> float | None:
        """Least possible over actual time of the last minute's steps; None if there were none, or it is not known."""
        sums = self._recent.sums(_LIMIT_WINDOW_S)
        limit_s = sums.get("limit_s", 0.0)
        return limit_s / sums["step_s"] if limit_s else None

    def _stepped(self, step: Stepped) -> None:
        self._recent.add("tokens", sum(len(event.token_ids) for event in step.events))
        if step.stats.step_s:
            self._step_tokens.observe(step.stats.num_step_tokens)
        self._recent.add("step_s", step.stats.step_s)
        self._recent.add("limit_s", step.stats.limit_s)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class Latency:
    """Durations, for Prometheus and for those who watch."""

    def __init__(self, histogram: Histogram) -> None:
        self.recent = RecentDurations()
        self._histogram = histogram

    def observe(self, duration_s: float) -> None:
        """Something took so long."""
        self._histogram.observe(duration_s)
        self.recent.observe(duration_s)


class _EngineGauges(Collector):
    def __init__(self, model: str, client: EngineClient, admission: Admission, metrics: Metrics) -> None:
        self._model, self._client, self._admission, self._metrics = model, client, admission, metrics

    def describe(self) -> list[Metric]:
        """Nothing is known before the engine is asked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The state of the engine and the queue."""
        client, stats = self._client, self._metrics.stats
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch", stats.num_running)
        waiting = self._metrics.num_waiting
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for their turn", waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the cache in use, 0 to 1", stats.cache_use)
        yield self._counter("vllm:num_preemptions", "Sequences that gave their blocks back", stats.num_preemptions)
        queries, hits = stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked for in the prefix cache", queries)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache", hits)
        yield self._gauge("strop:queue_tokens", "Prompt tokens that wait", self._admission.num_tokens)
        yield self._counter("strop:requests_rejected", "Answered with 429", self._admission.num_rejected)
        yield self._gauge("strop:blocks_used", "Cache blocks that sequences hold", stats.num_used_blocks)
        yield self._gauge("strop:blocks_leaked", "Held by nobody, yet not free: 0", stats.num_leaked_blocks)
        yield self._gauge("strop:step_seconds", "The last step", stats.step_s)
        yield self._gauge("strop:step_tokens", "Tokens of the last step", stats.num_step_tokens)
        yield self._gauge("strop:engine_ready", "1 when the engine makes progress", float(client.trouble is None))
        yield self._counter(
            "strop:engine_restarts", "Times the engine's process was started again", client.num_restarts
        )
        yield self._gauge("strop:requests_per_minute", "Answered lately", self._metrics.requests_per_minute)
        cost = self._metrics.cost_per_request
        if cost is not None:
            yield self._gauge("strop:cost_per_request", "The machine's price over the requests answered", cost)
        share = self._metrics.share_of_limit
        if share is not None:
            yield self._gauge("strop:share_of_limit", _SHARE_HELP, share)

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, what, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(name, what, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family
