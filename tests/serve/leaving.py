"""Clients that leave at any moment, by raw sockets."""

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

STAGES = ("headers", "body", "at once", "prefill", "streaming", "whole")
_TEXT = "why how knife river cat prime seven colour poem stone write list the a of and in one short long"
_NO_LINGER = struct.pack("ii", 1, 0)  # closing then sends a reset


async def leave_often(
    url: str, count: int, seed: int, *, num_at_once: int = 8, model: str = "smollm2"
) -> "Counter[str]":
    """`count` requests to a server, each left by its client before its end. Returns how many at which stage."""
    draw = random.Random(seed)
    turns, stages = asyncio.Semaphore(num_at_once), Counter[str]()

    async def one(stage: str, asked: bytes, random_seed: int) -> None:
        async with turns:
            await leave(url, stage, asked, random.Random(random_seed))
            stages[stage] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            stage = draw.choice(STAGES)
            group.create_task(one(stage, some_request(draw, stage, model), draw.getrandbits(32)))
    return stages


async def leave(url: str, stage: str, asked: bytes, draw: random.Random) -> None:
    """Sends `asked`, or part of it, and leaves at that stage, in a random way."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head_len = asked.index(b"\r\n\r\n") + 4
        if stage == "headers":
            writer.write(asked[: draw.randrange(head_len)])
        elif stage == "body":
            writer.write(asked[: draw.randrange(head_len, len(asked))])
        else:
            writer.write(asked)
        await writer.drain()
        if stage == "streaming":
            await asyncio.wait_for(_frames(reader, draw.randint(1, 12)), 120)
        elif stage != "at once":
            await asyncio.sleep(draw.random() * (0.06 if stage in ("headers", "body", "prefill") else 0.5))
        if draw.random() < 0.3:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        elif draw.random() < 0.3:
            with contextlib.suppress(OSError):
                writer.write_eof()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def some_request(draw: random.Random, stage: str, model: str) -> bytes:
    """A request, for the stage at which it will be left: one that would take long, streamed or not."""
    num_words = draw.randint(600, 1200) if stage == "prefill" else draw.choice((3, 40, 200))
    text = some_text(draw, num_words)
    how: dict[str, Any] = {"n": draw.choice((1, 1, 1, 3)), "temperature": draw.choice((0, 1)), "ignore_eos": True}
    how |= {"model": model, "max_tokens": 600, "stream": stage in ("streaming", "prefill")}
    how |= draw.choice(({}, {"stop": ["never said"]}, {"logprobs": draw.choice((True, None))}))
    if draw.random() < 0.2:
        how["logprobs"] = draw.choice((2, None))
        return request_bytes("/v1/completions", {"prompt": [text, text[: num_words // 2] or "a"], **how})
    return request_bytes("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **how})


def some_text(draw: random.Random, num_words: int) -> str:
    """Words without a meaning."""
    return " ".join(draw.choices(_TEXT.split(), k=num_words))


def request_bytes(path: str, body: dict[str, Any], **headers: str) -> bytes:
    """A POST."""
    data = json.dumps(body).encode()
    given = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode() + data


async def _frames(reader: asyncio.StreamReader, count: int) -> None:
    """Reads so many frames, or to the end."""
    while count and (line := await reader.readline()):
        count -= line.startswith(b"data: ")


async def in_thread(function: Callable[[], Any]) -> Any:
    """What a blocking function returns."""
    return await asyncio.get_running_loop().run_in_executor(None, function)
