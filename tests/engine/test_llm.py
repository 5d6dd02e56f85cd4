"""What callers of LLM see: prompts of every kind, every parameter, errors that change nothing."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.core.errors import CapacityError, RequestError, UnsupportedError
from strop.core.request import RequestOutput, SamplingParams
from strop.llm import LLM


@pytest.fixture(scope="module")
def llm(tiny_path: Callable[..., Path], loaded: Callable[..., Any]) -> LLM:
    loaded()  # skips without the native library
    return LLM(str(tiny_path()), max_num_seqs=4, max_step_tokens=64, max_context_len=128, num_blocks=6, num_threads=2)


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 16, "ignore_eos": True} | params))


def only(outputs: list[RequestOutput]) -> Any:
    assert len(outputs) == 1
    assert len(outputs[0].outputs) == 1
    return outputs[0].outputs[0]


def test_prompts_of_every_kind(llm: LLM) -> None:
    text = "hello world é"
    ids = llm.engine.tokenizer.encode(text, add_special=True)
    by_text = llm.generate(text, greedy())
    assert by_text[0].prompt == text
    assert by_text[0].prompt_token_ids == ids
    assert only(by_text).text == llm.engine.tokenizer.decode(only(by_text).token_ids, continuation=True)
    assert only(by_text).finish_reason == "length"
    assert only(by_text).logprobs is None
    assert only(llm.generate(ids, greedy())) == only(by_text)
    assert only(llm.generate([ids], greedy())) == only(by_text)

    messages = [{"role": "user", "content": text}]
    chat = llm.chat(messages, greedy())
    rendered = llm.engine.tokenizer.apply_chat_template(messages)
    assert chat.prompt_token_ids == llm.engine.tokenizer.encode(rendered, add_special=False)
    assert only(llm.generate(messages, greedy())) == chat.outputs[0]

    several = llm.generate([text, ids, messages, "x"], [greedy(), greedy(max_tokens=3), greedy(), greedy()])
    assert [output.prompt for output in several] == [text, None, None, "x"]
    assert several[0].outputs[0] == only(by_text)
    assert several[1].outputs[0].token_ids == only(by_text).token_ids[:3]
    assert several[2].outputs[0] == chat.outputs[0]
    assert llm.generate([], greedy()) == []


def test_chat_passes_what_the_template_takes(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = "{{ messages[0].content }}{{ tools[0].name }}{{ documents[0].text }}{{ enable_thinking }}"
    given = {"tools": [{"name": "f"}], "documents": [{"text": "d"}], "enable_thinking": False}
    chat = llm.chat(messages, greedy(), chat_template=template, **given)
    assert chat.prompt_token_ids == llm.engine.tokenizer.encode("hifdFalse", add_special=False)
    with pytest.raises(RequestError, match="no place for tools"):
        llm.chat(messages, greedy(), tools=[{"name": "f"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took longer"),
        ("{{ 'a' * 10**9 }}", "too much memory"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "longer than"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
    ids=["loop", "memory", "output", "escape"],
)
def test_a_hostile_template_costs_one_request(
    llm: LLM, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = llm.generate("hello", greedy())
    messages = [{"role": "user", "content": "hi"}]
    monkeypatch.setattr(llm.engine.tokenizer._renderer, "timeout_s", 1.0)
    with pytest.raises(RequestError, match=message):
        llm.chat(messages, greedy(), chat_template=template)
    monkeypatch.undo()
    assert llm.chat(messages, greedy()).outputs[0].token_ids
    assert only(llm.generate("hello", greedy())) == only(before)


def test_stream_adds_up(llm: LLM) -> None:
    params = SamplingParams(temperature=1.2, seed=5, n=2, max_tokens=30, logprobs=1, stop=("e", "zz"))
    whole = llm.generate(["hello", "world"], params)
    texts: dict[tuple[int, int], str] = {}
    for delta in llm.stream(["hello", "world"], params):
        key = (int(delta.request_id), delta.index)
        texts[key] = texts.get(key, "") + delta.text
    assert texts == {(i, c.index): c.text for i, output in enumerate(whole) for c in output.outputs}


def test_a_stream_left_early_frees_everything(llm: LLM) -> None:
    before = llm.generate("hello", greedy())
    stream = llm.stream(["hello", "world"], greedy(max_tokens=60))
    next(stream)
    with pytest.raises(RequestError, match="close"):
        llm.generate("hello", greedy())
    stream.close()  # type: ignore[attr-defined]
    assert only(llm.generate("hello", greedy())) == only(before)
    assert llm.engine.scheduler.groups.pools[0].num_free == 5


def test_stop_strings_and_token_ids(llm: LLM) -> None:
    free = only(llm.generate("hello", greedy(max_tokens=40)))
    stop = free.text[9:12]
    cut = free.text.index(stop)
    stopped = only(llm.generate("hello", greedy(max_tokens=40, stop=("never seen", stop))))
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (free.text[:cut], "stop", stop)
    with_stop = only(llm.generate("hello", greedy(max_tokens=40, stop=stop, include_stop_str_in_output=True)))
    assert with_stop.text == free.text[: cut + len(stop)]
    token_id = free.token_ids[5]
    by_id = only(llm.generate("hello", greedy(stop_token_ids=(token_id,))))
    at = free.token_ids.index(token_id)
    assert by_id.token_ids == free.token_ids[: at + 1]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", token_id)
    later = only(llm.generate("hello", greedy(stop_token_ids=(token_id,), min_tokens=10)))
    assert len(later.token_ids) >= 10
    assert token_id not in later.token_ids[:9]


def test_end_of_sequence(llm: LLM) -> None:
    towards_end = {1: 1e4}
    ended = only(llm.generate("hello", greedy(ignore_eos=False, logit_bias=towards_end)))
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([1], "", "stop", None)
    ignored = only(llm.generate("hello", greedy(logit_bias=towards_end)))
    assert ignored.token_ids == [1] * 16
    forced = only(llm.generate("hello", greedy(ignore_eos=False, min_tokens=6, logit_bias=towards_end)))
    assert len(forced.token_ids) == 7
    assert forced.token_ids[6] == 1


def test_prompt_logprobs(llm: LLM) -> None:
    """Of a prompt of more tokens than a step may score, with and without choices that share it."""
    prompt = [3 + 7 * i % 250 for i in range(45)]
    llm.generate([prompt], greedy())  # its blocks are cached now, and of no use
    logits = np.concatenate(list(llm.engine.score(prompt))).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for n in (1, 2):
        (result,) = llm.generate([prompt], greedy(prompt_logprobs=2, n=n))
        first, *others = result.prompt_logprobs
        assert first is None
        assert [entry.token_id for entry in others] == prompt[1:]
        np.testing.assert_allclose(
            [entry.logprob for entry in others], expected[np.arange(44), prompt[1:]], rtol=0, atol=1e-4
        )
        best = [(entry.top[0][0], len(entry.top)) for entry in others]
        assert best == [(token_id, 2) for token_id in expected[:44].argmax(-1)]
        assert result.num_cached_tokens == 0
    assert llm.generate([prompt], greedy())[0].prompt_logprobs is None


def test_logprobs(llm: LLM) -> None:
    choice = only(llm.generate("hello", greedy(logprobs=3)))
    assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
    for entry in choice.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert 0 >= entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    alone = only(llm.generate("hello", greedy(logprobs=0)))
    assert [entry.logprob for entry in alone.logprobs] == [entry.logprob for entry in choice.logprobs]
    assert all(entry.top == () for entry in alone.logprobs)


def test_penalties_and_bias(llm: LLM) -> None:
    tokens = only(llm.generate("hello", greedy(max_tokens=30))).token_ids
    assert len(set(only(llm.generate("hello", greedy(max_tokens=30, presence_penalty=1e6))).token_ids)) == 30
    assert len(set(only(llm.generate("hello", greedy(max_tokens=30, frequency_penalty=1e6))).token_ids)) == 30
    unrepeated = only(llm.generate("hello", greedy(max_tokens=30, repetition_penalty=1e6))).token_ids
    assert set(unrepeated).isdisjoint(llm.engine.tokenizer.encode("hello", add_special=True))
    banned = only(llm.generate("hello", greedy(max_tokens=30, logit_bias={t: -1e6 for t in set(tokens)})))
    assert set(banned.token_ids).isdisjoint(tokens)


def test_seeds(llm: LLM) -> None:
    def answer(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1, seed=seed, max_tokens=20, ignore_eos=True)
        return list(only(llm.generate("hello", params)).token_ids)

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(-5) == answer(-5) != answer(5)
    assert answer(None) != answer(None)


@pytest.mark.parametrize(
    ("prompts", "params", "named"),
    [
        ("", None, "empty"),
        (["fine", ""], None, "empty"),
        (["fine", [5, 268]], None, "268"),
        (["fine", [5, "x"]], None, "str"),
        (["fine", [True, 5]], None, "bool"),
        (["fine", 5.0], None, "float"),
        ([{"content": "no role"}], None, "role"),
        (["fine", "x" * 200], None, "context"),
        (["fine", "x" * 100], SamplingParams(max_tokens=100), "max_tokens"),
        (["one", "two"], [SamplingParams()], "1 sampling_params for 2 prompts"),
        (["fine", "fine"], [SamplingParams(), SamplingParams(logit_bias={500: 1})], "500"),
    ],
)
def test_errors_change_nothing(llm: LLM, prompts: Any, params: Any, named: str) -> None:
    expected = only(llm.generate("hello", greedy()))
    with pytest.raises(RequestError, match=named):
        llm.generate(prompts, params)
    with pytest.raises(RequestError, match=named):
        list(llm.stream(prompts, params))
    assert not llm.engine.has_unfinished
    assert llm.engine.scheduler.groups.pools[0].num_free == 5
    assert only(llm.generate("hello", greedy())) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": 1.5},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 20, "max_tokens": 10},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"logprobs": 21},
        {"stop": ("",)},
        {"logit_bias": {1: float("nan")}},
    ],
    ids=str,
)
def test_wrong_parameters_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="|".join(wrong)):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"max_context_len": 129}, RequestError, "128"),
        ({"max_num_seqs": 0}, RequestError, "max_num_seqs"),
        ({"block_len": 0}, RequestError, "block_len"),
        ({"max_step_tokens": -4}, RequestError, "max_step_tokens"),
        ({"memory_bytes": 2**20}, CapacityError, "does not fit"),
        ({"num_blocks": 2**40}, CapacityError, "num_blocks"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(
    tiny_path: Callable[..., Path], settings: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        LLM(str(tiny_path()), **settings)


def test_config_or_its_fields(llm: LLM, tiny_path: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="not both"):
        LLM(str(tiny_path()), llm.engine.config, **asdict(llm.engine.config))
    with contextlib.suppress(UnsupportedError), pytest.raises(Exception, match="no such file"):
        LLM("no-such-model.gguf")
