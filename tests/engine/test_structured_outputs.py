"""Structured output through the engine: answers match, end where they must, and survive what happens to answers."""

import asyncio
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from strop.core.errors import RequestError
from strop.core.request import Request, SamplingParams, StructuredOutputsParams
from strop.engine.async_engine import AsyncEngine
from strop.engine.engine import Engine
from strop.engine.step import CompiledModel
from strop.llm import LLM

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WISHES: list[dict[str, Any]] = [
    {"json": PERSON},
    {"regex": "[ab]{3,9}c"},
    {"choice": ["yes", "no", "perhaps"]},
    {"grammar": 'start: "(" x ")"\nx: "a" | "(" x ")"'},
]


def params(wish: dict[str, Any], **changes: Any) -> SamplingParams:
    given = {"temperature": 1.2, "seed": 7, "max_tokens": 60, "structured_outputs": StructuredOutputsParams(**wish)}
    return SamplingParams(**(given | changes))


def requests(**changes: Any) -> list[Request]:
    """Of every kind, sampled and greedy; some cannot end within their tokens."""
    return [
        Request(f"r{i}", tuple(range(100, 140 + i)), params(WISHES[i % 4], temperature=1.2 * (i % 3 > 0), **changes))
        for i in range(8)
    ]


def text_of(engine: Engine, answer: Any) -> str:
    return engine.tokenizer.decode(answer.token_ids, skip_special=True, continuation=True)


def matches(wish: dict[str, Any], text: str) -> bool:
    if "json" in wish:
        return Draft202012Validator(wish["json"]).is_valid(json.loads(text))
    if "choice" in wish:
        return text in wish["choice"]
    return re.fullmatch(wish.get("regex", r"(\(+)a\)+"), text) is not None


def test_answers_match_and_end(new_engine: Callable[..., Engine], crowd: Callable[..., Any]) -> None:
    engine = new_engine()
    answers = crowd(engine, requests(n=2))
    finished = 0
    for i, request in enumerate(requests()):
        for index in range(2):
            answer = answers[request.request_id, index]
            if answer.finish[0] == "stop":
                finished += 1
                assert answer.finish == ("stop", None)
                assert matches(WISHES[i % 4], text_of(engine, answer)), text_of(engine, answer)
            else:
                assert answer.finish == ("length", None)
                assert len(answer.token_ids) == 60
    assert finished >= 10


