"""/v1/completions, /v1/embeddings, /v1/models, /tokenize and /detokenize."""

import base64
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from openai_exchanges import USER, WEATHER, ScriptedTools, answer, body, drive, frames, served

from strop.core.request import Delta, EmbeddingOutput, EmbeddingRequestOutput, TokenLogprob
from strop.serve.openai import completions, embeddings, models, tokenize
from strop.serve.openai.errors import ApiError


def parse(server: dict[str, Any] | None = None, **fields: Any) -> completions.CompletionExchange:
    given = {"model": "tiny", "prompt": "Hello", **fields}
    return completions.parse(body(given), served(**(server or {})), request_id="x", created_s=5)


def completion(sent: bytes) -> Any:
    return pytest.importorskip("openai.types").Completion.model_validate_json(sent)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", ["Hi"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_every_form_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    exchange = parse(prompt=prompt)
    assert [asked.prompt for asked in exchange.asked] == prompts
    assert exchange.asked[0].params.max_tokens == 16


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [[1], 2], [-1], [1.5], [True], {"a": 1}, None, [None], [[["a"]]]]
)
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse(prompt=prompt)
    assert str(caught.value.param).startswith("prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_choices_come_in_the_order_of_prompts(stream: bool) -> None:
    exchange = parse(prompt=["a", "b"], n=2, stream=stream, stream_options={"include_usage": True} if stream else None)
    exchange.begin(0, (1, 2))
    exchange.begin(1, (1, 2, 3))
    sent = b""
    for which in (1, 0):
        for index in (1, 0):
            for delta in answer(f"{which}", f"{index}", index=index, finish_reason="length"):
                sent += exchange.push(which, delta)
    sent += exchange.end()
    expected = {0: "00", 1: "01", 2: "10", 3: "11"}
    if stream:
        *chunks, last = frames(sent)
        texts: dict[int, str] = {}
        for chunk in chunks:
            assert chunk["usage"] is None and chunk["object"] == "text_completion"
            (choice,) = chunk["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert texts == expected
        ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert ends.count("length") == 4 and ends.count(None) == len(ends) - 4
        assert last["choices"] == []
        usage = last["usage"]
    else:
        reply = completion(sent)
        assert {choice.index: choice.text for choice in reply.choices} == expected
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        usage = reply.usage.model_dump()
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 12)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize("prompt", ["Hé", list("Hé".encode())])
@pytest.mark.parametrize("stream", [False, True])
def test_echo(prompt: Any, stream: bool) -> None:
    sent = drive(parse(prompt=prompt, echo=True, stream=stream, n=2), [*answer("a", index=1), *answer("b", "c")])
    if stream:
        choices = [frame["choices"][0] for frame in frames(sent)]
        texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in (0, 1)]
    else:
        texts = [choice.text for choice in completion(sent).choices]
    assert texts == ["Hébc", "Héa"]


