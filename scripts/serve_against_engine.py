"""What serving costs: the same streams over HTTP and from an engine in this process, in turns.

python scripts/serve_against_engine.py MODEL --streams 32 --rounds 4

Prints tokens per second of both for so many streams at once, and the time to the first token of a single one, as
medians, and of the rounds' ratios and differences. The client reads raw sockets, so that it hardly takes time itself.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from strop.core.config import EngineConfig
from strop.core.request import Request, SamplingParams
from strop.engine.engine import Engine

PROMPT_TOKENS, ANSWER_TOKENS, CONTEXT_LEN = 128, 128, 2048
STEP_TOKENS, CHUNK_TOKENS = 256, 64


def prompt(seed: int) -> list[int]:
    """Of one request; no two have the same."""
    rng = random.Random(seed)
    return [rng.randrange(100, 30_000) for _ in range(PROMPT_TOKENS)]


@contextmanager
def running_server(model: str, streams: int) -> Iterator[int]:
    """The port of `strop serve`, once it is ready."""
    command = [sys.executable, "-c", "from strop.cli.main import main; main()", "serve", model, "--name", "model"]
    command += ["--port", "0", "--context", str(CONTEXT_LEN), "--max-seqs", str(streams)]
    command += ["--max-step-tokens", str(STEP_TOKENS), "--max-chunk-tokens", str(CHUNK_TOKENS)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = 0
    try:
        for line in process.stderr:
            if found := re.match(r"http://127\.0\.0\.1:(\d+) ", line):
                port = int(found[1])
            if line.startswith("ready after"):
                break
        else:
            raise SystemExit(f"the server ended with {process.wait()}")
        yield port
    finally:
        process.terminate()
        process.wait()


async def stream(port: int, seed: int, answer_tokens: int) -> float:
    """Reads a whole answer; seconds to its first token."""
    body = {"model": "model", "prompt": prompt(seed), "max_tokens": answer_tokens, "temperature": 0}
    content = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begin = time.perf_counter()
    writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + content)
    first_s, seen = 0.0, b""
    while piece := await reader.read(1 << 16):
        seen += piece
        if not first_s and b'"text"' in seen:
            first_s = time.perf_counter() - begin
    writer.close()
    if b"[DONE]" not in seen:
        raise SystemExit(f"the server said {seen[:300]!r}")
    return first_s


async def served(port: int, streams: int, seed: int) -> float:
    """Tokens per second."""
    begin = time.perf_counter()
    await asyncio.gather(*(stream(port, seed + i, ANSWER_TOKENS) for i in range(streams)))
    return streams * ANSWER_TOKENS / (time.perf_counter() - begin)


def add(engine: Engine, seed: int, answer_tokens: int) -> None:
    """One request."""
    params = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True)
    engine.add(Request(str(seed), tuple(prompt(seed)), params))


def in_process(engine: Engine, streams: int, seed: int) -> float:
    """Tokens per second."""
    begin = time.perf_counter()
    for i in range(streams):
        add(engine, seed + i, ANSWER_TOKENS)
    while engine.has_unfinished:
        engine.step()
    return streams * ANSWER_TOKENS / (time.perf_counter() - begin)


def first_token_s(engine: Engine, seed: int) -> float:
    """Of a request alone."""
    begin = time.perf_counter()
    add(engine, seed, 4)
    while not engine.step():
        pass
    seconds = time.perf_counter() - begin
    while engine.has_unfinished:
        engine.step()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=30, help="of times to the first token")
    options = parser.parse_args()
    streams = options.streams
    config = EngineConfig(streams, STEP_TOKENS, CHUNK_TOKENS, max_context_len=CONTEXT_LEN)
    engine = Engine.load(options.model, config)
    with running_server(options.model, streams) as port:
        rates = []
        for i in range(-1, options.rounds):  # the first warms up
            seed = 1000 * (i + 1)
            pair = asyncio.run(served(port, streams, seed)), in_process(engine, streams, seed)
            rates += [pair] if i >= 0 else []
        firsts = []
        for i in range(-3, options.pairs):
            seed = 1_000_000 + i
            both = asyncio.run(stream(port, seed, 4)), first_token_s(engine, seed)
            firsts += [both] if i >= 0 else []
    for what, pairs, scale, unit in (("rate", rates, 1.0, "tokens/s"), ("first token", firsts, 1e3, "ms")):
        ours, engines = (scale * median(side) for side in zip(*pairs, strict=True))
        ratio = median(a / b for a, b in pairs)
        more = scale * median(a - b for a, b in pairs)
        print(f"{what}: served {ours:.4g}, in process {engines:.4g} {unit}; ratio {ratio:.3f}, difference {more:+.3g}")


if __name__ == "__main__":
    main()