def test_alone_in_a_crowd_through_preemption_and_failing_steps(
    new_engine: Callable[..., Engine],
    alone: Callable[..., Any],
    crowd: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A matcher sees each token of its answer once, whatever the engine does on the way."""
    some = requests(n=2, logprobs=1)
    some += [
        Request(f"plain{i}", request.prompt_token_ids, SamplingParams(temperature=0, max_tokens=40))
        for i, request in enumerate(some)
    ]
    expected = alone(new_engine, some)
    engine = new_engine()
    assert crowd(engine, some, seed=3) == expected
    assert engine.scheduler.num_preemptions > 0
    assert crowd(new_engine(), some, seed=4, doomed=frozenset({"r1", "plain2"})) == {
        key: answer for key, answer in expected.items() if key[0] not in ("r1", "plain2")
    }

    real, calls = CompiledModel.step, []

    def failing(self: CompiledModel, *args: Any) -> Any:
        result = real(self, *args)
        calls.append(1)
        if len(calls) % 9 == 5:
            raise RuntimeError("injected")
        return result

    monkeypatch.setattr(CompiledModel, "step", failing)
    assert crowd(new_engine(), some) == expected


def test_an_interrupt_after_sampling_leaves_matchers_where_their_answers_are(
    new_engine: Callable[..., Engine], crowd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = crowd(new_engine(), requests())
    real = Engine._advance_matchers
    calls: list[int] = []

    def interrupted(self: Engine, *args: Any) -> Any:
        result = real(self, *args)
        calls.append(1)
        if len(calls) % 7 == 3:
            raise RuntimeError("injected, after the matchers have advanced")
        return result

    monkeypatch.setattr(Engine, "_advance_matchers", interrupted)
    assert crowd(new_engine(), requests()) == expected


def test_a_complete_answer_ends_at_once_and_before_min_tokens(
    new_engine: Callable[..., Engine], crowd: Callable[..., Any]
) -> None:
    for changes in ({}, {"ignore_eos": True}, {"min_tokens": 20}):
        engine = new_engine()
        answer = crowd(engine, [Request("r", (1, 2), params({"choice": ["abc"]}, **changes))])["r", 0]
        assert answer.finish == ("stop", None)
        assert text_of(engine, answer) == "abc"
        assert engine.tokenizer.eos_ids.isdisjoint(answer.token_ids)


def test_an_answer_that_may_end_or_go_on(new_engine: Callable[..., Engine], crowd: Callable[..., Any]) -> None:
    """The model chooses; the end is not ignored, since nothing may follow it, and waits for min_tokens."""
    lengths = set()
    for seed in range(12):
        for changes in ({}, {"ignore_eos": True}, {"min_tokens": 3, "ignore_eos": seed % 2 == 0}):
            wish = params({"regex": "a+"}, seed=seed, max_tokens=25, temperature=3.0, logit_bias={1: 12.0}, **changes)
            answer = crowd(new_engine(), [Request("r", (1, 2), wish)])["r", 0]
            lengths.add(len(answer.token_ids))
            assert set(answer.token_ids[:-1]) == {answer.token_ids[0]}
            assert answer.finish == ("stop" if answer.token_ids[-1] == 1 else "length", None)
            assert len(answer.token_ids) > changes.get("min_tokens", 0)
    assert len(lengths) > 1


def test_what_the_first_request_needs_can_be_made_ready(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    assert "_grammars" not in vars(engine)
    engine.prepare_structured_outputs()
    assert "_tokenizer" in vars(engine._grammars)


def test_log_probabilities_are_those_of_the_model(new_engine: Callable[..., Engine], crowd: Callable[..., Any]) -> None:
    prompt = tuple(range(50, 60))
    free = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    constrained = params({"regex": "[^]"}, temperature=0, max_tokens=1, logprobs=3)
    forced = params({"choice": ["zz"]}, temperature=0, max_tokens=1, logprobs=3)
    answers = crowd(
        new_engine(), [Request(name, prompt, p) for name, p in (("f", free), ("c", constrained), ("z", forced))]
    )
    (first,), (second,), (third,) = (answers[name, 0].logprobs for name in "fcz")
    assert first.top == second.top == third.top
    assert third.token_id not in dict(third.top) and third.logprob < first.logprob


def test_what_cannot_go_on_ends_alone_with_its_reason(
    new_engine: Callable[..., Engine], crowd: Callable[..., Any]
) -> None:
    hostile = params({"grammar": 'start: a{1,300}\na: b{1,300}\nb: "a" | "c"'}, min_tokens=50)
    other = Request("other", (5, 6), params({"choice": ["perhaps"]}))
    answers = crowd(new_engine(), [Request("hostile", (3, 4), hostile), other])
    reason, why = answers["hostile", 0].finish
    assert reason == "abort" and "structured_outputs cannot be enforced any further" in why
    assert answers["hostile", 0].fault == "request"
    assert answers["other", 0].finish == ("stop", None)


def test_wishes_that_cannot_be_met_are_refused_by_engine_and_front_ends(
    new_engine: Callable[..., Engine], tiny_path: Callable[..., Path]
) -> None:
    bad = params({"json": {"items": {"not": {}}}})
    engine = new_engine()
    with pytest.raises(RequestError, match="#/items/not"):
        engine.add(Request("r", (1, 2), bad))
    assert not engine.has_unfinished

    llm = LLM(str(tiny_path()), max_num_seqs=4, max_step_tokens=64, max_context_len=128, num_blocks=6, num_threads=2)
    with pytest.raises(RequestError, match="#/items/not"):
        llm.generate("hello", bad)
    (output,) = llm.generate("hello", params(WISHES[0], max_tokens=100, n=2))
    for choice in output.outputs:
        if choice.finish_reason == "stop":
            Draft202012Validator(PERSON).validate(json.loads(choice.text))

    async def main() -> None:
        with AsyncEngine(new_engine()) as serving:
            with pytest.raises(RequestError, match="#/items/not"):
                async for _ in serving.generate("hello", bad):
                    pass
            deltas = [delta async for delta in serving.generate("hello", params({"choice": ["yes", "no"]}))]
            assert "".join(delta.text for delta in deltas) in ("yes", "no")
            assert deltas[-1].finish_reason == "stop"

    asyncio.run(main())


def test_stop_strings_still_stop(new_engine: Callable[..., Engine], tiny_path: Callable[..., Path]) -> None:
    llm = LLM(str(tiny_path()), max_num_seqs=4, max_step_tokens=64, max_context_len=128, num_blocks=6, num_threads=2)
    (output,) = llm.generate("hello", params({"choice": ["abcdef"]}, stop=("cd",)))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("ab", "cd")


def test_the_real_model_fills_in_a_schema(smollm2_path: Path) -> None:
    llm = LLM(str(smollm2_path), max_context_len=1024, max_num_seqs=8)
    schema = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 60},
            "year": {"type": "integer", "minimum": 1900, "maximum": 2030},
            "genres": {"type": "array", "items": {"enum": ["drama", "comedy", "horror"]}, "minItems": 1, "maxItems": 2},
            "rating": {"type": ["number", "null"], "minimum": 0, "maximum": 10},
        },
        "required": ["title", "year", "genres", "rating"],
        "additionalProperties": False,
    }
    wanted = StructuredOutputsParams(json=schema)
    wish = partial(SamplingParams, max_tokens=200, structured_outputs=wanted)
    messages = [{"role": "user", "content": "Describe a film you like as JSON."}]
    answers = llm.chat(messages, wish(temperature=0)).outputs
    answers += llm.chat(messages, wish(temperature=1.0, seed=5, n=4)).outputs
    answers += [output.outputs[0] for output in llm.generate(["A film:", "{"], wish(temperature=0.8, seed=1))]
    for answer in answers:
        assert answer.finish_reason == "stop"
        Draft202012Validator(schema).validate(json.loads(answer.text))
    (yes,) = llm.chat(
        [{"role": "user", "content": "Is water wet? Answer yes or no."}],
        SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(choice=("yes", "no"))),
    ).outputs
    assert yes.text in ("yes", "no") and yes.finish_reason == "stop"
