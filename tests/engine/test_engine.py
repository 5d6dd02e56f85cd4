"""Failures inside the engine: a step that raises loses nothing, numbers that are none end only their own answer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from strop.core.errors import RequestError, StropError, UnsupportedError
from strop.core.request import Request, SamplingParams
from strop.engine.engine import Engine
from strop.engine.step import CompiledModel
from strop.ops.weights import PACKED_FORMATS, TILE_COLUMNS

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, seed=3, max_tokens=20, n=2, logprobs=2, ignore_eos=True)


def some_requests() -> list[Request]:
    prompts = np.random.default_rng(4).integers(0, 268, (4, 40)).tolist()
    return [Request(f"r{i}", tuple(prompt), (GREEDY, SAMPLED)[i % 2]) for i, prompt in enumerate(prompts)]


class FailingStep:
    """Stands for the compiled step; raises on some calls, before or after the cache has been consumed."""

    def __init__(self, real: Callable[..., Any], failing: dict[int, BaseException], *, after: bool) -> None:
        self.real, self.failing, self.after, self.num_calls = real, failing, after, 0

    def __get__(self, model: Any, owner: type) -> Callable[..., Any]:
        return partial(self, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        error = self.failing.get(self.num_calls)
        if error is not None and not self.after:
            raise error
        result = self.real(*args, **kwargs)
        if error is not None:
            raise error
        return result


@pytest.mark.parametrize("after", [False, True])
def test_a_step_that_fails_loses_nothing(
    after: bool, new_engine: Callable[..., Engine], crowd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = crowd(new_engine(), some_requests())
    failing: dict[int, BaseException] = {n: RuntimeError("injected") for n in (1, 4, 5, 17, 30)}
    monkeypatch.setattr(CompiledModel, "step", FailingStep(CompiledModel.step, failing, after=after))
    assert crowd(new_engine(), some_requests()) == expected


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_leaves_the_engine_usable(
    after: bool, new_engine: Callable[..., Engine], crowd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = crowd(new_engine(), some_requests())
    engine = new_engine()
    step = FailingStep(CompiledModel.step, {3: KeyboardInterrupt(), 6: UnsupportedError("injected")}, after=after)
    monkeypatch.setattr(CompiledModel, "step", step)
    for request in some_requests():
        engine.add(request)
    for error in (KeyboardInterrupt, UnsupportedError):
        with pytest.raises(error):
            while engine.has_unfinished:
                engine.step()
    for request in some_requests():
        engine.abort(request.request_id)
    engine.scheduler.check()
    assert crowd(engine, some_requests()) == expected


def test_a_cache_that_cannot_be_made_again_is_never_written(
    new_engine: Callable[..., Engine], crowd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = crowd(new_engine(), some_requests())
    engine = new_engine()
    for request in some_requests():
        engine.add(request)
    engine.step()
    with monkeypatch.context() as patch:
        fails = FailingStep(CompiledModel.new_caches, {1: KeyboardInterrupt()}, after=False)
        patch.setattr(CompiledModel, "new_caches", fails)
        step = FailingStep(CompiledModel.step, {1: RuntimeError("injected")}, after=True)
        patch.setattr(CompiledModel, "step", step)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    for request in some_requests():
        engine.abort(request.request_id)
    assert crowd(engine, some_requests()) == expected


def test_it_gives_up_when_every_step_fails_and_recovers_when_they_do_not(
    new_engine: Callable[..., Engine], crowd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = crowd(new_engine(), some_requests())
    engine = new_engine()
    always: dict[int, BaseException] = {n: RuntimeError("injected") for n in range(100)}
    with monkeypatch.context() as patch:
        step = FailingStep(CompiledModel.step, always, after=False)
        patch.setattr(CompiledModel, "step", step)
        for num_calls in (3, 6):
            engine.add(some_requests()[0])
            with pytest.raises(StropError, match=r"3 steps failed in a row.*injected"):
                while engine.has_unfinished:
                    engine.step()
            assert step.num_calls == num_calls
            engine.abort("r0")
    assert crowd(engine, some_requests()) == expected


def test_damaged_weights_end_only_the_answers_they_touch(
    loaded: Callable[..., Any], new_engine: Callable[..., Engine], crowd: Callable[..., Any]
) -> None:
    """The scale of one embedding row becomes NaN, as after a flipped bit in memory."""
    model = loaded("qwen2", "Q8_0", tied=False)
    expected = crowd(new_engine(model), some_requests())
    token_id = 200
    assert not any(token_id in answer.token_ids for answer in expected.values())
    embed = model.params.weights["embed"]
    tile = token_id // TILE_COLUMNS
    data = np.array(embed.data).reshape(1, embed.num_tiles, -1)
    scales = data[0, tile, 64 * TILE_COLUMNS : 64 * TILE_COLUMNS + 64].view(np.float16)
    assert PACKED_FORMATS[embed.format].bits == 8
    scales[token_id % TILE_COLUMNS] = np.nan
    weights = model.params.weights | {"embed": replace(embed, data=jnp.asarray(data.reshape(1, -1)))}
    engine = new_engine(replace(model, params=replace(model.params, weights=weights)))

    requests = some_requests()
    tainted = Request("tainted", (*requests[0].prompt_token_ids[:33], token_id, 9), GREEDY)
    answers = crowd(engine, [requests[0], tainted, *requests[1:]])
    spoilt = answers.pop(("tainted", 0))
    finish_reason, stop_reason = spoilt.finish
    assert (finish_reason, spoilt.fault) == ("abort", "engine")
    assert "NaN" in stop_reason
    assert answers == expected
    assert crowd(engine, requests) == expected


def test_impossible_requests_change_nothing(new_engine: Callable[..., Engine], crowd: Callable[..., Any]) -> None:
    engine = new_engine()
    for prompt, params, named in [
        ((), GREEDY, "empty"),
        ((5, 268), GREEDY, "268"),
        ((5, -1), GREEDY, "-1"),
        ((5,) * 128, GREEDY, "128"),
        ((5,) * 120, GREEDY, "140"),
        ((5,), SamplingParams(logit_bias={268: 1.0}), "logit_bias"),
        ((5,), SamplingParams(stop_token_ids=(-3,)), "stop_token_ids"),
    ]:
        with pytest.raises(RequestError, match=named):
            engine.add(Request("r", prompt, params))
    assert not engine.has_unfinished
    assert crowd(engine, some_requests()) == crowd(new_engine(), some_requests())


def test_scores_leave_no_trace(new_engine: Callable[..., Engine], crowd: Callable[..., Any]) -> None:
    engine, requests = new_engine(), some_requests()
    expected = crowd(engine, requests)
    scores = np.concatenate(list(engine.score(list(requests[0].prompt_token_ids))))
    assert scores.shape == (40, 268)
    assert crowd(engine, requests) == expected
    engine.add(requests[0])
    with pytest.raises(RequestError, match="idle"):
        next(engine.score([1, 2]))
    engine.abort("r0")
    with pytest.raises(RequestError, match="129 tokens"):
        next(engine.score([1] * 129))
    with pytest.raises(RequestError, match="out of range"):
        next(engine.score([1, 268]))
