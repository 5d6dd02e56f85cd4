"""Messages with calls and their results, as a model's chat template takes them. Pure."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
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
        return msgspec.json.decode(arguments) if arguments.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        return arguments


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a message of its own, before the results that name it."""
    split: list[dict[str, Any]] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            split.append(message)
            continue
        results: dict[str | None, list[dict[str, Any]]] = {}
        while position < len(messages) and messages[position]["role"] == "tool":
            results.setdefault(messages[position].get("tool_call_id"), []).append(messages[position])
            position += 1
        for number, call in enumerate(calls):
            split.append({**message, "content": "" if number else message["content"], "tool_calls": [call]})
            split += results.pop(call.get("id"), ())
        split += chain.from_iterable(results.values())
    return split


def _taught_by_text(messages: Sequence[Message], tools: Tools | None) -> list[dict[str, Any]]:
    turns: list[tuple[dict[str, Any], list[Any]]] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        fields, contents = _as_text(message)
        # Results come from the user, and many templates refuse two turns of one role in a row.
        if turns and turns[-1][0]["role"] == fields["role"] == "user" and (is_result or was_result):
            turns[-1][1].extend(contents)
        else:
            turns.append((fields, contents))
        was_result = is_result
    if tools is not None:
        _teach(turns, _lesson(tools))
    return [{**fields, "content": _joined(contents)} for fields, contents in turns]


def _as_text(message: Message) -> tuple[dict[str, Any], list[Any]]:
    """A message without the roles and fields that only a template with tools knows, and its contents to be joined."""
    content = message.get("content")
    if message["role"] == "tool":
        return {"role": "user"}, ["<tool_response>", content, "</tool_response>"]
    contents = [content]
    for call in message.get("tool_calls") or ():
        written = {"name": call["function"]["name"], "arguments": _arguments(call)}
        contents.append(f"{OPENING}\n{json.dumps(written, ensure_ascii=False)}\n{CLOSING}")
    return {key: value for key, value in message.items() if key not in ("content", "tool_calls")}, contents


def _teach(turns: list[tuple[dict[str, Any], list[Any]]], lesson: str) -> None:
    if turns and turns[0][0]["role"] in ("system", "developer"):
        turns[0][1].append(lesson)
        return
    for fields, contents in turns:
        if fields["role"] == "user":
            contents.insert(0, lesson)
            return
    turns.insert(0, ({"role": "user"}, [lesson]))


def _joined(contents: Sequence[Any]) -> Any:
    """Contents, each a text, a list of parts or nothing, as one."""
    contents = [content for content in contents if content]
    if all(isinstance(content, str) for content in contents):
        return "\n".join(contents)
    parts = ([{"type": "text", "text": one}] if isinstance(one, str) else one for one in contents)
    return list(chain.from_iterable(parts))


def _lesson(tools: Tools) -> str:
    listed = "\n".join(json.dumps(function.definition, ensure_ascii=False) for function in tools.functions)
    otherwise = "in plain text" if tools.shape is None else "without one"
    when = (
        "Answer with a call."
        if tools.choice == "required"
        else f"Call a function where it helps; otherwise answer {otherwise}."
    )
    how_many = "You may write several calls, one after the other." if tools.parallel else "Write one call at most."
    return (
        f"You can call functions. These are there, each described by a line of JSON:\n<tools>\n{listed}\n</tools>\n"
        "To call one, write its name and its arguments as JSON, in this form:\n"
        f'{OPENING}\n{{"name": "function-name", "arguments": {{"argument-name": "its value"}}}}\n{CLOSING}\n'
        f"{when} {how_many} Results come back between <tool_response> and </tool_response>."
    )
