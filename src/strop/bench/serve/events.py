"""Streamed answers: server-sent events out of bytes, and what an OpenAI-compatible server says in them."""

import re
from typing import Any

import msgspec

MAX_EVENT_BYTES = 4 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """Server-sent events (WHATWG HTML, 9.2) out of bytes that may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._ended_in_cr = False

    def push(self, piece: bytes) -> list[bytes]:
        """The data of each event that `piece` completes; comments and other fields are dropped.

        Raises:
            ValueError: an event is longer than MAX_EVENT_BYTES.
        """
        if self._ended_in_cr:
            piece = piece.removeprefix(b"\n")  # the second half of a line's end
        self._ended_in_cr = piece.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + piece)
        events: list[bytes] = []
        for line in lines:
            self._take_line(line, events)
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return events

    def _take_line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data = []
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_text(self) -> bool:
        """Whether a reader sees something new: the roles and ends of streams come in chunks without."""
        delta = self.delta
        return bool(
            self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls))
        )


class _CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts by the server."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the server's prefix cache."""
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None


_chunks = msgspec.json.Decoder(_Chunk)


class Answer:
    """One streamed answer, as it comes in."""

    def __init__(self) -> None:
        self.chunk_s: list[float] = []
        """When each chunk with text came, on the clock of `push`."""
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.failure: tuple[str, str] | None = None
        """Kind and message of what went wrong; nothing is read after it."""
        self._events = EventReader()
        self._is_done = False

    def push(self, now_s: float, piece: bytes) -> None:
        """Takes what came at `now_s`."""
        if self.failure is not None:
            return
        try:
            for data in self._events.push(piece):
                self._take(now_s, data)
        except (ValueError, msgspec.MsgspecError) as error:
            self.failure = ("malformed chunk", f"{error}: {piece[:200]!r}")

    def end(self) -> None:
        """The body is complete: was the answer?"""
        if self.failure is None and not (self._is_done or self.finish_reason):
            self.failure = ("broken stream", "the stream ended without a finish_reason and without [DONE]")
        if self.failure is None and not self.chunk_s:
            self.failure = ("no text", f"the answer has no text (finish_reason {self.finish_reason})")

    def _take(self, now_s: float, data: bytes) -> None:
        if data == b"[DONE]":
            self._is_done = True
        if data in (b"[DONE]", b""):
            return
        chunk = _chunks.decode(data)
        if chunk.error is not None:
            error = chunk.error
            message = error.get("message", error) if isinstance(error, dict) else error
            self.failure = ("error in the stream", str(message))
            return
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            if choice.has_text():
                self.chunk_s.append(now_s)
            self.finish_reason = choice.finish_reason or self.finish_reason
