"""Streaming equals the naive definition: decode everything, then cut."""

import codecs
import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_metadata

from strop.core.errors import RequestError
from strop.core.request import Delta, FinishReason, SamplingParams, TokenEvent, TokenLogprob
from strop.engine.text import StreamDetokenizer, must_abort, prepare_prompt
from strop.formats.gguf_tokenizer import tokenizer_from_gguf
from strop.formats.tokenizer import Tokenizer

TOKENIZER = tokenizer_from_gguf(tiny_metadata())
END_ID = 1


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False)


def stream(
    params: SamplingParams,
    chunks: list[list[int]],
    finish_reason: FinishReason | None = "length",
    stop_reason: int | str | None = None,
    tokenizer: Tokenizer = TOKENIZER,
) -> list[Delta]:
    """Deltas of one choice; the last chunk carries `finish_reason`."""
    detokenizer = StreamDetokenizer(tokenizer, params)
    deltas = []
    for position, chunk in enumerate(chunks):
        last = position == len(chunks) - 1
        event = TokenEvent(
            "r",
            0,
            tuple(chunk),
            tuple(TokenLogprob(token_id, -1.0) for token_id in chunk),
            finish_reason if last else None,
            stop_reason if last else None,
        )
        delta = detokenizer.push(event)
        if delta is not None:
            deltas.append(delta)
            assert must_abort(event, delta) == (delta.finish_reason == "stop" and not event.finish_reason)
    return deltas


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("stop", [(), ("never said",)])
def test_the_last_token_is_text_unless_it_only_ended_the_answer(included: bool, stop: tuple[str, ...]) -> None:
    params = SamplingParams(stop=stop, include_stop_str_in_output=included, skip_special_tokens=False)
    eos_id = min(TOKENIZER.eos_ids)
    (ended,) = stream(params, [[*ids_of("a"), eos_id]], "stop")
    assert ended.ended_by_token == (not included) and ended.text == "a" + (TOKENIZER.decode([eos_id], False) * included)
    (complete,) = stream(params, [ids_of("{}")], "stop")  # as a grammar ends it
    assert not complete.ended_by_token and complete.text == "{}"


def naive(params: SamplingParams, ids: list[int]) -> tuple[str, str | None, int]:
    """(text, stop string, tokens used) by decoding every prefix of the tokens as a whole."""

    def stable(num_tokens: int) -> str:
        """Text of the first tokens without an unfinished character at its end."""
        skipped = TOKENIZER.special_ids if params.skip_special_tokens else frozenset[int]()
        data = b"".join(TOKENIZER.token_bytes(i) for i in ids[:num_tokens] if i not in skipped)
        return codecs.utf_8_decode(data, "replace", False)[0]

    whole = TOKENIZER.decode(ids, params.skip_special_tokens, continuation=True)
    unmatched_len = len(stable(params.min_tokens)) if len(ids) > params.min_tokens else len(whole)
    ends = sorted(
        (position + len(stop), -len(stop), stop)
        for stop in params.stop
        for position in range(unmatched_len, len(whole))
        if whole.startswith(stop, position)
    )
    if not ends:
        return whole, None, len(ids)
    end, _, stop = ends[0]
    num_used = next((n for n in range(len(ids)) if len(stable(n)) >= end), len(ids))
    return whole[: end if params.include_stop_str_in_output else end - len(stop)], stop, num_used


TEXTS = st.lists(
    st.sampled_from(["hello", " wor", "é", "😀", "日本", "a", "b", "ab", "aab", "<|end|>", "<note é>", "\ufffd", "\n"])
).map("".join)
BROKEN_IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=6)
IDS = st.lists(st.one_of(TEXTS.map(ids_of), BROKEN_IDS), max_size=6).map(
    lambda parts: [token_id for part in parts for token_id in part]
)
STOPS = st.lists(st.text(st.sampled_from("abhelo wé😀\ufffd日<>|"), min_size=1, max_size=5), max_size=4)


@st.composite
def cases(draw: st.DrawFn) -> tuple[SamplingParams, list[list[int]]]:
    ids = draw(IDS)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    chunks = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    params = SamplingParams(
        stop=tuple(draw(STOPS)),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        max_tokens=None,
        min_tokens=draw(st.sampled_from([0, 0, 1, 3])),
    )
    return params, chunks


