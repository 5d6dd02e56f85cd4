"""Bytes on a socket that are not as they should be, and what one client's bytes do to the others."""

import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from http_client import ask, checked_error
from leaving import request_bytes
from msgspec import json


def said_to(url: str, data: bytes) -> tuple[int, bytes]:
    """Status and body of what the server answers before it closes the connection."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


GARBAGE = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": bytes.fromhex("16030100c6010000c20303"),
    "an unknown method": b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no colon": b"GET /livez HTTP/1.1\r\nHost localhost\r\n\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a negative length": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -2\r\n\r\n{}",
    "a length and chunks": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunks": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a zero byte in a header": b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage(server_url: str, what: str) -> None:
    status, body = said_to(server_url, GARBAGE[what])
    assert status == 400
    assert checked_error(json.decode(body))["type"] == "invalid_request_error"
    assert ask(server_url, "/livez").status == 200


def test_endless_heads(server_url: str) -> None:
    status, body = said_to(server_url, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000)
    assert status == 431 and "65536" in checked_error(json.decode(body))["message"]


def test_a_body_larger_than_allowed(server_url: str) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    status, body = said_to(server_url, head + b"Content-Length: 99999999999\r\n\r\n{")
    assert status == 413 and "4194304" in checked_error(json.decode(body))["message"]
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    status, body = said_to(server_url, head + b"Transfer-Encoding: chunked\r\n\r\n" + 70 * chunk)
    assert status == 413


def test_requests_in_a_row_on_one_connection(server_url: str) -> None:
    body = request_bytes("/tokenize", {"prompt": "a b c"})
    with socket.create_connection((urlsplit(server_url).hostname, urlsplit(server_url).port), timeout=60) as connection:
        connection.sendall(3 * body)
        answer = b""
        while answer.count(b'"count":3') < 3:
            answer += connection.recv(65536)
    assert answer.count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize(
    ("path", "meant"),
    [("/chat/completions", "/v1/chat/completions"), ("/v1/v1/models", "/v1/models"), ("/v1/tokenize", "/tokenize")],
)
def test_a_base_url_with_or_without_v1(server_url: str, path: str, meant: str) -> None:
    reply = ask(server_url, path)
    assert reply.status == 404 and f"did you mean {meant}?" in reply.error["message"]


def test_head_and_options(server_url: str) -> None:
    assert ask(server_url, "/livez", method="HEAD").status == 200
    refused = ask(server_url, "/v1/models", method="OPTIONS", headers={"Origin": "https://example.com"})
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert refused.status == 405 and "access-control-allow-origin" not in refused.headers


def test_a_long_text_holds_up_nobody(server_url: str) -> None:
    """Megabytes to be made tokens: meanwhile the server hears others."""
    with ThreadPoolExecutor(1) as pool:
        for path, body, least in (
            ("/tokenize", {"prompt": "no " * 1_300_000}, 10),
            ("/detokenize", {"tokens": [104] * 700_000}, 3),
        ):
            long = pool.submit(ask, server_url, path, body)
            num_heard = 0
            while not long.done():
                assert ask(server_url, "/livez").status == 200
                num_heard += 1
            assert long.result().status == 200
            assert num_heard > least, path
