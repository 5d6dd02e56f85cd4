"""/v1/responses: items in, items out, and streams that the official client accepts event by event."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_exchanges import WEATHER, ScriptedTools, answer, body, drive, frames, served

from strop.core.errors import StropError
from strop.core.request import Delta
from strop.serve.openai import responses
from strop.serve.openai.errors import ApiError

TOOLS = [{"type": "function", **WEATHER}]


def parse(server: dict[str, Any] | None = None, **fields: Any) -> responses.ResponsesExchange:
    given = {"model": "tiny", "input": "Hello", **fields}
    return responses.parse(body(given), served(**(server or {})), request_id="x", created_s=5)


def response(sent: bytes) -> Any:
    """The reply as the official client types it, strictly."""
    return pytest.importorskip("openai.types.responses").Response.model_validate_json(sent)


def streamed(sent: bytes) -> Any:
    """The response that the official client puts together from a stream; it raises for events out of order."""
    openai = pytest.importorskip("openai")
    from openai.lib.streaming.responses._responses import ResponseStreamState
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    adapter: Any = TypeAdapter(ResponseStreamEvent)
    state: Any = ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    for event in frames(sent):
        state.handle_event(adapter.validate_python(event))
    return state._completed_response


def kinds(sent: bytes) -> list[str]:
    return [event["type"].removeprefix("response.") for event in frames(sent)]


def test_items_become_messages() -> None:
    given = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": None},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Look", "annotations": [], "logprobs": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "f",
            "arguments": '{"a": 1}',
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
    ]

    def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert parse(input=given, instructions="Be kind").asked[0].prompt == [
        {"role": "system", "content": "Be kind"},
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Look", "tool_calls": [call("c1", "f", {"a": 1}), call("c2", "g", {})]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "tool", "content": "2", "tool_call_id": "c2"},
        {"role": "assistant", "content": "", "tool_calls": [call("c3", "f", {})]},
    ]
    assert parse().asked[0].prompt == [{"role": "user", "content": "Hello"}]
    with pytest.raises(ApiError, match="no message to answer"):
        parse(input=[{"type": "reasoning"}])


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"store": True}, "store", "nothing is stored"),
        ({"background": True}, "background", "accepted are false"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the items themselves"),
        ({"truncation": "auto"}, "truncation", "nothing is ever cut off"),
        ({"include": ["file_search_call.results"]}, "include[0]", "message.output_text.logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "no tools of its own"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", "send the item itself"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "text only"),
        ({"input": [{"role": "user"}]}, "input[0].content", "content"),
        ({"input": []}, "input", "length >= 1"),
        ({"input": None}, "input", "expected"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "schema"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "knows no reasoning effort"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary", "not summarised"),
        ({"max_tokens": 5}, "max_tokens", "unknown field"),
    ],
)
def test_refusals(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert said in caught.value.message


def test_the_events_of_a_text() -> None:
    sent = drive(parse(stream=True), answer("Hel", "lo"))
    assert kinds(sent) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    events = frames(sent)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {event["item_id"] for event in events if "item_id" in event} == {"msg_x_0"}
    assert events[-1]["response"]["usage"]["total_tokens"] == 3 + 5 + 1
    assert events[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert b"[DONE]" not in sent


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"tools": TOOLS}, {"tools": ScriptedTools()}),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 1}, {}),
]
TEXTS = [["Hel", "lo"], [], ["@f"], ["@f", "+{}", "@g", '+{"a"', "+:1}"], ["a", "@f", "+{}", "b", "c"], ["", "", "x"]]


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("texts", TEXTS, ids="|".join)
@pytest.mark.parametrize(("fields", "server"), FIELDS, ids=["plain", "tools", "logprobs"])
def test_a_stream_is_the_reply_in_one_piece(
    fields: dict[str, Any], server: dict[str, Any], texts: list[str], reason: str
) -> None:
    deltas = answer(*texts, finish_reason=reason, logprob=-1.0 if "include" in fields else None)
    whole = drive(parse(server, **fields), deltas)
    sent = drive(parse(server, **fields, stream=True), deltas)
    assert frames(sent)[-1]["response"] == json.loads(whole)
    reply = response(whole)
    assert reply.status == ("completed" if reason == "stop" else "incomplete")
    assert reply.id == "resp_x" and reply.output
    final = streamed(sent)
    if reason == "stop":
        assert final.model_dump(exclude={"output"}) == reply.model_dump(exclude={"output"})
        assert [item.id for item in final.output] == [item.id for item in reply.output]
    else:
        assert kinds(sent)[-1] == "incomplete"
        assert reply.incomplete_details.reason == "max_output_tokens"
        assert reply.output[-1].status == "incomplete"
    if "tools" not in fields:
        assert reply.output_text == "".join(texts)


@settings(deadline=None)
@given(st.lists(st.text('a"\\\n é€😀', max_size=5), max_size=5))
def test_deltas_add_up_to_the_text(texts: list[str]) -> None:
    events = frames(drive(parse(stream=True), answer(*texts)))
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    (done,) = (event for event in events if event["type"] == "response.output_text.done")
    assert said == done["text"] == "".join(texts)


def test_tool_calls_are_items() -> None:
    exchange = parse({"tools": ScriptedTools()}, tools=TOOLS)
    reply = response(drive(exchange, answer("Look", "@weather", '+{"a"', "+:1}")))
    text, call = reply.output
    assert (text.type, text.content[0].text, text.status) == ("message", "Look", "completed")
    assert (call.type, call.call_id, call.name, call.arguments) == ("function_call", "call_1", "weather", '{"a":1}')
    assert exchange.asked[0].template["tools"] == [{"type": "function", "function": WEATHER}]


def test_logprobs_come_with_the_text() -> None:
    sent = drive(parse(stream=True, top_logprobs=2), answer("a", logprob=-1.0))
    (delta,) = (event for event in frames(sent) if event["type"] == "response.output_text.delta")
    assert delta["logprobs"][0]["token"] == "a"
    assert streamed(sent).output[0].content[0].logprobs[0].top_logprobs[1].logprob == -9.5


def test_the_reply_repeats_what_was_asked() -> None:
    schema = {"type": "object"}
    exchange = parse(
        {"tools": ScriptedTools()},
        instructions="Be kind",
        metadata={"a": "b"},
        temperature=0.5,
        max_output_tokens=9,
        tools=TOOLS,
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
        user="u",
        store=False,
        reasoning={"summary": "auto"},
    )
    raw = drive(exchange, answer("@weather"))
    assert json.loads(raw)["store"] is False
    assert json.loads(raw)["reasoning"] == {"effort": None, "summary": "auto"}
    reply = response(raw)
    assert (reply.instructions, reply.metadata, reply.temperature, reply.user) == ("Be kind", {"a": "b"}, 0.5, "u")
    assert (reply.max_output_tokens, reply.parallel_tool_calls, reply.tools[0].name) == (9, False, "weather")
    assert reply.tool_choice.name == "weather"
    assert reply.text.format.schema_ == schema
    assert exchange.asked[0].params.max_tokens == 9


def test_a_stream_that_breaks_says_so() -> None:
    for deltas in ([], answer("a")[:1]):
        exchange = parse(stream=True)
        exchange.begin(0, (1,))
        sent = b"".join(exchange.push(0, delta) for delta in deltas)
        sent += exchange.fail(StropError("the engine stopped"))
        assert kinds(sent)[0] == "created"
        failed, error = frames(sent)[-2:]
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"] == {"code": "server_error", "message": "the engine stopped"}
        assert error["error"]["message"] == "the engine stopped"
        streamed(b"\n\n".join(sent.split(b"\n\n")[:-2]) + b"\n\n")


def test_a_prompt_without_room_for_its_answer_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        parse({"context_len": 10}, max_output_tokens=6).begin(0, (1,) * 5)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


def test_an_aborted_answer_counts_as_cut_short() -> None:
    reply = response(drive(parse(), [Delta("r", 0, "a", (97,), (), "abort")]))
    assert reply.status == "incomplete"
