"""A lean HTTP/1.1 client: what it adds to each chunk of a stream must not show in the chunk's time."""

import asyncio
import json
import ssl
from collections.abc import Callable
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from strop.core.errors import RequestError, ServerError

OnBody = Callable[[float, bytes], None]
"""Gets each piece of a body with the time at which it was received, on the clock of `perf_counter`."""

_MAX_REPLY_BYTES = 64 << 20
_MAX_REFUSAL_BYTES = 1 << 20
_MAX_SHOWN = 300


class Connection(asyncio.Protocol):
    """One connection, with one exchange at a time."""

    def __init__(self) -> None:
        self.is_reusable = False
        self.has_received = False
        """Anything, in this exchange."""
        self.refusal = bytearray()
        """The body of a response whose status is not 200, at most `_MAX_REFUSAL_BYTES` of it."""
        self._transport: asyncio.Transport
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, on_body: OnBody) -> int:
        """Sends a request, hands on the body of a 200 response as it comes, and returns the status.

        Raises:
            ServerError: the connection broke, or what came is not HTTP.
        """
        self._parser = httptools.HttpResponseParser(self)
        self._on_body, self._has_end = on_body, False
        self.has_received = self.is_reusable = False
        self.refusal.clear()
        if self._transport.is_closing():
            raise ServerError("broken connection", "the server closed it")
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._done = None
            if not self.is_reusable:
                self._transport.abort()
        return self._parser.get_status_code()

    def close(self) -> None:
        """Ends it, whatever it was doing."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio, at once after it received."""
        self._now_s = perf_counter()
        self.has_received = True
        if self._done is None:  # nobody asked
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(ServerError("malformed response", f"{error}: {data[:_MAX_SHOWN]!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.is_reusable = False
        is_complete = self.has_received and not self._has_end and exc is None
        self._finish(
            None if is_complete else ServerError("broken connection", str(exc or "the server closed it in an answer"))
        )

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_end = True  # of others, the connection's end is the body's

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        if self._parser.get_status_code() == 200:
            self._on_body(self._now_s, body)
        elif len(self.refusal) < _MAX_REFUSAL_BYTES:
            self.refusal += body

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._parser.get_status_code() >= 200:  # below are interim responses
            self.is_reusable = self._parser.should_keep_alive()
            self._finish(None)

    def _finish(self, error: ServerError | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class HttpClient:
    """Connections to one server, kept open between requests."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        """`url` is the server's, with or without a final `/v1`. RequestError for one that is no such URL."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise RequestError(f"{url!r} is not a server's address: give one like http://127.0.0.1:8000")
        self.url = url
        self.timeout_s = timeout_s
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._headers = f"Host: {host}:{self._port}\r\nAccept-Encoding: identity\r\nUser-Agent: strop-bench\r\n"
        if api_key is not None:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[Connection] = []

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request for `path` below the server's root."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return (head + "\r\n").encode("latin-1") + body

    async def send(self, request: bytes, on_body: OnBody) -> None:
        """Sends a request and hands on the body of a 200 response as it comes.

        Raises:
            ServerError: no connection, a broken one, a status other than 200, or more than `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                status, connection = await self._exchange(request, on_body)
        except TimeoutError:
            raise ServerError("time-out", f"no complete answer in {self.timeout_s:g} s") from None
        if connection.is_reusable:
            self._idle.append(connection)
        if status != 200:
            raise ServerError(f"HTTP {status}", self.presentable(_reason(bytes(connection.refusal))))

    async def json(self, method: str, path: str, content: Any = None) -> Any:
        """What the server answers, parsed. ServerError as for `send`, and for what is not JSON."""
        reply = bytearray()

        def take(_: float, piece: bytes) -> None:
            if len(reply) + len(piece) > _MAX_REPLY_BYTES:
                raise ValueError(f"{path} is longer than {_MAX_REPLY_BYTES} bytes")
            reply.extend(piece)

        body = b"" if content is None else json.dumps(content).encode()
        await self.send(self.request(method, path, body), take)
        try:
            return json.loads(reply)
        except ValueError:
            raise ServerError("malformed response", f"{path} is not JSON: {bytes(reply[:_MAX_SHOWN])!r}") from None

    def presentable(self, text: str) -> str:
        """What a server said, short, in one line that cannot steer a terminal, without the API key."""
        text = text.replace(self._api_key, "***") if self._api_key else text
        return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_SHOWN])

    def close(self) -> None:
        """Ends the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, request: bytes, on_body: OnBody) -> tuple[int, Connection]:
        while self._idle:  # one of them may have ended unseen
            connection = self._idle.pop()
            try:
                return await connection.exchange(request, on_body), connection
            except ServerError:
                if connection.has_received:
                    raise
        connection = await self._connect()
        return await connection.exchange(request, on_body), connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        except (OSError, UnicodeError) as error:  # the latter for names that are none
            raise ServerError("connection", str(error)) from None
        return connection


def _reason(body: bytes) -> str:
    """The message in an error's JSON, else the beginning of the body."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
