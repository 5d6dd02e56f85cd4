"""Tool calls and structured output as OpenAI's own Python client reads them; test_openai_versions runs this, too."""

import json
from enum import Enum
from typing import Annotated, Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = "smollm2"
ASKED: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_completion_tokens": 200}
WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


def function(name: str, properties: dict[str, Any]) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"{name}.", "parameters": schema}}


CITY = {"type": "string", "enum": ["Paris", "Rome"]}
TOOLS: Any = [function("get_weather", {"city": CITY}), function("get_time", {})]


class Colour(Enum):
    red = "red"
    green = "green"


class Knife(BaseModel):
    colour: Colour
    length: Annotated[int, Field(ge=1, le=99)]
    name: Annotated[str, Field(max_length=12)]
    kind: Literal["bread", "chef's", "日本"]


def chosen(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("choice", ["required", chosen("get_weather"), chosen("get_time")], ids=str)
def test_calls_that_are_forced(client: OpenAI, choice: Any) -> None:
    how: dict[str, Any] = {**ASKED, "messages": WEATHER, "tools": TOOLS, "tool_choice": choice}
    how["parallel_tool_calls"] = False
    whole = client.chat.completions.create(**how).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert call.type == "function" and call.id
    if isinstance(choice, dict):
        assert call.function.name == choice["function"]["name"]
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "get_time" else set(arguments) == {"city"}
    fragments, reasons = [], []
    for chunk in client.chat.completions.create(**how, stream=True):
        (streamed,) = chunk.choices
        assert not streamed.delta.content
        fragments += streamed.delta.tool_calls or []
        reasons += [streamed.finish_reason] if streamed.finish_reason else []
    assert reasons == ["tool_calls"]
    assert {fragment.index for fragment in fragments} == {0}
    assert [fragment.function.name for fragment in fragments if fragment.function and fragment.function.name] == [
        call.function.name
    ]
    assert sum(fragment.id is not None for fragment in fragments) == 1
    joined = "".join(fragment.function.arguments or "" for fragment in fragments if fragment.function)
    assert joined == call.function.arguments
    with client.chat.completions.stream(**how) as stream:
        names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert names == [call.function.name]
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.arguments == call.function.arguments


def test_calls_or_json(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    how: dict[str, Any] = {**ASKED, "messages": WEATHER, "tools": tools, "temperature": 1, "n": 16, "seed": 0}
    how["parallel_tool_calls"] = False
    choices = client.chat.completions.parse(**how, response_format=Knife).choices
    for choice in choices:
        if choice.finish_reason == "tool_calls":
            assert choice.message.content is None and choice.message.tool_calls
        else:
            assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Knife)
            assert not choice.message.tool_calls
    assert {choice.finish_reason for choice in choices} == {"tool_calls", "stop"}


@pytest.mark.parametrize("limit", [1, 4, 9, 16, 22])
def test_a_call_that_is_cut_off(client: OpenAI, limit: int) -> None:
    how: dict[str, Any] = {**ASKED, "messages": WEATHER, "tools": TOOLS, "tool_choice": chosen("get_weather")}
    how["max_completion_tokens"] = limit
    whole = client.chat.completions.create(**how).choices[0]
    assert whole.finish_reason == "length" and not whole.message.content
    streamed = [chunk.choices[0].delta for chunk in client.chat.completions.create(**how, stream=True)]
    assert not any(delta.content for delta in streamed)
    fragments = [fragment for delta in streamed for fragment in delta.tool_calls or []]
    joined = "".join(fragment.function.arguments or "" for fragment in fragments if fragment.function)
    assert joined == "".join(call.function.arguments for call in whole.message.tool_calls or [])
    assert '{"city": "Paris"}'.startswith(joined)


def test_a_conversation_with_calls(client: OpenAI) -> None:
    messages = list(WEATHER)
    how: dict[str, Any] = {**ASKED, "tools": TOOLS, "parallel_tool_calls": False}
    first = client.chat.completions.create(**how, messages=messages, tool_choice="required").choices[0].message
    assert first.tool_calls is not None
    messages += [first.to_dict(), {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Rain, 9 °C."}]
    last = client.chat.completions.create(**how, messages=messages, tool_choice="none").choices[0]
    assert last.message.tool_calls is None and last.message.content
    free = client.chat.completions.create(**how, messages=messages, tool_choice="auto").choices[0]
    assert (free.finish_reason == "tool_calls") == bool(free.message.tool_calls)


def test_tools_that_cannot_be(client: OpenAI) -> None:
    def refused(param: str, **more: Any) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**ASKED, "messages": WEATHER, "tools": TOOLS, **more})
        assert caught.value.param is not None and caught.value.param.startswith(param), caught.value

    refused("tool_choice", tool_choice=chosen("get_rain"))
    refused("tool_choice", tool_choice="required", tools=[])
    refused("tools", tools=[TOOLS[0], TOOLS[0]])
    refused("tools", tools=[{"type": "web_search"}])
    refused("tools", tools=[function("no spaces", {})])
    with pytest.raises(openai.BadRequestError, match=r"/properties/a/not: .*in rule arguments_1_of_get_time"):
        tools = [TOOLS[0], function("Get-Time", {"a": {"not": {}}})]
        client.chat.completions.create(**ASKED, messages=WEATHER, tools=tools)


def test_parse(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Describe a knife as JSON."}]
    for temperature in (0, 1):
        how: dict[str, Any] = {**ASKED, "messages": messages, "temperature": temperature, "seed": 3}
        reply = client.chat.completions.parse(**how, response_format=Knife)
        parsed = reply.choices[0].message.parsed
        assert isinstance(parsed, Knife) and reply.choices[0].finish_reason == "stop"
        with client.chat.completions.stream(**how, response_format=Knife) as stream:
            contents = [event.parsed for event in stream if event.type == "content.done"]
            final = stream.get_final_completion()
        assert contents == [final.choices[0].message.parsed] == [parsed]


def test_responses_parse_and_call(client: OpenAI) -> None:
    how: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 200}
    reply = client.responses.parse(**how, input="Describe a knife as JSON.", text_format=Knife)
    assert isinstance(reply.output_parsed, Knife)
    tools: Any = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
    asked: dict[str, Any] = {**how, "input": "What is the weather in Paris?", "tools": tools}
    asked["tool_choice"] = {"type": "function", "name": "get_weather"}
    whole = client.responses.create(**asked)
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "get_weather"
    assert set(json.loads(call.arguments)) == {"city"}
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == call.arguments
    assert final.output[0].to_dict()["arguments"] == call.arguments
    history: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."},
    ]
    assert client.responses.create(**how, input=history, tools=tools, tool_choice="none").output_text


