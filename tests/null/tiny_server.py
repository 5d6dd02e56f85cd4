"""A server that speaks just enough of OpenAI's API, on a real socket, and misbehaves as told."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Step = bytes | float
"""Bytes to send, or seconds to wait."""
Reply = Callable[[dict[str, Any], int], Iterator[Step]]
"""From a request's body and number, the steps of its answer; an answer that stops early breaks the connection."""


def framed(data: bytes) -> bytes:
    """A piece of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(content: Any) -> bytes:
    """A server-sent event in a piece of its own."""
    return framed(b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n")


def token(text: str = " token", finish_reason: str | None = None) -> bytes:
    """A chunk with text."""
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None})


def usage(body: dict[str, Any], num_tokens: int, cached: int = 0) -> bytes:
    """The closing chunk."""
    prompt = body.get("prompt") or body["messages"][0]["content"]
    num_prompt = len(prompt) if isinstance(prompt, list) else len(prompt.split()) + 1  # one token at the beginning
    details = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
    return event({"choices": [], "usage": details | {"prompt_tokens_details": {"cached_tokens": cached}}})


def well(body: dict[str, Any], number: int) -> Iterator[Step]:
    """A good answer: a chunk per token, then usage."""
    yield HEAD
    for i in range(body["max_tokens"]):
        yield token(finish_reason="length" if i + 1 == body["max_tokens"] else None)
    yield usage(body, body["max_tokens"])
    yield event(b"[DONE]") + framed(b"")


def refusal(status: int, message: str) -> bytes:
    """A whole response that is an error."""
    body = json.dumps({"error": {"message": message}}).encode()
    return b"HTTP/1.1 %d Oh\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class TinyServer:
    """Runs in a thread of its own, between `with` and its end. A token is a word."""

    def __init__(self, reply: Reply = well, tokenize: str | None = "prompt", refused: frozenset[str] = frozenset()):
        """`tokenize` names the field of /tokenize that holds the text; `refused` fields of completions get 400."""
        self.reply, self.tokenize, self.refused = reply, tokenize, refused
        self.bodies: list[dict[str, Any]] = []
        """Of all completions, in order."""
        self.heads: list[str] = []
        self.num_connections = 0
        self.num_active = self.max_active = 0

    def __enter__(self) -> "TinyServer":
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)))
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.num_connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while await self._answer(reader, writer):
                pass
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        lengths = [line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length")]
        body = json.loads(await reader.readexactly(int(lengths[0]))) if lengths else {}
        path = head.split()[1]
        if path == "/v1/models":
            writer.write(_whole({"data": [{"id": "tiny"}]}))
            return True
        if path == "/tokenize":
            text = body.get(self.tokenize, "") if self.tokenize else None
            writer.write(refusal(404, "no such route") if text is None else _whole({"tokens": text.split()}))
            return True
        if self.refused & body.keys():
            writer.write(refusal(400, f"unknown field {min(self.refused & body.keys())}"))
            return True
        self.bodies.append(body)
        self.num_active += 1
        self.max_active = max(self.max_active, self.num_active)
        sent = b""
        try:
            for step in self.reply(body, len(self.bodies) - 1):
                if isinstance(step, bytes):
                    writer.write(step)
                    sent += step
                    await writer.drain()
                else:
                    await asyncio.sleep(step)
        finally:
            self.num_active -= 1
        return sent.endswith(framed(b"")) or not sent.startswith((HEAD, b"HTTP/1.0"))


def _whole(content: Any) -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