@settings(max_examples=600, deadline=None)
@given(cases())
@example((SamplingParams(stop=("abcd", "bc")), [ids_of("xab"), ids_of("c")]))
@example((SamplingParams(stop=("aab",)), [ids_of("aaa"), ids_of("b")]))
@example((SamplingParams(stop=("\ufffd",)), [ids_of("é")[:1], [2 + 0xC2]]))
@example((SamplingParams(stop=("\ufffd",), min_tokens=3), [ids_of("é")[:1]]))
def test_any_chunking_gives_the_naive_text(case: tuple[SamplingParams, list[list[int]]]) -> None:
    params, chunks = case
    ids = [token_id for chunk in chunks for token_id in chunk]
    text, stop, num_used = naive(params, ids)
    deltas = stream(params, chunks)
    assert "".join(delta.text for delta in deltas) == text
    assert [i for delta in deltas for i in delta.token_ids] == ids[:num_used]
    assert [row.token_id for delta in deltas for row in delta.logprobs] == ids[:num_used]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (("stop", stop) if stop else ("length", None))
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_text_comes_as_soon_as_it_is_certain() -> None:
    deltas = stream(SamplingParams(stop=("hello world",)), [ids_of(piece) for piece in ("hell", "o", " wor", "m", "é")])
    assert [delta.text for delta in deltas] == ["", "", "", "hello worm", "é"]


def test_a_character_waits_for_its_last_byte() -> None:
    first, *rest = TOKENIZER.encode("😀", add_special=False)
    assert len(rest) == 2  # two bytes merged, two alone
    assert [delta.text for delta in stream(SamplingParams(), [[first], [rest[0]], [rest[1]]])] == ["", "", "😀"]
    assert [delta.text for delta in stream(SamplingParams(), [[first], [rest[0]]])] == ["", "\ufffd"]
    assert [delta.text for delta in stream(SamplingParams(), [[first], ids_of("a")])] == ["", "\ufffda"]


def test_stop_string_ends_the_choice_and_later_events_are_ignored() -> None:
    detokenizer = StreamDetokenizer(TOKENIZER, SamplingParams(stop=("lo w",), n=2))
    first = TokenEvent("r", 0, tuple(ids_of("hello")))
    second = TokenEvent("r", 0, tuple(ids_of(" world")), num_cached_tokens=7)
    delta = detokenizer.push(first)
    assert delta is not None
    assert (delta.text, delta.finish_reason) == ("hel", None)
    delta = detokenizer.push(second)
    assert delta is not None
    assert must_abort(second, delta)
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.num_cached_tokens) == ("", "stop", "lo w", 7)
    assert delta.token_ids == second.token_ids[:1]
    assert detokenizer.push(TokenEvent("r", 0, (), finish_reason="abort")) is None
    other = detokenizer.push(dataclasses.replace(second, index=1))
    assert other is not None
    assert other.text == " world"


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_token_that_ends_an_answer_adds_no_text(skip_special_tokens: bool) -> None:
    params = SamplingParams(skip_special_tokens=skip_special_tokens)
    (delta,) = stream(params, [[*ids_of("hello"), END_ID]], "stop")
    assert (delta.text, delta.token_ids[-1]) == ("hello", END_ID)
    (delta,) = stream(params, [ids_of("hello é")], "stop", stop_reason=ids_of("é")[0])
    assert delta.text == "hello "
    (delta,) = stream(params, [ids_of("hello")], "stop")  # an engine that keeps the ending token to itself
    assert delta.text == "hello"


def test_the_ending_token_shows_when_asked_for() -> None:
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    (delta,) = stream(params, [[*ids_of("hello"), END_ID]], "stop")
    assert delta.text == "hello<|end|>"


def test_special_tokens_in_the_middle_follow_the_option() -> None:
    ids = ids_of("a<|start|>b<note é>")
    assert "".join(delta.text for delta in stream(SamplingParams(), [ids])) == "ab<note é>"
    shown = stream(SamplingParams(skip_special_tokens=False), [ids])
    assert "".join(delta.text for delta in shown) == "a<|start|>b<note é>"


def test_prompts_of_every_kind() -> None:
    framed = tokenizer_from_gguf(tiny_metadata(add_bos_token=True))
    assert prepare_prompt(framed, "hello") == (0, *ids_of("hello"))
    assert prepare_prompt(framed, ids_of("hello")) == tuple(ids_of("hello"))
    try:
        chat = prepare_prompt(framed, [{"role": "user", "content": "hello"}])
    finally:
        framed.close()
    assert chat == tuple(ids_of("<|start|>user\nhello<|end|>\n<|start|>assistant\n"))
    assert (chat.count(0), chat.count(1)) == (2, 1)  # control tokens were recognised


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([5, TOKENIZER.vocab_size], f"token id {TOKENIZER.vocab_size} at prompt position 1 is out of range: 0 to "),
        ([-1], "token id -1"),
        ([True], "prompt item 0 is bool"),
        ([1.0], "prompt item 0 is float"),
        ([{"content": "x"}], "message 0 has role=None"),
        ([{"role": "user", "content": "x"}, 3], "prompt item 0 is dict"),
        (None, "not NoneType"),
        ({"role": "user"}, "not dict"),
        (b"bytes", "not bytes"),
    ],
)
def test_impossible_prompts_are_refused_by_name(prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        prepare_prompt(TOKENIZER, prompt)  # type: ignore[arg-type]


def test_the_models_vocabulary_may_be_larger() -> None:
    assert prepare_prompt(TOKENIZER, [TOKENIZER.vocab_size], vocab_size=TOKENIZER.vocab_size + 1)
