"""HTTP without a library's kindness: exact bytes out, exact bytes in."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """A whole response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, once it is known to be one in OpenAI's shape."""
        assert 400 <= self.status < 600, (self.status, self.body)
        return checked_error(self.json)

    @property
    def frames(self) -> list[Any]:
        """The JSON of each frame of a stream, once it is known to be one; of [DONE] nothing."""
        assert self.status == 200, self.body
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        return [frame for block in self.body.split(b"\n\n") if (frame := parsed_frame(block)) is not None]


def checked_error(body: Any) -> dict[str, Any]:
    """What is in a body or a frame {"error": {...}}; nothing but that may be there."""
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    assert all(isinstance(error[name], str | None) for name in ("param", "code"))
    return error


def parsed_frame(block: bytes) -> Any:
    """The JSON of a frame; None for one that has none. An event's name is what its JSON says."""
    lines = [line for line in block.split(b"\n") if line and not line.startswith(b":")]
    if not lines or lines == [b"data: [DONE]"]:
        return None
    name, data = lines if len(lines) == 2 else (None, lines[0])
    assert data.startswith(b"data: "), block
    frame = json.loads(data.removeprefix(b"data: "), parse_constant=_refuse)
    assert name is None or name == b"event: " + frame["type"].encode(), block
    return frame


def ask(
    url: str,
    path: str,
    body: object = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 120.0,
) -> Reply:
    """The reply to a request; a body that is not bytes goes as JSON."""
    with _sent(url, path, body, method, headers, timeout_s) as response:
        return Reply(response.status, response.headers, response.read())


@contextmanager
def stream(url: str, path: str, body: object, **how: Any) -> Iterator[Iterator[Any]]:
    """The frames of a stream as they come; leaving it leaves the server."""
    headers, timeout_s = how.get("headers"), how.get("timeout_s", 120.0)
    with _sent(url, path, body, None, headers, timeout_s) as response:
        assert response.status == 200, response.read()
        yield _frames(response)


def _frames(response: http.client.HTTPResponse) -> Iterator[Any]:
    block = b""
    while line := response.readline():
        block += line
        if line == b"\n":
            frame = parsed_frame(block)
            block = b""
            if frame is not None:
                yield frame
    assert not block, "the stream broke inside a frame"


@contextmanager
def _sent(
    url: str, path: str, body: object, method: str | None, headers: dict[str, str] | None, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    given = {"content-type": "application/json"} if data is not None else {}
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)) as connection:
        connection.request(method, path, data, given | (headers or {}))
        with connection.getresponse() as response:
            yield response


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
