"""The same answer, bit for bit, alone and among 64."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from http_client import ask

WORDS = "why how knife river cat prime seven colour poem stone write list the a of and in one short long"


def test_64_clients_get_what_one_gets(server_url: str) -> None:
    draw = random.Random(64)
    bodies: list[dict[str, Any]] = []
    for i in range(64):
        text = " ".join(draw.choices(WORDS.split(), k=draw.choice((3, 30, 300))))
        more = {"logprobs": True, "top_logprobs": 5} if i % 2 else {}
        message = {"role": "user", "content": text}
        bodies.append({"model": "smollm2", "messages": [message], "max_tokens": 16, "temperature": 0, **more})

    def answer(body: dict[str, Any]) -> Any:
        reply = ask(server_url, "/v1/chat/completions", body)
        assert reply.status == 200, reply.body
        return reply.json["choices"]

    alone = [answer(body) for body in bodies]
    draw.shuffle(order := list(range(64)))
    with ThreadPoolExecutor(64) as pool:
        crowd = dict(zip(order, pool.map(answer, [bodies[i] for i in order]), strict=True))
    assert [crowd[i] for i in range(64)] == alone
