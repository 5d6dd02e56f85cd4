"""What a plan promises, measured: requests of its lengths, as many at once as it says, in the engine it sets up."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from statistics import mean, median
from typing import Any, NamedTuple

from strop.bench.workloads import prompts
from strop.core.config import MIB, EngineConfig
from strop.core.errors import RequestError, StropError
from strop.core.plan_file import PlanFacts
from strop.core.request import Request, SamplingParams
from strop.engine.engine import Engine
from strop.machine.memory import peak_rss_bytes


class Promise(NamedTuple):
    """One predicted figure, and what was measured."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


@dataclass(slots=True)
class _Answer:
    begin_s: float
    counts: bool
    """Whether it began when the engine was as full as planned."""
    token_s: list[float] = field(default_factory=list)
    """When each token came."""


def measure_plan(settings: dict[str, Any], facts: PlanFacts, model: str | None, seconds: float) -> list[Promise]:
    """Runs a plan's requests (strop.core.plan_file) for about so long, and at least one for each of its sequences.

    Raises:
        RequestError: the plan's engine does not take requests of its lengths.
        StropError: the model cannot be loaded.
    """
    engine = Engine.load(model or facts.model, replace(EngineConfig(**settings), prefix_cache=False))
    needed = facts.traffic.input_tokens + facts.traffic.output_tokens
    if needed > engine.scheduler.max_request_tokens:
        raise RequestError(
            f"the plan is for requests of {needed} tokens, and the engine takes {engine.scheduler.max_request_tokens} "
            "here: free memory, or plan for shorter ones"
        )
    run = _Run(engine, facts)
    run.warm_up()
    run.measure(seconds)
    return run.promises()


class _Run:
    """A closed loop: as soon as a request ends, the next begins; or all begin and end together, where the plan says."""

    def __init__(self, engine: Engine, facts: PlanFacts) -> None:
        self._engine, self._facts, self._traffic = engine, facts, facts.traffic
        self._together = facts.chosen.prompt.prompts_at_once == facts.chosen.batch
        self._prompts = self._next_prompts()
        self._open: dict[str, _Answer] = {}
        self._done: list[_Answer] = []
        self._steps_s: list[float] = []
        self._ends_s: list[float] = []
        """Of all requests."""

    def warm_up(self) -> None:
        """Compiles the steps, and gives the pages of the cache memory."""
        self._begin(self._traffic.output_tokens, counts=False)
        while self._engine.has_unfinished:
            self._step()

    def measure(self, seconds: float) -> None:
        """Until the time is over and every sequence had a turn."""
        batch, output_tokens = self._facts.chosen.batch, self._traffic.output_tokens
        end_s = time.perf_counter() + seconds
        self._done.clear()
        self._steps_s.clear()
        self._ends_s = [time.perf_counter()]
        if self._together:
            while not self._done or time.perf_counter() < end_s:
                for _ in range(batch):
                    self._begin(output_tokens, counts=True)
                while self._engine.has_unfinished:
                    self._step()
            return
        for i in range(batch):  # so that they end one after the other
            self._begin(max(1, output_tokens * (i + 1) // batch), counts=False)
        num_begun = 0
        while len(self._done) < batch or time.perf_counter() < end_s:
            num_ended = self._step()
            for _ in range(num_ended):
                num_begun += 1
                self._begin(output_tokens, counts=num_begun > batch)
            if num_begun == batch and num_ended:
                self._ends_s = [time.perf_counter()]
        for request_id in self._engine.scheduler.request_ids:
            self._engine.abort(request_id)

    def promises(self) -> list[Promise]:
        """All figures."""
        chosen, answers = self._facts.chosen, self._done
        gaps = [[b - a for a, b in pairwise(answer.token_s)] for answer in answers]
        between = [one for one in gaps if one]
        rate = (len(self._ends_s) - 1) / (self._ends_s[-1] - self._ends_s[0])
        found = [
            ("step of answers", "ms", 1e3 * chosen.decode.step_s, 1e3 * median(self._steps_s or [0.0])),
            ("TTFT", "ms", 1e3 * chosen.ttft_s, 1e3 * mean(one.token_s[0] - one.begin_s for one in answers)),
            ("ITL, mean", "ms", 1e3 * chosen.itl_s, 1e3 * mean(map(mean, between)) if between else 0.0),
            ("ITL, longest", "ms", 1e3 * chosen.max_itl_s, 1e3 * median(map(max, between)) if between else 0.0),
            ("E2E", "ms", 1e3 * chosen.e2e_s, 1e3 * mean(one.token_s[-1] - one.begin_s for one in answers)),
            ("requests", "/min", chosen.requests_per_min, 60 * rate),
            ("written", "tokens/s", chosen.output_tokens_per_s, self._traffic.output_tokens * rate),
            ("memory", "MiB", chosen.memory_bytes_per_device.total / MIB, peak_rss_bytes() / MIB),
        ]
        return [Promise(*one) for one in found if one[3]]

    def _step(self) -> int:
        """Returns how many requests ended."""
        begin_s = time.perf_counter()
        events = self._engine.step()
        now_s = time.perf_counter()
        if self._engine.last_step.num_tokens == self._facts.chosen.batch == len(events):
            self._steps_s.append(now_s - begin_s)
        num_ended = 0
        for event in events:
            if event.finish_reason == "abort":
                raise StropError(f"a request was aborted: {event.stop_reason}")
            answer = self._open[event.request_id]
            answer.token_s += [now_s] * len(event.token_ids)
            if event.finish_reason is not None:
                del self._open[event.request_id]
                num_ended += 1
                self._ends_s.append(now_s)
                if answer.counts:
                    self._done.append(answer)
        return num_ended

    def _begin(self, output_tokens: int, *, counts: bool) -> None:
        request_id, prompt = next(self._prompts)
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        self._open[request_id] = _Answer(time.perf_counter(), counts)
        self._engine.add(Request(request_id, prompt, params))

    def _next_prompts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for i in count():
            yield str(i), prompts(1, self._traffic.input_tokens, self._engine.spec.vocab_size, i)[0]


def as_json(facts: PlanFacts, promises: list[Promise]) -> dict[str, Any]:
    """For `--json`."""
    rows = [{**one._asdict(), "error": one.error} for one in promises]
    return {"model": facts.model, "hardware": facts.hardware, "promises": rows}
