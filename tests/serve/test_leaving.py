"""Whatever stage a client leaves in: its blocks come back, and nobody else's answer changes.

More of them: `STROP_TEST_DISCONNECTS=1000 pytest -s tests/serve/test_leaving.py -k random` (and STROP_TEST_SEED).
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from http_client import ask, stream
from leaving import STAGES, in_thread, leave_often
from server_process import ServerProcess, Start

NUM_DISCONNECTS = int(os.environ.get("STROP_TEST_DISCONNECTS", "200"))
SEED = int(os.environ.get("STROP_TEST_SEED", "300"))
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


def texts_of(server: ServerProcess, body: dict[str, Any]) -> list[str]:
    """The whole text of each choice of a stream."""
    texts, reasons = ["", ""], set()
    for choice in (choice for frame in server.ask("/v1/chat/completions", body).frames for choice in frame["choices"]):
        texts[choice["index"]] += choice["delta"].get("content") or ""
        reasons.add(choice["finish_reason"])
    assert reasons == {None, "length"}
    return texts


def test_random_disconnects(narrow: ServerProcess) -> None:
    short = {**VICTIM, "max_tokens": 40}
    others = [short, {**short, "temperature": 0}, {**short, "n": 2}]
    undisturbed = [texts_of(narrow, body) for body in others]

    async def main() -> tuple[Counter[str], int]:
        leaving = asyncio.create_task(leave_often(narrow.url, NUM_DISCONNECTS, SEED))
        num_rounds = 0
        while not leaving.done():
            texts = await asyncio.gather(*(in_thread(partial(texts_of, narrow, body)) for body in others))
            assert texts == undisturbed
            num_rounds += 1
        return leaving.result(), num_rounds

    stages, num_rounds = asyncio.run(main())
    assert set(stages) == set(STAGES) and stages.total() == NUM_DISCONNECTS
    narrow.wait_until_idle()
    assert narrow.metric("strop:blocks_leaked") == 0
    num_cancelled = narrow.metric("strop:requests_cancelled_total")
    assert num_cancelled > NUM_DISCONNECTS / 3
    assert "Traceback" not in narrow.log and " ERROR " not in narrow.log
    assert [texts_of(narrow, body) for body in others] == undisturbed
    print(f"left: {dict(stages)}; {num_cancelled:.0f} cancelled; {num_rounds} rounds of other answers, unchanged")


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
