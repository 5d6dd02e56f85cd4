"""The helper's side of `strop.formats.helper`: limits, then requests until the parent has gone.

Reads framed msgpack from stdin, writes framed msgpack to stdout (four bytes of length, little-endian, then the body).
"""

import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import msgspec

MAX_MESSAGE_CHARS = 500


def serve(answer: Callable[[Any], dict[str, Any]]) -> None:
    """Answers requests until stdin ends. No file can be opened any more; limits come from the command line.

    Arguments of the process: memory limit in bytes, processor time per request in seconds.
    """
    memory_bytes, cpu_s = (int(argument) for argument in sys.argv[1:3])
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    _write_frame({"ready": True})
    while True:
        body = _read_exactly(int.from_bytes(_read_exactly(4), "little"))
        # If the parent is killed while a request loops, nobody is left to stop this process but the kernel.
        _limit(resource.RLIMIT_CPU, int(sum(os.times()[:2])) + cpu_s)
        _write_frame(answer(msgspec.msgpack.decode(body)))


def failure(kind: str, message: str) -> dict[str, Any]:
    """An error reply; `message` cut to a readable length."""
    printable = message.encode("utf-8", "backslashreplace").decode()
    return {"error": kind, "message": printable[:MAX_MESSAGE_CHARS]}


def _read_exactly(num_bytes: int) -> bytes:
    """Bytes from stdin; ends the process when the parent has gone."""
    data = sys.stdin.buffer.read(num_bytes)
    if len(data) < num_bytes:
        sys.exit(0)
    return data


def _write_frame(message: dict[str, Any]) -> None:
    """Send one message to the parent."""
    body = msgspec.msgpack.encode(message)
    sys.stdout.buffer.write(len(body).to_bytes(4, "little"))
    sys.stdout.buffer.write(body)
    sys.stdout.buffer.flush()


def _limit(kind: int, soft: int) -> None:
    """Set a soft resource limit, within the hard one."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
