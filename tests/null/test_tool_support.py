"""What a model is told of tools, in which form it is taught to call, and what past calls look like to it."""

import json
from typing import Any

import pytest

from strop.core.errors import RequestError
from strop.serve.tool_calls import ToolDelta, ToolFormat, Tools, ToolSupport, tool_format

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time"}}
UNTAUGHT, LLAMA3 = (
    ToolSupport(form) for form in (ToolFormat("hermes", taught=False), ToolFormat("llama3", taught=True))
)
HERMES = ToolSupport(ToolFormat("hermes", taught=True))


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def test_definitions_are_made_whole_for_templates() -> None:
    listed = (function(description=None, parameters=None, strict=True, example=1), WEATHER)
    tools = Tools(listed)
    bare, weather = tools.functions
    assert bare.definition["function"] == {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        "example": 1,
    }
    assert (bare.strict, weather.strict) == (True, False)
    assert weather.definition == WEATHER
    assert weather.parameters == SCHEMA
    assert HERMES.template_tools(tools) == [bare.definition, weather.definition]
    assert HERMES.template_tools(None) is None
    assert UNTAUGHT.template_tools(tools) is None


def test_a_named_function_is_the_only_one() -> None:
    tools = Tools((WEATHER, TIME), named="time")
    assert [one.name for one in tools.functions] == ["time"]
    assert (tools.choice, tools.parallel) == ("required", False)


