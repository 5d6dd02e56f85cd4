"""What replies of /v1/chat/completions and /v1/completions have in common: all but their choices."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from strop.core.request import Delta
from strop.serve.openai.exchange import Served, Tally, encode
from strop.serve.openai.sampling import Sampling

_DONE = b"data: [DONE]\n\n"


class ChoicesReply:
    """One reply, whole or in chunks. What is the same in all chunks is encoded once."""

    def __init__(
        self, request: Sampling, served: Served, reply_id: str, created_s: int, chunk_object: str, num_asked: int = 1
    ) -> None:
        """`chunk_object` is what a chunk calls itself."""
        self.tally = Tally(num_asked)
        self._head: dict[str, Any] = {
            "id": reply_id,
            "created": created_s,
            "model": request.model,
            "system_fingerprint": served.system_fingerprint,
        }
        options = request.stream_options
        self._with_usage = options is not None and options.include_usage is True
        self._start = b"data: " + encode({"object": chunk_object, **self._head})[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if self._with_usage else b"]}\n\n"

    def chunk(self, choice: bytes) -> bytes:
        """The frame of one choice, given as JSON."""
        return self._start + choice + self._end

    def closing(self) -> bytes:
        """The last frames of a stream."""
        if not self._with_usage:
            return _DONE
        return b'%b],"usage":%b}\n\n%b' % (self._start, encode(self.tally.usage()), _DONE)

    def whole(self, kind: Callable[..., Struct], choices: list[Any]) -> bytes:
        """The body with these choices, as a `kind`."""
        return encode(kind(**self._head, choices=choices, usage=self.tally.usage()))


def finish_reason_of(delta: Delta) -> str | None:
    """In OpenAI's words. An answer that was aborted, and is sent all the same, was cut short."""
    return "length" if delta.finish_reason == "abort" else delta.finish_reason
