"""/v1/chat/completions: what the template and the engine are given, and what the official client makes of replies."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_exchanges import CHAT, USER, WEATHER, ScriptedTools, answer, body, drive, frames, served

from strop.core.errors import RequestError, StropError
from strop.core.request import Delta, StructuredOutputsParams, TokenLogprob
from strop.serve.openai import chat
from strop.serve.openai.errors import ApiError
from strop.serve.tool_calls import ToolFormat, ToolSupport, tool_format

TEXT = st.text('a"\\\n é€😀', max_size=5)
TOOLS = [{"type": "function", "function": WEATHER}]


def parse(*parts: dict[str, Any], server: dict[str, Any] | None = None, **more: Any) -> chat.ChatExchange:
    return chat.parse(body(CHAT, *parts, more), served(**(server or {})), request_id="x", created_s=5)


def completion(sent: bytes) -> Any:
    """The reply as the official client types it, strictly."""
    types = pytest.importorskip("openai.types.chat")
    return types.ChatCompletion.model_validate_json(sent)


def streamed(sent: bytes) -> Any:
    """What the official client puts together from a stream."""
    types = pytest.importorskip("openai.types.chat")
    from openai.lib.streaming.chat import ChatCompletionStreamState

    state: Any = ChatCompletionStreamState()
    for frame in frames(sent):
        state.handle_chunk(types.ChatCompletionChunk.model_validate(frame))
    return state.get_final_completion()


def test_messages_reach_the_template_as_it_knows_them() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "Hi", "name": "Ada"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "audio": None,
            "function_call": None,
            "annotations": [],
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}, "index": 1},
                {"id": "c", "type": "function", "function": {"name": "h", "arguments": '{"cut'}},
            ],
        },
        {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "a"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None},
    ]

    def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    calls = [call("a", "f", {"x": [1]}), call("b", "g", {}), call("c", "h", '{"cut')]
    assert parse(messages=messages).asked[0].prompt == [
        {"role": "system", "content": "one\ntwo"},
        {"role": "user", "content": "Hi", "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": ""},
    ]
    knowing = parse(messages=messages, server={"chat_template": "{% if role == 'developer' %}"})
    assert knowing.asked[0].prompt[0]["role"] == "developer"  # type: ignore[index]


def test_fields_become_parameters() -> None:
    params = parse().asked[0].params
    assert (params.max_tokens, params.temperature, params.n, params.logprobs) == (None, 1.0, 1, None)
    params = (
        parse(
            max_completion_tokens=7,
            max_tokens=7,
            temperature=0,
            top_p=0.5,
            top_k=-1,
            min_p=0.1,
            n=3,
            stop="x",
            seed=-1,
            logit_bias={"17": -100},
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.1,
            min_tokens=2,
            ignore_eos=True,
            stop_token_ids=[3],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=True,
        )
        .asked[0]
        .params
    )
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (7, 0, 0.5, 0, 0.1)
    assert (params.n, params.stop, params.seed, params.logit_bias) == (3, ("x",), -1, {17: -100.0})
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.1)
    assert (params.min_tokens, params.ignore_eos, params.stop_token_ids) == (2, True, (3,))
    assert (params.include_stop_str_in_output, params.skip_special_tokens, params.logprobs) == (True, False, 0)
    with pytest.raises(ApiError, match="former name"):
        parse(max_completion_tokens=7, max_tokens=8)
    with pytest.raises(RequestError, match="min_tokens=5"):
        parse(min_tokens=5, max_tokens=4)


def test_the_template_gets_its_variables() -> None:
    assert parse().asked[0].template == {"add_generation_prompt": True}
    prefill = parse(messages=[USER, {"role": "assistant", "content": "I am"}], continue_final_message=True)
    assert prefill.asked[0].template == {"add_generation_prompt": False, "continue_final_message": True}
    template = (
        parse(
            add_generation_prompt=False,
            chat_template_kwargs={"enable_thinking": False},
            documents=[{"title": "a", "text": "b"}],
            reasoning_effort="low",
            server={"chat_template": "{{ reasoning_effort }}"},
        )
        .asked[0]
        .template
    )
    assert template == {
        "add_generation_prompt": False,
        "enable_thinking": False,
        "documents": [{"title": "a", "text": "b"}],
        "reasoning_effort": "low",
    }
    with pytest.raises(ApiError, match="knows no reasoning effort"):
        parse(reasoning_effort="low")
    with pytest.raises(ApiError, match="give one"):
        parse(messages=[{"role": "assistant", "content": "a"}], continue_final_message=True, add_generation_prompt=True)


def test_shapes_of_answers() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    spec = {"name": "n", "schema": schema, "strict": True, "description": "d"}
    for fields, expected in [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        ({"response_format": {"type": "json_schema", "json_schema": spec}}, '"b"'),
        ({"structured_outputs": {"json": schema}}, '"b"'),
        ({"structured_outputs": {"json": '{"type": "string"}'}}, StructuredOutputsParams(json='{"type": "string"}')),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutputsParams(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputsParams(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": "start: /a/"}}, StructuredOutputsParams(grammar="start: /a/")),
    ]:
        found = parse(fields).asked[0].params.structured_outputs
        if isinstance(expected, str):
            assert found is not None and found.json is not None
            assert json.loads(str(found.json)) == schema
            assert str(found.json).index('"b"') < str(found.json).index('"a"')  # properties keep their order
        else:
            assert found == expected
    with pytest.raises(RequestError, match="regex and choice"):
        parse(structured_outputs={"regex": "a", "choice": ["a"]})
    with pytest.raises(ApiError, match="response_format and structured_outputs"):
        parse(response_format={"type": "json_object"}, structured_outputs={"regex": "a"})


def test_tools_reach_the_template_and_force_calls() -> None:
    def tool_fields(**given: Any) -> tuple[Any, ...]:
        support = ScriptedTools()
        exchange = parse(tools=TOOLS, **given, server={"tools": support})
        exchange.begin(0, (1,))
        asked = exchange.asked[0]
        seen = support.seen[0] if support.seen else None
        return asked.template.get("tools"), asked.params.structured_outputs, seen

    listed, shape, seen = tool_fields()
    assert listed == TOOLS and shape is None and (seen.choice, seen.named, seen.parallel) == ("auto", None, True)
    assert tool_fields(tool_choice="none") == (None, None, None)
    _, shape, seen = tool_fields(tool_choice="required", parallel_tool_calls=False)
    assert shape is not None and (seen.choice, seen.parallel) == ("required", False)
    _, shape, seen = tool_fields(tool_choice={"type": "function", "function": {"name": "weather"}})
    assert shape is not None and seen.named == "weather"
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}
    _, _, seen = tool_fields(tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert (seen.choice, len(seen.listed)) == ("required", 1)
    _, shape, _ = tool_fields(tool_choice="required", response_format={"type": "json_object"})
    assert shape == StructuredOutputsParams(regex="call")
    _, _, seen = tool_fields(response_format={"type": "json_object"})
    assert seen.shape == StructuredOutputsParams(json_object=True)


def test_a_reply_in_one_piece() -> None:
    exchange = parse(n=2, model="org/tiny", server={"system_fingerprint": "fp"})
    deltas = [*answer("Hel", "lo", index=1), *answer("By", "e", index=0, finish_reason="length")]
    reply = completion(drive(exchange, deltas))
    assert (reply.id, reply.created, reply.model) == ("chatcmpl-x", 5, "org/tiny")
    assert reply.system_fingerprint == "fp"
    assert [(c.index, c.message.content, c.finish_reason, c.logprobs) for c in reply.choices] == [
        (0, "Bye", "length", None),
        (1, "Hello", "stop", None),
    ]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 10, 13)
    assert reply.usage.prompt_tokens_details.cached_tokens == 2


def test_a_stream_is_what_a_client_expects() -> None:
    deltas = [*answer("Hel", index=1), *answer("B\n", "y€", index=0)]
    sent = drive(parse(n=2, stream=True, stream_options={"include_usage": True}), deltas)
    assert sent.endswith(b"data: [DONE]\n\n")
    chunks = frames(sent)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 3 + 3 + 1 + 2 + 4 + 1
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert not any("role" in choice["delta"] for choice in own[1:])
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert [choice["index"] for choice in choices[:2]] == [0, 1]  # the Python client needs this order
    assert all("usage" not in chunk for chunk in frames(drive(parse(stream=True), answer("a"))))


@settings(deadline=None)
@given(st.lists(TEXT, max_size=6), st.booleans(), st.sampled_from(["stop", "length"]))
def test_a_stream_adds_up_to_the_reply_in_one_piece(texts: list[str], logprobs: bool, reason: str) -> None:
    fields = {"logprobs": True, "top_logprobs": 2} if logprobs else {}
    deltas = answer(*texts, finish_reason=reason, logprob=-0.5 if logprobs else None)
    whole = json.loads(drive(parse(fields), deltas))["choices"][0]
    content, entries = "", []
    for chunk in frames(drive(parse(fields, stream=True), deltas)):
        choice = chunk["choices"][0]
        content += choice["delta"].get("content") or ""
        entries += (choice["logprobs"] or {}).get("content", [])
    assert content == whole["message"]["content"] == "".join(texts)
    assert entries == ((whole["logprobs"] or {}).get("content") or [])
    if logprobs and reason == "stop":
        assert bytes(byte for entry in entries for byte in entry["bytes"]) == content.encode()


def test_the_official_client_puts_streams_together() -> None:
    deltas = [*answer("Hel", index=1), *answer("By", "e", index=0, logprob=-1.0)]
    reply = streamed(drive(parse(n=2, stream=True, logprobs=True, stream_options={"include_usage": True}), deltas))
    assert [choice.message.content for choice in reply.choices] == ["Bye", "Hel"]
    assert [choice.message.role for choice in reply.choices] == ["assistant", "assistant"]
    assert [entry.token for entry in reply.choices[0].logprobs.content] == ["B", "y", "e"]
    assert reply.usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(stream: bool) -> None:
    exchange = parse(tools=TOOLS, stream=stream, server={"tools": ScriptedTools()})
    deltas = answer("Look: ", "@weather", '+{"a"', "+:1}", "@other", "+{}")
    sent = drive(exchange, deltas)
    reply = streamed(sent) if stream else completion(sent)
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Look: "
    calls = [(call.id, call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("call_1", "function", "weather", '{"a":1}'), ("call_2", "function", "other", "{}")]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_a_model_that_no_template_teaches(stream: bool) -> None:
    server = {"tools": ToolSupport(tool_format(None))}
    exchange = parse(tools=TOOLS, tool_choice="required", stream=stream, server=server)
    asked = exchange.asked[0]
    assert "tools" not in asked.template and "weather" in asked.prompt[0]["content"]  # type: ignore[index]
    assert asked.params.structured_outputs is not None
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>'
    sent = drive(exchange, answer(*call))
    (choice,) = (streamed(sent) if stream else completion(sent)).choices
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"place": "Ulm"}


def test_a_call_that_is_cut_off_ends_by_length() -> None:
    deltas = answer("@weather", '+{"a"', finish_reason="length")
    (choice,) = completion(drive(parse(tools=TOOLS, server={"tools": ScriptedTools()}), deltas)).choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    assert choice.message.tool_calls[0].function.arguments == '{"a"'
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.LengthFinishReasonError):
        streamed(drive(parse(tools=TOOLS, stream=True, server={"tools": ScriptedTools()}), deltas))


def test_control_tokens_that_mark_calls_stay_in_the_text() -> None:
    marked = {"tools": ScriptedTools(ToolFormat("hermes", True, frozenset({"<tool_call>"})))}
    assert parse(tools=TOOLS, server=marked).asked[0].params.skip_special_tokens is False
    assert parse(server=marked).asked[0].params.skip_special_tokens is True


def test_logprobs_name_bytes_and_have_no_infinity() -> None:
    tokens = (
        TokenLogprob(0xC3, -0.25, ((0xC3, -0.25), (65, float("-inf")))),
        TokenLogprob(0xA9, float("nan"), ()),
        TokenLogprob(300, -1.0, ()),
    )
    delta = Delta("r", 0, "é", (0xC3, 0xA9, 300), tokens, "stop", ended_by_token=True)
    reply = completion(drive(parse(logprobs=True, top_logprobs=2), [delta]))
    first, second = reply.choices[0].logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("bytes:\\xc3", [0xC3], -0.25)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("bytes:\\xc3", -0.25), ("A", -9999.0)]
    assert (second.bytes, second.logprob, second.top_logprobs) == ([0xA9], -9999.0, [])


@pytest.mark.parametrize(("reason", "stop_reason", "kept"), [("stop", None, 1), ("stop", "x", 2), ("length", None, 2)])
def test_only_a_token_that_ended_the_answer_goes_unreported(reason: Any, stop_reason: Any, kept: int) -> None:
    deltas = answer("a", finish_reason=reason, stop_reason=stop_reason, logprob=-1.0)
    assert len(completion(drive(parse(logprobs=True), deltas)).choices[0].logprobs.content) == kept


def test_a_prompt_without_room_for_its_answer_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        parse(max_tokens=5, server={"context_len": 10}).begin(0, (1,) * 6)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "context_length_exceeded", "messages")
    assert "6 tokens" in caught.value.message and "10 tokens" in caught.value.message
    with pytest.raises(ApiError):
        parse(server={"context_len": 10}).begin(0, (1,) * 10)
    parse(server={"context_len": 10}).begin(0, (1,) * 9)


def test_a_stream_that_breaks_says_so() -> None:
    exchange = parse(stream=True)
    exchange.begin(0, (1,))
    exchange.push(0, answer("a")[0])
    (frame,) = frames(exchange.fail(StropError("the engine stopped")))
    assert frame == {"error": {"message": "the engine stopped", "type": "server_error", "param": None, "code": None}}
