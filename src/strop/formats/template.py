"""Chat templates, rendered in a sandbox inside a helper process with limits on time, memory and output."""

import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import msgspec

from strop.core.config import MIB
from strop.core.errors import CapacityError, FormatError, RequestError

_START_TIMEOUT_S = 60.0
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ", "PYTHONHOME")


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
        self._helper: _Helper | None = None

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

    def _running_helper(self) -> "_Helper":
        if self._helper is None or self._helper.ended:
            self._drop_helper()
            self._helper = _Helper(self.memory_bytes, cpu_s=int(self.timeout_s) + 2)
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


class _Helper:
    """One helper process and its two pipes, both non-blocking."""

    def __init__(self, memory_bytes: int, cpu_s: int) -> None:
        environ = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-P", "-m", f"{__package__}.template_worker", str(memory_bytes), str(cpu_s)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the program, not for its helper
        )
        self.stop = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._ready = False

    @property
    def ended(self) -> bool:
        return not self.stop.alive or self._process.poll() is not None

    def wait_ready(self) -> None:
        if self._ready:
            return
        try:
            self.exchange(b"", max_reply_bytes=1024, timeout_s=_START_TIMEOUT_S)
        except (OSError, EOFError):  # TimeoutError is an OSError
            status = self._process.poll()
            self.stop()
            raise CapacityError(
                f"the process that renders chat templates did not start (exit status {status}); "
                f"{sys.executable} must be able to import jinja2 and msgspec, within its memory limit"
            ) from None
        self._ready = True

    def exchange(self, request: bytes, *, max_reply_bytes: int, timeout_s: float) -> bytes:
        """Send one frame (none if empty) and receive one. Raises TimeoutError, or EOFError / OSError if it ended."""
        deadline_s = time.monotonic() + timeout_s
        unsent = memoryview(request)
        reply = bytearray()
        reply_len = 4
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            if unsent:
                selector.register(self._stdin, selectors.EVENT_WRITE)
            while len(reply) < reply_len:
                remaining_s = deadline_s - time.monotonic()
                ready = selector.select(max(remaining_s, 0))
                if not ready and remaining_s <= 0:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fd == self._stdin:
                        unsent = unsent[os.write(self._stdin, unsent[: 64 * 1024]) :]
                        if not unsent:
                            selector.unregister(self._stdin)
                        continue
                    data = os.read(self._stdout, min(reply_len - len(reply), MIB))
                    if not data:
                        raise EOFError
                    reply += data
                    if reply_len == 4 and len(reply) == 4:
                        reply_len += int.from_bytes(reply, "little")
                        if reply_len > max_reply_bytes + 4:
                            raise EOFError
        return bytes(reply[4:])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


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
