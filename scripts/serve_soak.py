"""Loads a server for long, with clients that leave, and says what it lost or kept: answers, memory, cache blocks.

    python scripts/serve_soak.py MODEL [--minutes 30] [--warm-up 6] [--load 0.8] [--leaving 0.1] [--out samples.csv]

First a closed loop measures how many requests a second the server can answer; then requests of mixed kinds and lengths
come at random, so that on average the given share of that is asked. The first minutes are a warm-up: pages of the cache
become resident when they are first used. Prints errors, leaked blocks, open files before and after, and the slope
of the resident memory of both processes after the warm-up. Exits with 1 unless there are no errors, no leaked blocks or
files, and less than 1 MiB a minute. What is refused because others took the machine's time (429) is no error.
"""

import argparse
import asyncio
import contextlib
import csv
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "serve"))

from leaving import STAGES, in_thread, leave, request_bytes, some_request, some_text  # noqa: E402
from server_process import ServerProcess  # noqa: E402

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
SAMPLE_S = 5.0
KEEP_ALIVE_S = 10.0  # the server closes a connection that is silent for longer
MODEL = "soak"
LEAKED = "strop:blocks_leaked"
RESTARTS = "strop:engine_restarts_total"


def whole_request(draw: random.Random) -> bytes:
    """One that is answered to its end."""
    words = some_text(draw, draw.choice((5, 20, 60, 250)))
    how: dict[str, Any] = {"model": MODEL, "max_tokens": draw.choice((8, 32, 64, 128)), "stream": draw.random() < 0.7}
    how |= draw.choice(({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "seed": draw.getrandbits(30)}))
    how |= draw.choice(({}, {}, {}, {"n": 2}, {"logprobs": True, "top_logprobs": 5}, {"stop": ["the", "."]}))
    if draw.random() < 0.1:
        how |= {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}
    messages = [{"role": "user", "content": words}]
    return request_bytes("/v1/chat/completions", {**how, "messages": messages}, Connection="close")


class Soak:
    """The load, and what came of it."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.draw = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.samples: list[tuple[float, float, float]] = []
        """Seconds, and MiB of the API's and of the engine's process."""
        self.most_leaked = 0.0
        self._port = int(server.url.rsplit(":", 1)[1])

    async def ask(self, asked: bytes) -> None:
        """One request, to its end."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                writer.write(asked)
                reply = await asyncio.wait_for(reader.read(), 300)
            finally:
                writer.close()
            self.outcomes[_judged(reply)] += 1
        except (OSError, TimeoutError) as error:
            self.outcomes[f"error: {type(error).__name__}"] += 1

    async def capacity_per_s(self, duration_s: float, num_clients: int = 32) -> float:
        """Requests that are answered each second while `num_clients` always wait for one."""
        end_s = time.monotonic() + duration_s

        async def client() -> int:
            count = 0
            while time.monotonic() < end_s:
                await self.ask(whole_request(self.draw))
                count += 1
            return count

        begin_s = time.monotonic()
        counts = await asyncio.gather(*(client() for _ in range(num_clients)))
        return sum(counts) / (time.monotonic() - begin_s)

    async def run(self, rate_per_s: float, duration_s: float, leaving: float) -> None:
        """Poisson arrivals; a share of the clients leaves."""
        sampling = asyncio.create_task(self._sample())
        end_s = time.monotonic() + duration_s
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < end_s:
                await asyncio.sleep(self.draw.expovariate(rate_per_s))
                group.create_task(self._leave() if self.draw.random() < leaving else self.ask(whole_request(self.draw)))
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling  # raises what ended it before

    async def num_open_files(self) -> list[int]:
        """Of the API's and of the engine's process, when nothing is asked any more."""
        await in_thread(self.server.wait_until_idle)
        await asyncio.sleep(KEEP_ALIVE_S)
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (self.server.process.pid, self.server.engine_pid)]

    async def _leave(self) -> None:
        stage = self.draw.choice(STAGES)
        asked = some_request(self.draw, stage, MODEL)
        try:
            await leave(self.server.url, stage, asked, random.Random(self.draw.getrandbits(32)))
            self.outcomes["left"] += 1
        except (OSError, TimeoutError) as error:
            self.outcomes[f"error: {type(error).__name__} of one that left"] += 1

    async def _sample(self) -> None:
        begin_s = time.monotonic()
        while True:
            with contextlib.suppress(OSError, StopIteration):  # an engine that is gone: its restart is an error enough
                api, engine = _resident_mib(self.server.process.pid), _resident_mib(self.server.engine_pid)
                self.samples.append((time.monotonic() - begin_s, api, engine))
                self.most_leaked = max(self.most_leaked, await in_thread(lambda: self.server.metric(LEAKED)))
            await asyncio.sleep(SAMPLE_S)