@pytest.mark.parametrize(
    "parameters", [{}, {"type": ["object", "null"]}, {"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}}]
)
def test_arguments_are_an_object(parameters: dict[str, Any]) -> None:
    (one,) = Tools((function(parameters=parameters),)).functions
    assert one.parameters == {**parameters, "type": "object"}


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([5], r"tools\[0\]=5 is not accepted"),
        ([{"function": {}}], r"tools\[0\]="),
        ([WEATHER, {"type": "custom", "custom": {}}], r"tools\[1\]="),
        ([{"type": "function"}], r"tools\[0\]\.function=None"),
        ([function(name="a b")], r"tools\[0\]\.function\.name='a b' .* letters, digits"),
        ([function(name="é")], r"tools\[0\]\.function\.name="),
        ([function(name="")], r"tools\[0\]\.function\.name="),
        ([function(name="f\n")], r"tools\[0\]\.function\.name="),
        ([function(name="f" * 65)], r"tools\[0\]\.function\.name="),
        ([function(name=None)], r"tools\[0\]\.function\.name="),
        ([WEATHER, TIME, WEATHER], r"tools\[2\]\.function\.name='weather' .* a name of its own"),
        ([function(description=5)], r"tools\[0\]\.function\.description=5"),
        ([function(strict=1)], r"tools\[0\]\.function\.strict=1"),
        ([WEATHER, TIME, function(parameters=[])], r"tools\[2\]\.function\.parameters=\[\]"),
        ([function(parameters=True)], r"tools\[0\]\.function\.parameters=True"),
        ([function(parameters={"type": "string"})], r"tools\[0\]\.function\.parameters\.type='string'"),
        ([function(parameters={"type": ["string"]})], r"tools\[0\]\.function\.parameters\.type="),
    ],
)
def test_what_is_wrong_is_named(listed: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        Tools(tuple(listed))


def test_only_what_is_there_can_be_named() -> None:
    with pytest.raises(RequestError, match=r"^tool_choice\.function\.name='rain' .* weather, time"):
        Tools((WEATHER, TIME), named="rain")


HERMES_TEMPLATES = [
    r"""{{ tools }}{{ "Write\n<tool_call>\n{\"name\": <name>, \"arguments\": <args>}\n</tool_call>" }}""",
    """{{ tools }}{{ '<tool_call>\n' }}{{- '{"name": "' + c.name + '", "arguments": ' }}""",
    """{{ tools }}<tool_call>{{ '{"name": ' ~ c.name|tojson }}, "arguments": {{ c.arguments }}""",
]
LLAMA3_TEMPLATES = ["""{% for tool in tools %}{% endfor %}Reply as {"name": name, "parameters": a dictionary}"""]
# Tags around something else, a schema in the text, JSON in other tags, and the form without a place for tools.
OTHER_TEMPLATES = [
    None,
    "{{ messages }}",
    "{{ tools }}<tool_call>\n<function={{ c.name }}>\n</tool_call>",
    """{{ tools }}Within <tool_call></tool_call>: <calls>[{"name": n, "arguments": a}]</calls>""",
    """{{ tools }}{"name": {{ f.name }}, "description": "", "parameters": {{ f.parameters }}}""",
    """{{ xml_tools }}<tool_call>{"name": <name>, "arguments": <args>}</tool_call>""",
]


@pytest.mark.parametrize(
    ("templates", "form"),
    [
        (HERMES_TEMPLATES, ToolFormat("hermes", taught=True)),
        (LLAMA3_TEMPLATES, ToolFormat("llama3", taught=True)),
        (OTHER_TEMPLATES, ToolFormat("hermes", taught=False)),
    ],
)
def test_the_form_is_read_off_the_template(templates: list[str | None], form: ToolFormat) -> None:
    assert [tool_format(template, ["<s>"]) for template in templates] == [form] * len(templates)


def test_markers_that_are_control_tokens_are_known() -> None:
    assert tool_format(None, ["<s>", "<tool_call>"]).special_tokens == {"<tool_call>"}


def called(number: int, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather and time?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [called(1, "weather", '{"city": "Zürich"}'), called(2, "time", "")],
    },
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
    {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    {"role": "user", "content": "Thanks."},
]


def test_templates_get_arguments_as_maps() -> None:
    given = HERMES.messages(CONVERSATION, None)
    assert given[:2] + given[3:] == CONVERSATION[:2] + CONVERSATION[3:]
    assert given[2]["content"] == ""
    assert [call["function"]["arguments"] for call in given[2]["tool_calls"]] == [{"city": "Zürich"}, {}]
    assert isinstance(CONVERSATION[2]["tool_calls"][0]["function"]["arguments"], str)


@pytest.mark.parametrize("arguments", ['{"city": ', "[" * 100_000, '{"a": NaN}', {"city": "Oslo"}])
def test_arguments_that_are_no_json_stay_as_they_are(arguments: Any) -> None:
    (message,) = HERMES.messages([{"role": "assistant", "tool_calls": [called(1, "weather", arguments)]}], None)
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def test_llama3_sees_one_call_a_message() -> None:
    given = LLAMA3.messages(CONVERSATION, Tools((WEATHER,)))
    assert [message["role"] for message in given[2:]] == ["assistant", "tool", "assistant", "tool", "user"]
    calls = [given[i]["tool_calls"] for i in (2, 4)]
    assert [[call["id"] for call in message] for message in calls] == [["call_1"], ["call_2"]]
    assert [given[i]["content"] for i in (3, 5)] == ["sun", "noon"]
    stray = {"role": "tool", "tool_call_id": "call_9", "content": "?"}
    assert LLAMA3.messages([*CONVERSATION[:3], stray], None)[-1] == stray


def test_other_models_are_taught_by_text() -> None:
    given = UNTAUGHT.messages(CONVERSATION, Tools((WEATHER, TIME)))
    assert [message["role"] for message in given] == ["system", "user", "assistant", "user"]
    assert given[0]["content"].startswith("Be brief.\n")
    assert json.dumps(WEATHER) in given[0]["content"]
    assert given[2] == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    }
    assert given[3]["content"] == (
        "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nsun\n</tool_response>\nThanks."
    )
    assert "tool" not in str(UNTAUGHT.messages(CONVERSATION[:2], None))


def test_the_lesson_goes_where_every_template_takes_it() -> None:
    tools = Tools((WEATHER,))
    (with_parts,) = UNTAUGHT.messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], tools)
    assert [part["type"] for part in with_parts["content"]] == ["text", "text"]
    assert with_parts["content"][1]["text"] == "Hi"
    (user,) = UNTAUGHT.messages([{"role": "user", "content": "Hi"}], tools)
    assert user["content"].endswith("\nHi")
    (alone,) = UNTAUGHT.messages([], tools)
    assert alone["role"] == "user"


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_lesson_itself_is_no_call(choice: Any, parallel: bool) -> None:
    tools = Tools((WEATHER, TIME), choice, parallel=parallel)
    (lesson,) = UNTAUGHT.messages([], tools)
    assert not any(isinstance(piece, ToolDelta) for piece in UNTAUGHT.parser(tools).push(lesson["content"], True))
