"""OpenAI's own Python client against real servers. test_openai_versions runs this file with the 2.x client, too."""

import asyncio
import math
import struct
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server_process import metric, wait_for, wait_until_idle

MODEL = "smollm2"
QUESTION: Any = [{"role": "user", "content": "Name three colours of the rainbow."}]
SHORT: Any = [{"role": "user", "content": "hi"}]  # its answer ends by itself: the stream helper raises on "length"
GREEDY: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 24}


def test_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(**GREEDY)
    (choice,) = reply.choices
    assert (reply.object, reply.model, choice.index, choice.message.role) == ("chat.completion", MODEL, 0, "assistant")
    assert choice.message.content and choice.message.tool_calls is None and choice.logprobs is None
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 24 or choice.finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint
    again = client.chat.completions.create(**GREEDY)
    assert again.choices[0].message == choice.message
    assert again.id != reply.id


def test_chat_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *answer, last = chunks
    assert (last.choices, _usage(last.usage)) == ([], _usage(whole.usage))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in answer)
    assert answer[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in answer[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in answer]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    plain = list(client.chat.completions.create(**GREEDY, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_chat_stream_helper(client: OpenAI) -> None:
    settings: dict[str, Any] = {**GREEDY, "messages": SHORT}
    whole = client.chat.completions.create(**settings)
    with client.chat.completions.stream(**settings, stream_options={"include_usage": True}) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert _usage(final.usage) == _usage(whole.usage)
    assert {"chunk", "content.delta", "content.done"} <= set(events)


def test_several_choices(client: OpenAI) -> None:
    settings: dict[str, Any] = {**GREEDY, "n": 4, "temperature": 1.0, "seed": 7, "stop": [" "]}
    whole = client.chat.completions.create(**settings)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    with client.chat.completions.stream(**settings, stream_options={"include_usage": True}) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == texts
    assert [choice.finish_reason for choice in final.choices] == [choice.finish_reason for choice in whole.choices]
    assert final.usage is not None and whole.usage is not None
    one = client.chat.completions.create(**{**settings, "n": 1})
    assert one.choices[0].message.content == texts[0]
    assert one.usage is not None and final.usage.prompt_tokens == whole.usage.prompt_tokens == one.usage.prompt_tokens


def test_logprobs(client: OpenAI) -> None:
    settings: dict[str, Any] = {**GREEDY, "logprobs": True, "top_logprobs": 3, "messages": _user("Say: naïve 🙂 日本")}
    whole = client.chat.completions.create(**settings).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content and whole.message.content is not None
    for token in whole.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == max(top.logprob for top in token.top_logprobs) == token.logprob <= 0
    assert _bytes(whole.logprobs.content).decode("utf-8", "replace") == whole.message.content
    streamed = []
    for chunk in client.chat.completions.create(**settings, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == whole.logprobs.content


def test_sampling_fields(client: OpenAI) -> None:
    def text(**more: Any) -> str:
        reply = client.chat.completions.create(**{**GREEDY, **more})
        assert reply.choices[0].finish_reason in ("stop", "length")
        return reply.choices[0].message.content or ""

    plain = text()
    word = plain.split()[2]
    assert text(stop=word) == plain[: plain.index(word)]
    assert text(stop=["never there", word]) == plain[: plain.index(word)]
    assert plain.startswith(text(max_tokens=3, max_completion_tokens=None))
    assert text(temperature=1, seed=3) == text(temperature=1, seed=3)
    assert len({text(temperature=1, seed=seed) for seed in range(4)}) > 1
    assert text(frequency_penalty=2.0, presence_penalty=2.0, max_completion_tokens=60) != text(max_completion_tokens=60)
    assert text(extra_body={"top_k": 1}, temperature=1, seed=1) == plain
    (colon,) = client.post("/../tokenize", body={"prompt": "\n"}, cast_to=object)["tokens"]  # type: ignore[index]
    assert text(logit_bias={str(colon): 100}) == "\n" * 24


def test_text_completions(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    one = client.completions.create(prompt="The sun rises in the", **settings)
    assert (one.object, one.choices[0].finish_reason) == ("text_completion", "length")
    echoed = client.completions.create(prompt="The sun rises in the", echo=True, **settings)
    assert echoed.choices[0].text == "The sun rises in the" + one.choices[0].text
    ids = client.post("/../tokenize", body={"prompt": "The sun rises in the"}, cast_to=object)["tokens"]  # type: ignore[index]
    several = client.completions.create(prompt=[ids, ids], n=2, **settings)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in several.choices} == {one.choices[0].text}
    with_logprobs = client.completions.create(prompt="The sun rises in the", logprobs=2, **settings).choices[0]
    assert with_logprobs.logprobs is not None
    assert "".join(with_logprobs.logprobs.tokens or []) == with_logprobs.text == one.choices[0].text
    assert [len(top) for top in with_logprobs.logprobs.top_logprobs or []] == [2] * 12
    streamed = [""] * 2
    last = None
    for last in client.completions.create(
        prompt=["The sun rises in the", "Once"], stream=True, stream_options={"include_usage": True}, **settings
    ):
        for choice in last.choices:
            streamed[choice.index] += choice.text
    assert last is not None and last.usage is not None and last.usage.completion_tokens == 24
    assert streamed[0] == one.choices[0].text
    assert streamed[1] == client.completions.create(prompt="Once", **settings).choices[0].text


def test_responses(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 40}
    first = client.responses.create(input="Say hello in one word.", instructions="Be brief.", **settings)
    assert (first.object, first.error, first.incomplete_details) == ("response", None, None)
    assert first.status == "completed" and first.output_text and first.usage is not None
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    chat = client.chat.completions.create(
        model=MODEL,
        temperature=0,
        max_completion_tokens=40,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello in one word."}],
    )
    assert first.output_text == chat.choices[0].message.content
    history: list[Any] = [
        {"role": "user", "content": "Say hello in one word."},
        *(item.to_dict() for item in first.output),
        {"role": "user", "content": [{"type": "input_text", "text": "And goodbye."}]},
    ]
    assert client.responses.create(input=history, **settings).output_text
    short = client.responses.create(input="Tell a long story.", **{**settings, "max_output_tokens": 5})
    assert short.status == "incomplete"
    assert short.incomplete_details is not None and short.incomplete_details.reason == "max_output_tokens"


def test_responses_stream(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 24, "input": "Name a colour."}
    whole = client.responses.create(**settings)
    events = list(client.responses.create(**settings, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert "".join(deltas) == whole.output_text
    with client.responses.stream(**settings) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert (final.output_text, final.status) == (whole.output_text, whole.status)
    assert final.usage is not None and whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_embeddings(embedder: OpenAI) -> None:
    texts = ["a sharp knife", "ab cd", "a sharp knife"]
    floats = embedder.embeddings.create(model="encoder", input=texts, encoding_format="float")
    packed = embedder.embeddings.create(model="encoder", input=texts)  # base64 on the wire, unless numpy is missing
    assert [item.index for item in packed.data] == [0, 1, 2]
    vectors = [item.embedding for item in floats.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert [_rounded(item.embedding) for item in packed.data] == [_rounded(vector) for vector in vectors]
    assert math.sqrt(sum(number * number for number in vectors[1])) == pytest.approx(1, abs=1e-5)
    raw = embedder.embeddings.with_raw_response.create(model="encoder", input="ab cd", encoding_format="base64")
    assert _unpacked(raw.http_response.json()["data"][0]["embedding"]) == _rounded(vectors[1])
    ids = embedder.post("/../tokenize", body={"prompt": "ab cd"}, cast_to=object)["tokens"]  # type: ignore[index]
    by_ids = embedder.embeddings.create(model="encoder", input=ids, encoding_format="float")
    assert by_ids.data[0].embedding == vectors[1]
    assert by_ids.usage.prompt_tokens == by_ids.usage.total_tokens == len(ids)
    same = embedder.embeddings.create(model="encoder", input="ab cd", dimensions=len(vectors[1]))
    assert len(same.data[0].embedding) == len(vectors[1])
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        embedder.embeddings.create(model="encoder", input="ab cd", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="tokens"):
        embedder.embeddings.create(model="encoder", input="ab cd " * 2000)


def test_models(client: OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object) == (MODEL, "model") and card.created > 0 and card.owned_by
    assert client.models.retrieve(MODEL) == card
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/other-model")
    assert caught.value.code == "model_not_found"


def test_what_is_wrong_is_said_once(client: OpenAI, server_url: str) -> None:
    eager = client.with_options(max_retries=2)
    before = metric(server_url, "strop:http_requests_total")

    def refused(kind: type[openai.APIStatusError], code: str | None, param: str | None, **more: Any) -> None:
        with pytest.raises(kind) as caught:
            eager.chat.completions.create(**{**GREEDY, **more})
        assert (caught.value.code, caught.value.param) == (code, param), caught.value
        assert caught.value.type == "invalid_request_error" and caught.value.request_id

    refused(openai.NotFoundError, "model_not_found", "model", model="gpt-4")
    refused(openai.BadRequestError, "context_length_exceeded", "messages", max_completion_tokens=5000)
    refused(openai.BadRequestError, "context_length_exceeded", "messages", messages=_user("no " * 3000))
    refused(openai.BadRequestError, "context_length_exceeded", "messages", messages=_user("no " * 3000), stream=True)
    refused(openai.BadRequestError, None, "max_tokenz", extra_body={"max_tokenz": 3})
    refused(openai.BadRequestError, None, "n", n=1000)
    refused(openai.BadRequestError, None, "temperature", temperature=-1)
    refused(openai.BadRequestError, None, "messages", messages=[])
    refused(openai.BadRequestError, None, "store", store=True)
    with pytest.raises(openai.BadRequestError, match="best_of"):
        eager.completions.create(model=MODEL, prompt="a", best_of=2)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        eager.responses.create(model=MODEL, input="a", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="embeds"):
        eager.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.NotFoundError):
        eager.moderations.create(input="a")
    assert metric(server_url, "strop:http_requests_total") - before == 13 + 1  # and the look at the metrics before


def test_keys(busy: OpenAI) -> None:
    assert busy.models.list().data
    with pytest.raises(openai.AuthenticationError) as caught:
        busy.with_options(api_key="sk-wrong", max_retries=2).chat.completions.create(**GREEDY)
    assert caught.value.code == "invalid_api_key"


def test_a_full_queue_and_a_retry(busy: OpenAI, keyed_url: str) -> None:
    token = {"Authorization": f"Bearer {busy.api_key}"}
    long: dict[str, Any] = {**GREEDY, "max_completion_tokens": 1500, "extra_body": {"ignore_eos": True}}
    rejected = lambda: metric(keyed_url, "strop:requests_rejected_total", **token)  # noqa: E731
    waiting = lambda: metric(keyed_url, "vllm:num_requests_waiting", **token)  # noqa: E731
    before = rejected()
    running = [busy.chat.completions.create(**long, stream=True) for _ in range(2)]
    for stream in running:
        next(stream)
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(busy.chat.completions.create, **GREEDY)
        wait_for(waiting, "the third to wait")
        with pytest.raises(openai.RateLimitError) as caught:
            busy.chat.completions.create(**GREEDY)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
        assert caught.value.code == "rate_limit_exceeded"
        retries = pool.submit(busy.with_options(max_retries=20).chat.completions.create, **GREEDY)
        wait_for(lambda: rejected() - before >= 2, "a second rejection")
        for stream in running:
            stream.close()
        assert retries.result().choices[0].message == waits.result().choices[0].message


def test_request_ids_and_raw_responses(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**GREEDY, extra_headers={"X-Request-ID": "my-id.1"})
    assert raw.headers["x-request-id"] == raw.request_id == "my-id.1"
    assert raw.headers["content-type"] == "application/json"
    reply = raw.parse()
    assert reply._request_id == "my-id.1" and reply.id == "chatcmpl-my-id.1"
    assert client.models.list()._request_id not in (None, client.models.list()._request_id)
    with client.chat.completions.with_streaming_response.create(**GREEDY, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"


def test_leaving_a_stream(client: OpenAI, server_url: str) -> None:
    settings: dict[str, Any] = {**GREEDY, "max_completion_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**settings, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(**settings)
    wait_until_idle(server_url)


def test_async_client(server_url: str) -> None:
    async def ask(client: AsyncOpenAI) -> None:
        settings = [{**GREEDY, "messages": _user(f"Count to {number}.")} for number in range(3, 9)]
        replies = await asyncio.gather(*(client.chat.completions.create(**each) for each in settings))
        for each, reply in zip(settings, replies, strict=True):
            text = ""
            async for chunk in await client.chat.completions.create(**each, stream=True):
                text += chunk.choices[0].delta.content or ""
            assert text == reply.choices[0].message.content
        async with client.responses.stream(model=MODEL, input="Hi", temperature=0, max_output_tokens=9) as stream:
            assert [event.type async for event in stream][-1] in ("response.completed", "response.incomplete")
        assert [card.id async for card in client.models.list()] == [MODEL]

    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
            await ask(client)

    asyncio.run(main())


def _user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def _usage(usage: Any) -> dict[str, Any]:
    """Without what depends on who asked before."""
    known: dict[str, Any] = usage.to_dict()
    del known["prompt_tokens_details"]
    return known


def _bytes(tokens: Any) -> bytes:
    return b"".join(bytes(token.bytes) for token in tokens)


def _rounded(vector: list[float]) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector)}f", struct.pack(f"<{len(vector)}f", *vector))


def _unpacked(text: str) -> tuple[float, ...]:
    data = b64decode(text)
    return struct.unpack(f"<{len(data) // 4}f", data)