def _judged(reply: bytes) -> str:
    status = int(reply[9:12]) if reply.startswith(b"HTTP/1.1 ") else 0
    if status == 429:
        return "refused: 429"
    if status != 200:
        return f"error: status {status}"
    head, _, body = reply.partition(b"\r\n\r\n")
    if b"text/event-stream" in head:
        is_whole = body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b'data: {"error"' not in body
    else:
        is_whole = b"content-length: %d\r\n" % len(body) in head + b"\r\n"
    return "answered" if is_whole else "error: a broken answer"


def _resident_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def slope_per_minute(samples: Sequence[tuple[float, ...]], column: int) -> float:
    """By least squares; the first column has seconds."""
    values = np.array(samples)
    return float(np.polyfit(values[:, 0] / 60, values[:, column], 1)[0])


async def soak(server: ServerProcess, args: argparse.Namespace, say: Callable[[str], None]) -> bool:
    """Whether all went well."""
    work = Soak(server, args.seed)
    capacity = await work.capacity_per_s(min(60.0, 6 * args.minutes))
    files_before = await work.num_open_files()
    rate = args.load * capacity
    say(f"capacity {capacity:.2f} requests/s; now {rate:.2f} a second for {args.minutes:g} minutes")
    work.outcomes.clear()
    await work.run(rate, 60 * args.minutes, args.leaving)
    files_after = await work.num_open_files()
    if args.out is not None:
        with args.out.open("w", newline="") as file:
            csv.writer(file).writerows([("seconds", "api_mib", "engine_mib"), *work.samples])
    for outcome, count in sorted(work.outcomes.items()):
        say(f"{outcome}: {count}")
    warm = [sample for sample in work.samples if sample[0] >= 60 * args.warm_up]
    wrong = [outcome for outcome in work.outcomes if outcome.startswith("error")]
    for name, column, before, after in zip(("API", "engine"), (1, 2), files_before, files_after, strict=True):
        slope = slope_per_minute(warm, column)
        first, last = warm[0][column], warm[-1][column]
        say(f"{name} process: {slope:+.3f} MiB a minute after the warm-up ({first:.1f} -> {last:.1f} MiB)")
        say(f"{name} process: {before} open files before, {after} after")
        wrong += [f"{name}'s memory"] * (slope >= 1) + [f"{name}'s open files"] * (after > before)
    for name, num in (("blocks leaked", work.most_leaked), ("engine restarts", server.metric(RESTARTS))):
        say(f"{name}: {num:.0f}")
        wrong += [name] * (num > 0)
    say(f"wrong: {', '.join(wrong) or 'nothing'}")
    return not wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=6.0, help="minutes of these, whose memory does not count")
    parser.add_argument("--load", type=float, default=0.8, help="share of the capacity")
    parser.add_argument("--leaving", type=float, default=0.1, help="share of the clients that leave")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV file for the samples of memory")
    args = parser.parse_args()
    if args.warm_up >= args.minutes:
        parser.error(f"--warm-up {args.warm_up:g} must be less than --minutes {args.minutes:g}")
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "log"
        options = (args.model, "--name", MODEL, "--context", 2048)
        with ServerProcess(*options, environment=dict(os.environ), log_path=log_path) as server:
            is_well = asyncio.run(soak(server.ready(), args, lambda line: print(line, flush=True)))
            if not is_well:
                print("\n".join(line for line in server.log.splitlines() if " INFO " not in line)[-4000:])
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