def test_json_and_other_shapes(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Describe a knife as JSON."}]
    how: dict[str, Any] = {**ASKED, "messages": messages}

    def text(**more: Any) -> str:
        choice = client.chat.completions.create(**how, **more).choices[0]
        assert choice.finish_reason == "stop", choice
        return choice.message.content or ""

    def shaped(**shape: Any) -> str:
        return text(extra_body={"structured_outputs": shape})

    reply = client.chat.completions.create(**how, response_format={"type": "json_object"}).choices[0]
    assert (reply.message.content or "").startswith("{")
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(reply.message.content or ""), dict)
    assert shaped(choice=["sharp", "blunt"]) in ("sharp", "blunt")
    assert len(shaped(regex="[0-9]{5}")) == 5
    assert shaped(grammar='start: "a" ("b" | "c")+ "d"\n')[0] == "a"
    assert isinstance(json.loads(shaped(json={"type": "boolean"})), bool)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {"a": {"unevaluatedItems": False, "type": "array"}}}, "/properties/a"),
        ({"type": "strnig"}, "strnig"),
        ({"$ref": "https://example.com/schema"}, "$ref"),
        ({"type": "string", "pattern": "(("}, "pattern"),
    ],
)
def test_a_schema_that_cannot_be_enforced(client: OpenAI, schema: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **ASKED,
            messages=WEATHER,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
    assert named in caught.value.message
