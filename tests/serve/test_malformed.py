"""The corpus of what must be refused: each line a request, why it is here, and where it was seen.

A line has `body` (JSON), or text as `text`, `latin1` (bytes) or `pieces` (text and how often). It is answered in two
seconds with `status` (or 400) and an error in OpenAI's shape, whose `param` and `code` may be given. What is only
`hostile`, and not wrong, may be answered, too: within the same time, and without harm to others.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_client import ask
from server_process import ServerProcess, Start

CORPUS = Path(__file__).with_name("corpus")
LIMIT_S = 2.0
CHAT: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 0,
    "max_tokens": 8,
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text().splitlines()]


def data(row: dict[str, Any]) -> bytes | None:
    if "pieces" in row:
        return "".join(text * count for text, count in row["pieces"]).encode()
    if "latin1" in row:
        text: str = row["latin1"]
        return text.encode("latin1")
    if "text" in row:
        return str(row["text"]).encode()
    return json.dumps(row["body"]).encode() if "body" in row else None


def wrong(url: str, row: dict[str, Any]) -> str | None:
    """What is wrong with the reply."""
    path = "".join(text * count for text, count in row.get("path_pieces", [[row["path"], 1]]))
    begin_s = time.monotonic()
    reply = ask(url, path, data(row), method=row.get("method"), headers=row.get("headers"), timeout_s=30)
    took_s = time.monotonic() - begin_s
    if took_s > LIMIT_S:
        return f"it took {took_s:.1f} s"
    if row.get("hostile") and reply.status == 200:
        return None
    if reply.status != row.get("status", 400):
        return f"status {reply.status}: {reply.body[:200]!r}"
    error = reply.error
    for name in ("param", "code"):
        if row.get(name) is not None and not (error[name] or "").startswith(row[name]):
            return f"{name} is {error[name]!r}: {error['message']}"
    return None


def check(url: str, name: str) -> None:
    before = ask(url, "/v1/chat/completions", CHAT).json["choices"]
    found = [f"{row['why']}: {problem}" for row in rows(name) if (problem := wrong(url, row))]
    assert not found, "\n".join(found)
    assert ask(url, "/readyz").status == 200
    assert ask(url, "/v1/chat/completions", CHAT).json["choices"] == before


@pytest.mark.parametrize("name", ["bodies", "http", "fields", "messages", "tools", "shapes", "schemas"])
def test_what_is_malformed(server_url: str, name: str) -> None:
    check(server_url, name)


@pytest.fixture(scope="module")
def hostile(serve_smollm2: Start) -> Iterator[ServerProcess]:
    with serve_smollm2("--template", CORPUS / "hostile.jinja") as server:
        yield server.ready()


def test_templates(hostile: ServerProcess) -> None:
    check(hostile.url, "templates")
    assert hostile.metric("strop:engine_restarts_total") == 0


def test_the_corpus_is_large_enough() -> None:
    everything = [row for path in CORPUS.glob("*.jsonl") for row in rows(path.stem)]
    assert len(everything) >= 200
    assert all(row["why"] for row in everything)
    requests = [(row["path"], data(row), str(row.get("headers")), row.get("method")) for row in everything]
    assert len(set(requests)) == len(requests)
