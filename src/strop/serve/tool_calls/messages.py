"""Messages with calls and their results, as a model's chat template takes them. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from strop.serve.tool_calls.format import CLOSING, OPENING, ToolFormat
from strop.serve.tool_calls.tools import Tools

Message = Mapping[str, Any]


def template_tools(tools: Tools | None, form: ToolFormat) -> list[dict[str, Any]] | None:
    """What Tokenizer.apply_chat_template gets as `tools`: None for a template that does not teach how to call them."""
    return [function.definition for function in tools.functions] if tools is not None and form.taught else None


def tool_template_messages(messages: Sequence[Message], tools: Tools | None, form: ToolFormat) -> list[dict[str, Any]]:
    """`messages`, of a request that is otherwise sound, for Tokenizer.apply_chat_template beside template_tools.

    Where the template teaches the form, arguments of past calls become maps, as templates expect them (text that is
    no JSON stays), and llama3's, which take one call a message, get several calls as several messages. Elsewhere the
    system message, or else the first of the user, gets a text that teaches it, and calls and results become text.
    """
    if not form.taught:
        return _taught_by_text(messages, tools)
    decoded = [_with_decoded_arguments(message) for message in messages]
    return _one_call_each(decoded) if form.form == "llama3" else decoded


def _with_decoded_arguments(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    calls = [{**call, "function": {**call["function"], "arguments": _arguments(call)}} for call in calls]
    content = message.get("content")
    return {**message, "content": "" if content is None else content, "tool_calls": calls}


def _arguments(call: Message) -> Any:
    arguments = call["function"].get("arguments") or {}
    if not isinstance(arguments, str):
        return arguments
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a message of its own, before the results that name it."""
    split: list[dict[str, Any]] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        calls = message.get("tool_calls") or ()
        position += 1
        if len(calls) < 2:
            split.append(message)
            continue
        end = position
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        results, position = messages[position:end], end
        for number, call in enumerate(calls):
            split.append({**message, "content": "" if number else message["content"], "tool_calls": [call]})
            split += [result for result in results if result.get("tool_call_id") == call.get("id")]
            results = [result for result in results if result.get("tool_call_id") != call.get("id")]
        split += results
    return split


def _taught_by_text(messages: Sequence[Message], tools: Tools | None) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        turn = _as_text(message)
        # Results come from the user, and many templates refuse two turns of one role in a row.
        if turns and turns[-1]["role"] == turn["role"] == "user" and (is_result or was_result):
            turns[-1]["content"] = _joined(turns[-1]["content"], turn["content"])
        else:
            turns.append(turn)
        was_result = is_result
    if tools is None:
        return turns
    lesson = _lesson(tools)
    if turns and turns[0]["role"] in ("system", "developer"):
        turns[0]["content"] = _joined(turns[0].get("content"), lesson)
        return turns
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = _joined(lesson, turn.get("content"))
            return turns
    return [{"role": "user", "content": lesson}, *turns]


def _as_text(message: Message) -> dict[str, Any]:
    """A message without roles and fields that only a template with tools knows."""
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": _joined(_joined("<tool_response>", message.get("content")), "</tool_response>"),
        }
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    content = message.get("content")
    for call in calls:
        written = {"name": call["function"]["name"], "arguments": _arguments(call)}
        content = _joined(content, f"{OPENING}\n{json.dumps(written, ensure_ascii=False)}\n{CLOSING}")
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


def _joined(first: Any, second: Any) -> Any:
    """Two contents, each a text, a list of parts or nothing, as one."""
    if not first or not second:
        return first or second or ""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    return [
        part
        for content in (first, second)
        for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    ]


def _lesson(tools: Tools) -> str:
    listed = "\n".join(json.dumps(function.definition, ensure_ascii=False) for function in tools.functions)
    when = (
        "Answer with a call."
        if tools.choice == "required"
        else "Call a function where it helps; otherwise answer in plain text."
    )
    how_many = "You may write several calls, one after the other." if tools.parallel else "Write one call at most."
    return (
        f"You can call functions. These are there, each described by a line of JSON:\n<tools>\n{listed}\n</tools>\n"
        "To call one, write its name and its arguments as JSON, in this form:\n"
        f'{OPENING}\n{{"name": "function-name", "arguments": {{"argument-name": "its value"}}}}\n{CLOSING}\n'
        f"{when} {how_many} Results come back between <tool_response> and </tool_response>."
    )
