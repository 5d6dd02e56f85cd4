"""What is read of a request before it is known."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from strop.serve.gate import read_body
from strop.serve.openai.errors import ApiError


def body_of(*pieces: bytes, headers: dict[str, str] | None = None, ends: bool = True, timeout_s: float = 5.0) -> bytes:
    """What read_body makes of pieces of a body, which stays unfinished unless it `ends`."""
    given = {"content-type": "application/json; charset=utf-8", **(headers or {})}
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if ends:
        messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.sleep(60)

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in given.items()]}
    return asyncio.run(read_body(Request(scope, receive), 8, timeout_s))


def refused(status: int, *pieces: bytes, **how: Any) -> None:
    with pytest.raises(ApiError) as caught:
        body_of(*pieces, **how)
    assert caught.value.status == status


def test_a_body() -> None:
    assert body_of(b"{", b"}") == b"{}"
    assert body_of(b"12345678") == b"12345678"
    assert body_of(b"{}", headers={"content-type": "application/ld+json"}) == b"{}"


def test_what_is_too_large_or_too_slow() -> None:
    refused(413, b"1234", b"56789")
    refused(413, headers={"content-length": "9"}, ends=False)
    refused(408, b"{", ends=False, timeout_s=0.01)
    refused(408, ends=False, timeout_s=0.01)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"])
def test_what_is_not_called_json(kind: str) -> None:
    refused(415, b"{}", headers={"content-type": kind})
