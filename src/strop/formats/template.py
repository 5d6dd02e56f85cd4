"""Chat templates, rendered in a sandbox inside a helper process with limits on time, memory and output."""

import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from strop.core.config import MIB
from strop.core.errors import FormatError, RequestError
from strop.formats.helper import Helper


def replace_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and each lone surrogate (broken UTF-8, broken JSON) as U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class TemplateRenderer:
    """Renders templates one at a time; the helper starts on first use and is killed when one overstays its limits.

    Safe to use from several threads. `start()` early hides the helper's start behind other work.
    """

    def __init__(
        self, *, timeout_s: float = 5.0, max_output_bytes: int = 16 * MIB, memory_bytes: int = 512 * MIB
    ) -> None:
        self.timeout_s = timeout_s
        self.max_output_bytes = max_output_bytes
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._helper: Helper | None = None

    def start(self) -> None:
        """Start the helper without waiting for it."""
        with self._lock:
            self._running_helper()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The rendered text, lone surrogates replaced.

        Raises FormatError for a template that does not parse, and RequestError for one that refuses the messages,
        fails, is unsafe, takes longer than `timeout_s`, needs more than `memory_bytes` or writes more than
        `max_output_bytes`.
        """
        request = _encode({"template": template, "variables": variables, "max_output_bytes": self.max_output_bytes})
        with self._lock:
            reply = self._exchange(request)
        if "text" in reply:
            text: str = reply["text"].decode("utf-8", "surrogatepass")
            return replace_surrogates(text)
        kind, message = reply["error"], reply["message"]
        if kind == "syntax":
            raise FormatError(f"the chat template does not parse, {message}; pass a corrected template")
        if kind == "template":
            raise RequestError(f"the chat template refuses these messages: {message}")
        raise RequestError(f"the chat template cannot be rendered: {message}; check the template and the messages")

    def close(self) -> None:
        """Stop the helper; a later `render` starts another."""
        with self._lock:
            self._drop_helper()

    def _running_helper(self) -> Helper:
        if self._helper is None or self._helper.ended:
            self._drop_helper()
            self._helper = Helper("strop.formats.template_worker", self.memory_bytes, cpu_s=int(self.timeout_s) + 2)
        return self._helper

    def _drop_helper(self) -> None:
        if self._helper is not None:
            self._helper.stop()
            self._helper = None

    def _exchange(self, request: bytes) -> dict[str, Any]:
        helper = self._running_helper()
        try:
            helper.wait_ready()
            # One byte of UTF-8 is one byte here: the cap on text, and room for the map around it.
            body = helper.exchange(request, max_reply_bytes=self.max_output_bytes + 64 * 1024, timeout_s=self.timeout_s)
        except TimeoutError:
            self._drop_helper()
            raise RequestError(
                f"the chat template took longer than {self.timeout_s:g} s; check the template for endless loops"
            ) from None
        except (OSError, EOFError):
            self._drop_helper()
            raise RequestError(
                "the chat template ended the process that renders it (recursion too deep, or out of memory); "
                "check the template and the messages"
            ) from None
        except BaseException:
            self._drop_helper()  # a half-read reply must not answer the next request
            raise
        reply: dict[str, Any] = msgspec.msgpack.decode(body)
        return reply


def _encode(message: dict[str, Any]) -> bytes:
    """`message` as one frame; text in it made valid. RequestError if it is not plain JSON-like data."""
    try:
        try:
            body = msgspec.msgpack.encode(message)
        except UnicodeEncodeError:
            body = msgspec.msgpack.encode(_valid_text(message))
    except (TypeError, ValueError, OverflowError, RecursionError, NotImplementedError) as error:
        raise RequestError(f"chat messages must be plain data (text, numbers, lists, maps): {error}") from None
    if len(body) >= 2**31:
        raise RequestError(f"the chat messages take {len(body)} bytes; shorten them")
    return len(body).to_bytes(4, "little") + body


def _valid_text(value: Any) -> Any:
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, Mapping):
        return {_valid_text(key): _valid_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_valid_text(item) for item in value]
    return value