def listed(sent: bytes, stream: bool, index: int = 0) -> dict[str, list[Any]]:
    """The lists of log probabilities of one choice."""
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for frame in frames(sent) if stream else [json.loads(sent)]:
        for choice in frame["choices"]:
            for name, values in (choice["logprobs"] or {}).items() if choice["index"] == index else ():
                lists[name] += values
    return lists


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "ids"), [("Hi", (300, 72, 105)), ([72, 105], (72, 105))])
def test_echo_with_logprobs_tells_of_the_prompt(prompt: Any, ids: tuple[int, ...], stream: bool) -> None:
    exchange = parse(prompt=prompt, echo=True, logprobs=1, stream=stream, n=2)
    assert (exchange.asked[0].params.logprobs, exchange.asked[0].params.prompt_logprobs) == (1, 1)
    exchange.begin(0, ids)
    sent = b""
    first, *rest = answer("a", logprob=-1.0)
    told = tuple(TokenLogprob(i, -2.0, ((65, -0.5),)) for i in ids[1:])
    for delta in [replace(first, prompt_logprobs=told), *rest, *answer("b", index=1, logprob=-1.0)]:
        sent += exchange.push(0, delta)
    sent += exchange.end()
    is_framed = len(ids) == 3
    for index, text in enumerate("ab"):
        lists = listed(sent, stream, index)
        assert lists["tokens"] == (["<|300|>"] if is_framed else []) + ["H", "i", text]
        assert lists["token_logprobs"] == [None, *[-2.0] * (len(ids) - 1), -1.0]
        assert lists["top_logprobs"][0] is None and lists["top_logprobs"][1] == {"A": -0.5, lists["tokens"][1]: -2.0}
        assert lists["text_offset"] == ([0] if is_framed else []) + [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_but_the_prompts(stream: bool) -> None:
    exchange = parse(prompt="Hi", echo=True, logprobs=0, max_tokens=0, stream=stream, stream_options=None)
    assert exchange.asked[0].params.max_tokens == 1  # the engine writes at least one
    exchange.begin(0, (72, 105))
    told = (TokenLogprob(105, -2.0),)
    sent = exchange.push(0, Delta("r", 0, "!", (33,), (TokenLogprob(33, -1.0),), "length", None, 0, told))
    sent += exchange.end()
    assert listed(sent, stream)["tokens"] == ["H", "i"]
    choice = (frames(sent)[0] if stream else json.loads(sent))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    if not stream:
        assert json.loads(sent)["usage"]["completion_tokens"] == 0
    with pytest.raises(ApiError, match="max_tokens=0"):
        parse(max_tokens=0)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    sent = drive(parse(logprobs=2, stream=stream), answer("a€", "b", logprob=-1.0))
    lists = listed(sent, stream)
    assert lists["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert lists["token_logprobs"] == [-1.0] * 5
    assert lists["text_offset"] == [0, 1, 1, 1, 2]
    assert lists["top_logprobs"][0] == {"a": -1.0, "A": -9.5}
    if not stream:
        assert completion(sent).choices[0].logprobs.tokens == lists["tokens"]


def test_nothing_new_sends_nothing() -> None:
    exchange = parse(stream=True)
    exchange.begin(0, (1,))
    assert exchange.push(0, Delta("r", 0, "", (5,))) == b""


def test_a_prompt_without_room_for_its_answer_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        parse({"context_len": 20}).begin(0, (1,) * 5)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def embed(vectors: list[list[float]], **fields: Any) -> Any:
    server = served(embedding_len=len(vectors[0]), embeddings_may_be_cut=fields.pop("may_be_cut", False))
    exchange = embeddings.parse(body({"model": "tiny", **fields}), server)
    outputs = [EmbeddingRequestOutput(str(i), EmbeddingOutput(v), [1, 2]) for i, v in enumerate(vectors)]
    assert len(exchange.inputs) == len(outputs)
    return pytest.importorskip("openai.types").CreateEmbeddingResponse.model_validate_json(exchange.reply(outputs))


def test_embeddings_as_numbers_and_as_base64() -> None:
    reply = embed([[0.5, -1.0], [3.0, 4.0]], input=["a", "b"])
    assert [(entry.index, entry.embedding) for entry in reply.data] == [(0, [0.5, -1.0]), (1, [3.0, 4.0])]
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (4, 4)
    data = json.loads(
        embeddings.parse(
            body({"model": "tiny", "input": [1, 2], "encoding_format": "base64"}), served(embedding_len=2)
        ).reply([EmbeddingRequestOutput("0", EmbeddingOutput([0.5, -1.0]), [1, 2])])
    )
    assert struct.unpack("<2f", base64.b64decode(data["data"][0]["embedding"])) == (0.5, -1.0)


def test_dimensions() -> None:
    assert embed([[3.0, 4.0]], input="a", dimensions=2).data[0].embedding == [3.0, 4.0]
    cut = embed([[3.0, 4.0, 12.0]], input="a", dimensions=2, may_be_cut=True).data[0].embedding
    assert cut == pytest.approx([0.6, 0.8])
    with pytest.raises(ApiError, match="not known to keep their meaning"):
        embed([[3.0, 4.0]], input="a", dimensions=1)
    with pytest.raises(ApiError, match="dimensions=3: this model's vectors have 2"):
        embed([[3.0, 4.0]], input="a", dimensions=3, may_be_cut=True)
    with pytest.raises(ApiError, match="generates text"):
        embeddings.parse(body(model="tiny", input="a"), served())


@pytest.mark.parametrize("given", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_inputs_are_texts_or_ids(given: Any) -> None:
    inputs = embeddings.parse(body(model="tiny", input=given), served(embedding_len=2)).inputs
    several = isinstance(given, list) and not isinstance(given[0], int)
    assert len(inputs) == (2 if several else 1)


def test_models() -> None:
    types = pytest.importorskip("openai.types")
    listed = json.loads(models.models_body(served()))
    assert listed["object"] == "list"
    assert [types.Model.model_validate(card).id for card in listed["data"]] == ["tiny", "org/tiny"]
    card = types.Model.model_validate_json(models.model_body(served(), "org/tiny"))
    assert (card.id, card.object, card.created) == ("org/tiny", "model", 1)
    with pytest.raises(ApiError) as caught:
        models.model_body(served(), "none")
    assert caught.value.status == 404


def test_tokenize_and_detokenize() -> None:
    text = tokenize.parse_tokenize(body(prompt="Hi", add_special_tokens=False, return_token_strs=True), served())
    assert (text.prompt, text.template, text.add_special) == ("Hi", {}, False)
    assert json.loads(text.reply((72, 105))) == {
        "count": 2,
        "max_model_len": 1000,
        "tokens": [72, 105],
        "token_strs": ["H", "i"],
    }
    tools = [{"type": "function", "function": WEATHER}]
    chat = tokenize.parse_tokenize(body(messages=[USER], tools=tools), served(tools=ScriptedTools()))
    assert chat.prompt == [USER]
    assert chat.template["add_generation_prompt"] is True and chat.template["tools"][0]["function"] == WEATHER
    assert json.loads(chat.reply((1,)))["token_strs"] is None
    with pytest.raises(ApiError, match="one of them"):
        tokenize.parse_tokenize(body(prompt="a", messages=[USER]), served())
    assert tokenize.parse_detokenize(body(tokens=[1, 2]), served()) == (1, 2)
    assert json.loads(tokenize.detokenize_body("é")) == {"prompt": "é"}
