"""Predicted against measured times of steps: what `strop plan` says of this machine, and what its engine then takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from strop.core.errors import StropError
from strop.core.request import Request, SamplingParams
from strop.engine.engine import Engine
from strop.engine.scheduler import Scheduler
from strop.plan.calibrate import Clock
from strop.plan.kernel_points import fill
from strop.plan.predict import Predictor, StepTime

_TOKEN = 5  # what answers are made of; any will do
_MARGIN = 64
"""Tokens that answers may grow by."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point: decode steps of `batch` sequences about `context_len` long, or a prompt of that length."""

    phase: Literal["decode", "prefill"]
    batch: int
    context_len: int

    @property
    def num_tokens(self) -> int:
        """Which the cache must hold."""
        return self.batch * (self.context_len + _MARGIN)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell's seconds: of a step, or of a whole prompt."""

    model: str
    cell: Cell
    measured_s: float
    predicted: StepTime

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted.seconds / self.measured_s - 1


def predict_cell(predictor: Predictor, cell: Cell, engine: Engine) -> StepTime:
    """What `measure_cell` should give."""
    if cell.phase == "prefill":
        return predictor.prefill(cell.context_len, engine.config)
    return predictor.decode(cell.batch, cell.context_len)


def prepare(engine: Engine) -> None:
    """Gives the cache's pages memory, as contexts of decode cells are never computed; and compiles prompts' steps."""
    for cache in engine._caches:
        fill(cache)
    for length in (128, 2 * engine.config.max_step_tokens):
        _prefill_s(engine, min(length, engine.config.max_context_len - 1), time.perf_counter)


def measure_cell(engine: Engine, cell: Cell, seconds: float = 1.5, clock: Clock = time.perf_counter) -> list[float]:
    """Seconds of a cell's steps, or of its prompts, for about so long; at least three steps or one prompt.

    The engine must be idle, have room for `cell.num_tokens` and no prefix cache.
    """
    if cell.phase == "prefill":
        return _repeat(lambda: _prefill_s(engine, cell.context_len, clock), seconds, 1)
    _start_decoding(engine, cell.batch, cell.context_len - _MARGIN // 2)
    times = _repeat(lambda: _step_s(engine, cell.batch, clock), seconds, 3)
    engine.scheduler = Scheduler(engine.config, engine._new_pools(), ())
    return times


def _repeat(run: Callable[[], float], seconds: float, least: int) -> list[float]:
    end = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < least or (time.perf_counter() < end and len(times) < _MARGIN - 8):
        times.append(run())
    return times


def _prefill_s(engine: Engine, prompt_len: int, clock: Clock) -> float:
    _add(engine, "prompt", prompt_len, 1)
    begin = clock()
    while engine.has_unfinished:
        engine.step()
    return clock() - begin


def _start_decoding(engine: Engine, batch: int, prompt_len: int) -> None:
    """Sequences whose prompts count as computed; then two steps, of which the first may compile."""
    config = replace(engine.config, max_step_tokens=batch * prompt_len)
    engine.scheduler = Scheduler(config, engine._new_pools(), ())
    for i in range(batch):
        _add(engine, str(i), prompt_len, _MARGIN + _MARGIN // 2)
    plan = engine.scheduler.schedule()
    assert plan is not None
    if len(plan.rows) != batch or plan.num_tokens != batch * prompt_len:
        raise StropError(f"the cache does not hold {batch} x {prompt_len} tokens: give the engine more blocks")
    engine.scheduler.commit(plan, [[_TOKEN]] * batch)
    for _ in range(2):
        _step_s(engine, batch, time.perf_counter)


def _step_s(engine: Engine, batch: int, clock: Clock) -> float:
    begin = clock()
    events = engine.step()
    seconds = clock() - begin
    if len(events) != batch:
        raise StropError(f"a step gave {len(events)} tokens for {batch} sequences")
    return seconds


def _add(engine: Engine, name: str, prompt_len: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Request(name, (_TOKEN,) * prompt_len, params))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
