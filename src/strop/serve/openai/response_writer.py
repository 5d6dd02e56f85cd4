"""The items of a response while they are written, and the events that tell of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import Struct

from strop.serve.openai.answer_reader import Piece, Thought
from strop.serve.openai.exchange import encode
from strop.serve.openai.logprobs import ContentLogprob
from strop.serve.openai.response_items import (
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)
from strop.serve.tool_calls import ToolDelta


@dataclass(slots=True)
class _Open:
    """The item that is being written."""

    item: OutputItem
    prefix: bytes
    """Of the frame of each piece of it."""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[ContentLogprob] = field(default_factory=list)


class ResponseWriter:
    """Makes items of pieces, one after the other; without `stream` there are no events."""

    def __init__(self, request_id: str, stream: bool) -> None:
        self.output: list[OutputItem] = []
        self._id = request_id
        self._stream = stream
        self._open: _Open | None = None
        self._num_events = 0
        self._frames: list[bytes] = []

    def start(self, reply: Struct) -> None:
        """The first events, unless they have been sent."""
        if self._num_events == 0:
            self.event("response.created", response=reply)
            self.event("response.in_progress", response=reply)

    def write(self, piece: Piece, logprobs: list[ContentLogprob]) -> None:
        """The answer goes on with `piece`; `logprobs` are of its tokens, if it is text."""
        if isinstance(piece, ToolDelta):
            if piece.id is not None:
                self._open_call(piece.id, piece.name or "")
            self._add(piece.arguments, b"")
            return
        kind = OutputReasoning if isinstance(piece, Thought) else OutputMessage
        if self._open is None or not isinstance(self._open.item, kind):
            self._open_text(kind)
        if isinstance(piece, Thought):
            self._add(piece.text, b"")
        elif piece or logprobs:
            assert self._open is not None
            self._open.logprobs += logprobs
            self._add(piece, b',"logprobs":%b' % (encode(logprobs) if logprobs else b"[]"))

    def close(self, status: Literal["completed", "incomplete"]) -> None:
        """The answer ends. One without any piece is an empty message."""
        if not self.output:
            self._open_text(OutputMessage)
        self._close(status)

    def event(self, type: str, **fields: Any) -> None:
        """One that is not a piece."""
        if self._stream:
            self._frame(b"event: %b\ndata: %b" % (type.encode(), encode({"type": type, **fields})[:-1]), b"")

    def sent(self) -> bytes:
        """The frames since the last call."""
        frames, self._frames = self._frames, []
        return b"".join(frames)

    def _open_call(self, call_id: str, name: str) -> None:
        item_id = f"fc_{self._id}_{len(self.output)}"
        item = OutputCall(id=item_id, call_id=call_id, name=name, arguments="", status="in_progress")
        self._open_item(item, "response.function_call_arguments.delta", {})

    def _open_text(self, kind: type[OutputMessage] | type[OutputReasoning]) -> None:
        prefix, part_kind = ("msg", "output_text") if kind is OutputMessage else ("rs", "reasoning_text")
        item = kind(id=f"{prefix}_{self._id}_{len(self.output)}", status="in_progress", content=[])
        place = self._open_item(item, f"response.{part_kind}.delta", {"content_index": 0})
        part = OutputText("", [], []) if kind is OutputMessage else ReasoningText("")
        self.event("response.content_part.added", **place, part=part)

    def _open_item(self, item: OutputItem, delta_type: str, more: Mapping[str, int]) -> dict[str, Any]:
        """Returns where the item's pieces belong."""
        self._close("completed")
        index = len(self.output)
        self.event("response.output_item.added", output_index=index, item=item)
        self.output.append(item)
        place = {"item_id": item.id, "output_index": index, **more}
        prefix = b"event: %b\ndata: %b" % (delta_type.encode(), encode({"type": delta_type, **place})[:-1])
        self._open = _Open(item, prefix)
        return place

    def _add(self, text: str, more: bytes) -> None:
        assert self._open is not None
        self._open.pieces.append(text)
        if text or more:
            self._frame(self._open.prefix, b',"delta":%b%b' % (encode(text), more))

    def _close(self, status: Literal["completed", "incomplete"]) -> None:
        if self._open is None:
            return
        opened, self._open = self._open, None
        item, text = opened.item, "".join(opened.pieces)
        place = {"item_id": item.id, "output_index": len(self.output) - 1}
        item.status = status
        if isinstance(item, OutputCall):
            item.arguments = text
            self.event("response.function_call_arguments.done", **place, name=item.name, arguments=text)
        elif isinstance(item, OutputMessage):
            part = OutputText(text, [], opened.logprobs)
            item.content = [part]
            place["content_index"] = 0
            self.event("response.output_text.done", **place, text=text, logprobs=opened.logprobs)
            self.event("response.content_part.done", **place, part=part)
        else:
            item.content = [ReasoningText(text)]
            place["content_index"] = 0
            self.event("response.reasoning_text.done", **place, text=text)
            self.event("response.content_part.done", **place, part=item.content[0])
        self.event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _frame(self, start: bytes, fields: bytes) -> None:
        if self._stream:
            self._frames.append(b'%b%b,"sequence_number":%d}\n\n' % (start, fields, self._num_events))
            self._num_events += 1
