"""Seconds of an engine's step on this machine: the operations that its code records, each at its measured time."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from strop.core.config import EngineConfig
from strop.engine.costs import CostModel
from strop.machine.profile import Curve, MachineProfile, PageTimes, Sized
from strop.ops.attention import AttentionCall
from strop.ops.cost import Cost
from strop.ops.embed import EmbedCall
from strop.ops.experts import ExpertsCall
from strop.ops.linear import LinearCall
from strop.ops.norm import AddNormCall
from strop.ops.weights import PACKED_FORMATS

Binds = Literal["compute", "weights", "cache", "overhead"]
"""What a part of a step waits for: the processor, weights from memory, keys and values, or nothing of these."""

_QUERY_ROWS, _SPAN_LEN, _TASKS_PER_THREAD = 12, 256, 4
"""How native/kernels/attention.cpp divides its work."""
_PAGE_LEN = 32

NO_WORK = Cost("f32", 0)


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's share of a step: tokens [start, start + count), of which the last sees `start + count` slots."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class OpTime:
    """One operation of a step."""

    call: Any
    times: int
    """How often it is done."""
    seconds: float
    """All times together."""
    binds: Binds
    cost: Cost = NO_WORK
    """Of one time."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one step, or of several."""

    seconds: float
    binding: dict[Binds, float]
    """Seconds, by what they wait for."""
    ops: tuple[OpTime, ...] = ()
    """Of one step."""

    @property
    def binds(self) -> Binds:
        """What most of the time waits for."""
        return max(self.binding, key=lambda name: self.binding[name])


