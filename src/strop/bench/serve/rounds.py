"""One round: all requests of a load sent to one server, with our own cost on the side."""

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from strop.bench.serve.load import Arrival, ClosedLoop, Load
from strop.bench.serve.records import Record
from strop.bench.serve.target import Target

_NUM_SIZERS = 8
"""Prompts that are sized at once."""


@dataclass(slots=True)
class Round:
    """What came of it."""

    records: list[Record] = field(default_factory=list)
    wall_s: float = 0.0
    client_cpu_s: float = 0.0
    """Processor time of this process."""
    is_whole: bool = False
    """Whether all requests were sent and ended."""

    @property
    def client_share(self) -> float:
        """Of one processor; near 1 the client is what is measured."""
        return self.client_cpu_s / self.wall_s if self.wall_s else 0.0

    @property
    def lateness_s(self) -> float:
        """How late the latest request was sent, for arrivals that do not wait for answers."""
        return max((record.sent_s - record.due_s for record in self.records), default=0.0)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be sent."""

    arrival: Arrival
    request: bytes


async def prepare(target: Target, arrivals: Sequence[Arrival], num_shared: int, seed: str) -> list[Prepared]:
    """Makes a prompt for each arrival. StropError if the server cannot size it, or there is no room for it."""
    sizers = asyncio.Semaphore(_NUM_SIZERS)

    async def one(number: int, arrival: Arrival) -> Prepared:
        async with sizers:
            prompt = await target.prompts.make(arrival.lengths.prompt_tokens, num_shared, f"{seed}-{number}")
        return Prepared(arrival, target.request(prompt, arrival.lengths.output_tokens))

    tasks = [asyncio.create_task(one(number, arrival)) for number, arrival in enumerate(arrivals)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def run_round(target: Target, load: Load, prepared: Sequence[Prepared], into: Round) -> None:
    """Sends everything. `into` is filled as it goes: cut short, it holds what there was until then."""
    with _own_cost(into):
        if isinstance(load, ClosedLoop):
            await _closed_loop(target, prepared, load.concurrency, into.records)
        else:
            await _open_loop(target, prepared, into.records)
    into.is_whole = True


async def _closed_loop(target: Target, prepared: Sequence[Prepared], concurrency: int, records: list[Record]) -> None:
    begin_s = perf_counter()
    waiting = iter(prepared)

    async def client() -> None:
        for one in waiting:
            record = Record(one.arrival.lengths)
            records.append(record)
            await target.send(one.request, record, begin_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prepared))):
            group.create_task(client())


async def _open_loop(target: Target, prepared: Sequence[Prepared], records: list[Record]) -> None:
    begin_s = perf_counter()
    async with asyncio.TaskGroup() as group:
        for one in prepared:
            while (early_s := begin_s + one.arrival.time_s - perf_counter()) > 0:  # timers may be a little early
                await asyncio.sleep(early_s)
            record = Record(one.arrival.lengths, due_s=one.arrival.time_s)
            records.append(record)
            group.create_task(target.send(one.request, record, begin_s))


@contextmanager
def _own_cost(into: Round) -> Iterator[None]:
    gc.collect()
    gc.disable()  # a pause of ours would be taken for the server's
    begin_s, begin_cpu_s = perf_counter(), time.process_time()
    try:
        yield
    finally:
        into.wall_s, into.client_cpu_s = perf_counter() - begin_s, time.process_time() - begin_cpu_s
        gc.enable()
