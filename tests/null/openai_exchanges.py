"""A server's side of the API without an engine: a vocabulary of single bytes, scripted answers, frames read back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from strop.core.request import Delta, StructuredOutputsParams, TokenLogprob
from strop.serve.openai.exchange import Exchange, Served
from strop.serve.tool_calls import ToolDelta, ToolFormat, Tools, ToolSupport

USER = {"role": "user", "content": "Hello"}
CHAT = {"model": "tiny", "messages": [USER]}
WEATHER = {"name": "weather", "description": "of a place", "parameters": {"type": "object", "properties": {}}}


class Bytes:
    """Token i is byte i; those from 256 on are control tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else f"<|{token_id}|>".encode()


@dataclass
class ScriptedParser:
    """Reads `@name` as the start of a call and `+text` as more of its arguments; the rest is text."""

    num_calls: int = 0

    def push(self, text: str, ended: bool, *, cut: bool) -> list[ToolDelta | str]:
        if text.startswith("@"):
            self.num_calls += 1
            return [ToolDelta(self.num_calls - 1, "", f"call_{self.num_calls}", text[1:])]
        if text.startswith("+"):
            return [ToolDelta(self.num_calls - 1, text[1:])]
        return [text]


@dataclass
class ScriptedTools:
    form: ToolFormat = field(default_factory=lambda: ToolFormat("hermes", taught=True))
    seen: list[Tools] = field(default_factory=list)

    def messages(self, messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> list[dict[str, Any]]:
        return [dict(message) for message in messages]

    def template_tools(self, tools: Tools | None) -> list[dict[str, Any]] | None:
        return None if tools is None else list(tools.listed)

    def grammar(self, tools: Tools) -> StructuredOutputsParams | None:
        return StructuredOutputsParams(regex="call") if tools.choice == "required" else None

    def parser(self, tools: Tools) -> ScriptedParser:
        self.seen.append(tools)
        return ScriptedParser()


def served(**changes: Any) -> Served:
    """A server of the model `tiny`, also `org/tiny`."""
    tools = ToolSupport(ToolFormat("hermes", taught=True))
    own = {"names": ("tiny", "org/tiny"), "created_s": 1, "context_len": 1000, "vocabulary": Bytes(), "tools": tools}
    return Served(**own | changes)


def body(*parts: dict[str, Any], **more: Any) -> bytes:
    """The bytes of a request."""
    return json.dumps({key: value for part in (*parts, more) for key, value in part.items()}).encode()


def answer(
    *texts: str, index: int = 0, finish_reason: Any = "stop", logprob: float | None = None, stop_reason: Any = None
) -> list[Delta]:
    """Deltas of one choice, a token to each byte; one without text ends it, as an end-of-sequence token does."""
    deltas = []
    for i, text in enumerate([*texts, ""]):
        ended = i == len(texts)
        ids = (300,) if ended else tuple(text.encode())
        logprobs = () if logprob is None else tuple(TokenLogprob(i, logprob, ((i, logprob), (65, -9.5))) for i in ids)
        reason = finish_reason if ended else None
        why = stop_reason if ended else None
        by_token = reason == "stop" and not isinstance(why, str)
        deltas.append(Delta("r", index, text, ids, logprobs, reason, why, 2, ended_by_token=by_token))
    return deltas


def drive(exchange: Exchange, deltas: Sequence[Delta], prompt_len: int = 3) -> bytes:
    """All bytes of the reply to the only prompt."""
    exchange.begin(0, tuple(range(prompt_len)))
    sent = b"".join(exchange.push(0, delta) for delta in deltas)
    return sent + exchange.end()


def frames(sent: bytes) -> list[dict[str, Any]]:
    """The JSON of each frame; [DONE] left out, and checked to be the last if it is there."""
    *given, rest = sent.decode().split("\n\n")
    assert rest == ""
    assert "data: [DONE]" not in given[:-1]
    read = []
    for frame in given:
        *event, data = frame.split("\n")
        assert data.startswith("data: ")
        if data != "data: [DONE]":
            read.append(json.loads(data.removeprefix("data: ")))
            assert event in ([], [f"event: {read[-1].get('type')}"])
    return read
