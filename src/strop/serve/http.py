"""uvicorn's HTTP protocol with an end to what a stranger may send before a request is known: in bytes and in time."""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from strop.serve.gate import error_headers
from strop.serve.openai.errors import ApiError, error_body

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 20.0


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection whose request line and headers are endless, or never come to their end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts from the first moment: a silent connection is closed too."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """A head may come in any number of pieces, and a body in the same piece as its head."""
        super().data_received(data)
        if self._deadline is not None:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes", 431)

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP."""
        self._refuse(f"{msg} This server speaks HTTP/1.1.", 400)

    def on_message_begin(self) -> None:
        """Of the first request, or of another on the same connection."""
        super().on_message_begin()
        if self._deadline is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """From here on the application bounds what comes."""
        self._stop_clock()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._stop_clock()
        super().connection_lost(exc)

    def _refuse(self, message: str, status: int) -> None:
        """The last response on this connection."""
        if self.transport.is_closing():
            return
        error = ApiError(message, status=status)
        lines = [(b"connection", b"close"), *error_headers(error, body := error_body(error))]
        head = b"".join(b"%b: %b\r\n" % line for line in lines)
        self.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, HTTPStatus(status).phrase.encode(), head, body))
        self.transport.close()

    def _expect_head(self) -> None:
        self._num_head_bytes = 0
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
