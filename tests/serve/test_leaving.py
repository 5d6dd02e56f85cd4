"""Whatever stage a client leaves in: its blocks come back, and nobody else's answer changes."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from http_client import ask, stream
from leaving import STAGES, in_thread, leave_often
from server_process import ServerProcess, Start

VICTIM: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Write a long story about a river and a knife."}],
    "temperature": 1,
    "seed": 11,
    "max_tokens": 500,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def narrow(serve_smollm2: Start) -> Iterator[ServerProcess]:
    """Four sequences at a time: others wait."""
    with serve_smollm2("--max-seqs", 4) as server:
        yield server.ready()


def text_of(server: ServerProcess, body: dict[str, Any]) -> str:
    frames = server.ask("/v1/chat/completions", body).frames
    assert frames[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"])


def test_random_disconnects(narrow: ServerProcess) -> None:
    undisturbed = text_of(narrow, VICTIM)

    async def main() -> tuple[Counter[str], list[str]]:
        leaving = asyncio.create_task(leave_often(narrow.url, 300, seed=300))
        texts = []
        while not leaving.done():
            texts.append(await in_thread(lambda: text_of(narrow, VICTIM)))
        return leaving.result(), texts

    stages, texts = asyncio.run(main())
    assert set(stages) == set(STAGES) and stages.total() == 300
    assert set(texts) == {undisturbed}
    narrow.wait_until_idle()
    assert narrow.metric("strop:blocks_leaked") == 0
    assert narrow.metric("strop:requests_cancelled_total") > 100
    assert "Traceback" not in narrow.log and " ERROR " not in narrow.log
    assert text_of(narrow, VICTIM) == undisturbed


def test_two_requests_of_one_id(server_url: str) -> None:
    """Neither gets the other's answer, and the end of one is not the end of the other."""
    same = {"X-Request-ID": "same"}
    body = {"model": "smollm2", "messages": VICTIM["messages"], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = ask(server_url, "/v1/chat/completions", body).json["choices"]
    with stream(server_url, "/v1/chat/completions", VICTIM, headers=same) as frames:
        next(frames)
        reply = ask(server_url, "/v1/chat/completions", body, headers=same)
        assert reply.json["choices"] == alone
        with stream(server_url, "/v1/chat/completions", {**body, "stream": True}, headers=same) as others:
            next(others)
        *_, last = frames
    assert last["choices"][0]["finish_reason"] == "length"
