"""Vectors over HTTP: a decoder's pooled states, fair turns, and clients that leave."""

import asyncio
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from leaving import leave, request_bytes
from server_process import ServerProcess, Start, wait_for

PATH = "/v1/embeddings"
HUGE: dict[str, Any] = {"model": "smollm2", "input": ["a sharp knife is safer than a dull one " * 10] * 500}


@pytest.fixture(scope="module")
def pooled(serve_smollm2: Start) -> Iterator[ServerProcess]:
    with serve_smollm2("--runner", "pooling", "--max-queue", 6) as server:
        yield server.ready()


def vectors(server: ServerProcess, texts: list[str]) -> list[list[float]]:
    reply = server.ask(PATH, {"model": "smollm2", "input": texts})
    assert reply.status == 200, reply.body
    return [item["embedding"] for item in reply.json["data"]]


def test_a_decoder_makes_vectors(pooled: ServerProcess) -> None:
    knife, blade, sea = vectors(pooled, ["a knife", "a blade", "the sea was calm and blue that morning"])
    assert len(knife) == 576 and math.hypot(*knife) == pytest.approx(1, abs=1e-5)
    assert knife != blade != sea
    assert vectors(pooled, ["a blade"]) == [blade]
    refused = pooled.ask("/v1/completions", {"model": "smollm2", "prompt": "a"})
    assert refused.status == 400 and "vectors" in refused.error["message"]


def test_a_long_request_delays_no_short_one(pooled: ServerProcess) -> None:
    before = pooled.metric("strop:requests_cancelled_total")
    with ThreadPoolExecutor(1) as pool:
        huge = pool.submit(pooled.ask, PATH, HUGE | {"input": HUGE["input"][:60]})
        wait_for(lambda: pooled.metric("vllm:num_requests_running"), "the long one", pooled.process)
        assert vectors(pooled, ["a knife"])
        assert not huge.done()
        assert len(huge.result().json["data"]) == 60
    assert pooled.metric("strop:requests_cancelled_total") == before


def test_leaving(pooled: ServerProcess) -> None:
    some = [f"text number {i} " * (i % 50) + "." for i in range(20)]
    alone = vectors(pooled, some)
    draw = random.Random(1)

    async def main() -> None:
        stages = [draw.choice(("headers", "body", "at once", "whole")) for _ in range(40)]
        turns = asyncio.Semaphore(4)

        async def one(stage: str) -> None:
            async with turns:
                await leave(pooled.url, stage, request_bytes(PATH, HUGE), draw)

        await asyncio.gather(*map(one, stages))

    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(asyncio.run, main())
        while not left.done():
            assert vectors(pooled, some) == alone
        left.result()
    pooled.wait_until_idle()
    assert pooled.metric("strop:requests_cancelled_total") >= 8
    assert vectors(pooled, some) == alone


def test_the_queue_has_an_end(pooled: ServerProcess) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(pooled.ask, PATH, HUGE | {"input": HUGE["input"][:8]}) for _ in range(8)]
        statuses = [reply.result().status for reply in waiting]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 6