class Predictor:
    """What steps of a model take, by the figures of a profile; nothing is run."""

    def __init__(self, profile: MachineProfile, costs: CostModel) -> None:
        self._profile, self._costs = profile, costs

    def decode(self, batch: int, context_len: int) -> StepTime:
        """A step that adds a token to each of `batch` sequences, which then sees `context_len` of them."""
        return self.step([Span(context_len - 1, 1)] * batch, batch)

    def prefill(self, prompt_len: int, config: EngineConfig) -> StepTime:
        """A prompt alone, from its first step to its first token, in chunks of `config.max_step_tokens`."""
        chunk = config.max_step_tokens
        starts = range(0, prompt_len, chunk)
        steps = [self.step([Span(at, min(chunk, prompt_len - at))], int(at == starts[-1])) for at in starts]
        return total(steps)

    def step(self, spans: Sequence[Span], num_logits: int, *, greedy: bool = True) -> StepTime:
        """One step that computes these tokens, and picks a token for `num_logits` of them.

        Args:
            greedy: the most likely token is picked; else one is drawn.
        """
        profile = self._profile
        num_rows = sum(span.count for span in spans)
        alike = Counter(spans)
        calls = []
        for call, times in self._calls:
            rows = num_logits if call.num_rows == 1 else num_rows
            if rows:
                one = replace(call, num_rows=rows)
                calls.append((one, times, self._cost(one, alike)))
        coldness = profile.coldness(sum(times * cost.bytes_read for _, times, cost in calls))
        ops = [self._op(call, times, alike, coldness, cost) for call, times, cost in calls]
        pick_s = profile.greedy_s if greedy else profile.sample_s
        rounds = math.ceil(num_logits / profile.machine.num_threads)
        prompt_tokens = sum(span.count for span in spans if span.count > 1)
        python_s = profile.step_s.growing(len(spans)) + prompt_tokens * profile.token_s
        ops.append(OpTime("pick", 1, rounds * self._costs.spec.vocab_size * pick_s, "compute"))
        ops.append(OpTime("python", 1, python_s, "overhead"))
        return total([StepTime(op.seconds, {op.binds: op.seconds}) for op in ops], tuple(ops))

    @cached_property
    def _calls(self) -> list[tuple[Any, int]]:
        """Of two rows, and of one that needs logits."""
        return self._costs.calls(2, 1)

    def _cost(self, call: Any, spans: Counter[Span]) -> Cost:
        seen = read = 0
        if isinstance(call, AttentionCall):
            for span, num_alike in spans.items():
                window = call.window_len or span.start + span.count
                ends = np.minimum(span.start + 1 + np.arange(span.count), window)
                seen += num_alike * int(ends.sum())
                read += num_alike * (min(span.start, window) + span.count)
        return self._costs.cost(call, seen, read)

    def _op(self, call: Any, times: int, spans: Counter[Span], coldness: float, cost: Cost) -> OpTime:
        profile = self._profile
        if isinstance(call, AttentionCall):
            seconds, binds = self._attention(call, spans, coldness)
        elif isinstance(call, LinearCall):
            seconds, binds = self._linear(call, coldness), self._product_binds(cost)
        elif isinstance(call, ExpertsCall):
            seconds, binds = self._experts(call, coldness), self._product_binds(cost)
        elif isinstance(call, EmbedCall):
            seconds = call.num_rows * call.model_dim * _nearest(profile.embed_s, call.format)
            binds = "compute"
        elif isinstance(call, AddNormCall):
            seconds, binds = profile.call_s + call.num_rows * call.model_dim * profile.norm_s, "compute"
        else:
            raise TypeError(f"no times for {call}")
        return OpTime(call, times, times * seconds, binds, cost)

    def _linear(self, call: LinearCall, coldness: float) -> float:
        rows, outputs = call.num_rows, call.n_len // (2 if call.gated else 1)
        formats = call.format.split("+")  # of parts, whose shares of the weights are not recorded
        product_s = sum(
            _product_s(
                _nearest(self._profile.linear, name),
                call.n_len * call.k_len / len(formats),
                rows,
                coldness,
                self._profile.call_s,
            )
            for name in formats
        )
        prepare_s = self._profile.prepare_s.growing(rows) * call.k_len * len(formats)
        return prepare_s + product_s + (rows * outputs * self._profile.gate_s if call.gated else 0.0)

    def _experts(self, call: ExpertsCall, coldness: float) -> float:
        """As the linears of the experts that rows choose evenly."""
        chosen = call.num_experts * (1 - (1 - call.num_active / call.num_experts) ** call.num_rows)
        rows = max(1, round(call.num_rows * call.num_active / chosen))
        seconds = 0.0
        for name, weights, width in (
            (call.format, 2 * call.ffn_dim * call.model_dim, call.model_dim),
            (call.down_format, call.ffn_dim * call.model_dim, call.ffn_dim),
        ):
            sizes = _nearest(self._profile.linear, name)
            seconds += _product_s(sizes, weights, rows, coldness, self._profile.call_s)
            seconds += self._profile.prepare_s.growing(rows) * width
        return chosen * (seconds + rows * call.ffn_dim * self._profile.gate_s)

    def _attention(self, call: AttentionCall, spans: Counter[Span], coldness: float) -> tuple[float, Binds]:
        profile, threads = self._profile, self._profile.machine.num_threads
        pages = profile.attention.get(call.kv_dtype, profile.attention["bf16"])
        group = call.num_heads // call.num_kv_heads
        per_run = max(1, _QUERY_ROWS // group)
        sweep_s = num_runs = num_spans = 0.0
        first_pages = 0
        for span, num_alike in spans.items():
            ends = np.minimum(span.start + np.arange(per_run, span.count + per_run, per_run), span.start + span.count)
            begins = np.maximum(span.start, ends - per_run)
            seen = begins if call.window_len is None else np.minimum(begins, call.window_len - 1)
            visits = np.ceil(ends / _PAGE_LEN) - (begins - seen) // _PAGE_LEN
            rows = min(per_run, span.count) * group
            swept = [
                _page_s(pages, call.head_dim, min(_QUERY_ROWS, rows - at), 0.0) for at in range(0, rows, _QUERY_ROWS)
            ]
            sweep_s += num_alike * visits.sum() * sum(swept)
            extra = _page_s(pages, call.head_dim, min(_QUERY_ROWS, rows), coldness) - swept[0]
            sweep_s += num_alike * visits.max() * max(0.0, extra)
            first_pages += num_alike * int(visits.max())
            num_runs += num_alike * len(ends)
            num_spans += num_alike * np.ceil((ends - begins + seen) / _SPAN_LEN).sum()
        num_tasks = num_runs * call.num_kv_heads
        if num_tasks < _TASKS_PER_THREAD * threads:
            num_tasks = num_spans * call.num_kv_heads
        uneven = math.ceil(num_tasks / threads) * threads / num_tasks
        entered = call.num_rows * (call.num_heads + 2 * call.num_kv_heads) * call.head_dim
        seconds = profile.call_s + entered * profile.enter_s + call.num_kv_heads * sweep_s * uneven
        cost = self._costs.cost(call, 0, first_pages * _PAGE_LEN)
        from_cache = cost.bytes_read / profile.read_bytes_per_s.y[-1] > 0.5 * seconds
        return float(seconds), "cache" if from_cache else "compute"

    def _product_binds(self, cost: Cost) -> Binds:
        """By what would take longer alone."""
        fastest = max(
            2 * sized.num_weights * x / y
            for sizes in self._profile.linear.values()
            for sized in sizes
            for x, y in zip(sized.cold.x, sized.cold.y, strict=True)
        )
        memory_s = cost.bytes_read / self._profile.read_bytes_per_s.y[-1]
        return "weights" if memory_s > cost.flops / fastest else "compute"


def total(steps: Iterable[StepTime], ops: tuple[OpTime, ...] = ()) -> StepTime:
    """One after the other."""
    binding: dict[Binds, float] = {}
    for step in steps:
        for name, seconds in step.binding.items():
            binding[name] = binding.get(name, 0.0) + seconds
    return StepTime(sum(binding.values()), binding, ops)


def _product_s(sizes: tuple[Sized, ...], num_weights: float, rows: int, coldness: float, call_s: float) -> float:
    """Between the measured sizes, and from nothing, in proportion."""
    x, y = [0.0], [call_s]
    for sized in sizes:
        cold_s, warm_s = sized.cold.growing(rows), sized.warm.growing(rows)
        x.append(float(sized.num_weights))
        y.append(warm_s + max(0.0, cold_s - warm_s) * coldness)
    if num_weights > x[-1]:
        return y[-1] * num_weights / x[-1]
    return float(np.interp(num_weights, x, y))


def _page_s(pages: tuple[PageTimes, ...], head_dim: int, rows: int, coldness: float) -> float:
    """Of one page of one head, in proportion to what is measured of narrower or wider ones."""

    def at(page: PageTimes) -> float:
        cold, warm = page.cold.growing(rows), page.warm.growing(rows)
        return warm + max(0.0, cold - warm) * coldness

    if len(pages) == 1 or head_dim <= pages[0].head_dim:
        return at(pages[0]) * head_dim / pages[0].head_dim
    if head_dim >= pages[-1].head_dim:
        return at(pages[-1]) * head_dim / pages[-1].head_dim
    return Curve(tuple(float(page.head_dim) for page in pages), tuple(map(at, pages))).at(head_dim)


def _nearest(table: dict[str, Any], format_name: str) -> Any:
    """The entry of this weight format, or of the measured one whose weights take most nearly as many bits."""
    if format_name in table:
        return table[format_name]
    bits = PACKED_FORMATS[format_name].bits
    return table[min(table, key=lambda name: abs(math.log2(PACKED_FORMATS[name].bits / bits)))]
