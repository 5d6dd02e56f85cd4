"""One `strop bench serve`: servers, loads, rounds."""

import asyncio
import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import Any

import uvloop

from strop import __version__
from strop.bench.serve.http_client import HttpClient
from strop.bench.serve.load import ClosedLoop, Load
from strop.bench.serve.records import Objective, Summary, summarize
from strop.bench.serve.rounds import Round, prepare, run_round
from strop.bench.serve.target import Target, find_target
from strop.core.errors import ServerError

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ServeBenchOptions:
    """What `strop bench serve` was asked, but for the API key."""

    urls: tuple[str, ...]
    loads: tuple[Load, ...]
    seed: int
    """Of prompts and arrivals: one that a server has seen lets its prefix cache answer."""
    model: str | None = None
    is_chat: bool = False
    shared_prefix_tokens: int = 0
    warmup: int | None = None
    """Requests before the first round of each load; None lets the load decide."""
    repeats: int = 3
    timeout_s: float = 600.0
    objective: Objective | None = None
    price_per_hour: float | None = None


@dataclass(slots=True)
class Cell:
    """A load on a server."""

    load: Load
    url: str
    rounds: list[Round] = field(default_factory=list)
    """Those that were begun; once all is measured, those that came to their end, if any did."""
    summaries: list[Summary] = field(default_factory=list)
    """One per round."""


@dataclass(slots=True)
class ServeReport:
    """Everything one `strop bench serve` found."""

    options: ServeBenchOptions
    servers: list[dict[str, str]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    """Load by load, and within each server by server; only those that were begun."""
    client: dict[str, str | int | float] = field(default_factory=dict)
    """Where we ran."""
    started: str = ""
    is_interrupted: bool = False

    @property
    def failures(self) -> dict[str, list[str]]:
        """Kind of failure -> every message, in order."""
        found: dict[str, list[str]] = {}
        for cell in self.cells:
            for round_ in cell.rounds:
                for record in round_.records:
                    if record.failure is not None:
                        found.setdefault(record.failure[0], []).append(record.failure[1])
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data: what was asked, the servers, and for each round its summary and every request's times."""
        plain = asdict(self)
        del plain["cells"], plain["options"]["loads"]
        plain["cells"] = [
            {"load": cell.load.label, "url": cell.url, "rounds": list(map(_round_json, cell.rounds, cell.summaries))}
            for cell in self.cells
        ]
        return plain


def _round_json(round_: Round, summary: Summary) -> dict[str, Any]:
    return {"summary": asdict(summary), **asdict(round_)}


def bench_servers(options: ServeBenchOptions, api_key: str | None, say: Say) -> ServeReport:
    """Measures and returns everything, or what there was until Ctrl-C; `say` gets a line after each round.

    Raises:
        StropError: a server cannot be reached or used, or a prompt's length cannot be had.
        KeyboardInterrupt: Ctrl-C before anything was measured.
    """
    report = ServeReport(options, started=time.strftime("%Y-%m-%d %H:%M:%S %z"))
    report.client = {
        "strop": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count() or 0,
        "load_average": round(os.getloadavg()[0], 2),
    }
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_measure(report, api_key, say))
    except KeyboardInterrupt:
        if not report.cells:
            raise
        report.is_interrupted = True
    for cell in report.cells:
        cell.rounds = [round_ for round_ in cell.rounds if round_.is_whole] or cell.rounds
        cell.summaries = [_summary(options, round_) for round_ in cell.rounds]
    return report


async def _measure(report: ServeReport, api_key: str | None, say: Say) -> None:
    options = report.options
    with ExitStack() as stack:
        clients = [HttpClient(url, api_key, options.timeout_s) for url in options.urls]
        for client in clients:
            stack.enter_context(closing(client))
        targets = [await find_target(client, options.model, options.is_chat) for client in clients]
        report.servers = [target.describe() for target in targets]
        for load in options.loads:
            cells = [Cell(load, target.client.url) for target in targets]
            for number in range(options.repeats):
                for cell, target in zip(cells, targets, strict=True):
                    if number == 0:
                        await _warm_up(target, load, options)
                    seed = f"{options.seed}-{load.label}-{number}"
                    arrivals = load.arrivals(options.seed + number)
                    prepared = await prepare(target, arrivals, options.shared_prefix_tokens, seed)
                    round_ = Round()
                    cell.rounds.append(round_)
                    if number == 0:
                        report.cells.append(cell)
                    await run_round(target, load, prepared, round_)
                    say(f"{cell.url}, {load.label}, round {number + 1} of {options.repeats}: {_line(options, round_)}")


async def _warm_up(target: Target, load: Load, options: ServeBenchOptions) -> None:
    """The same kind of requests, which nobody counts. ServerError if all of them fail: the others would as well."""
    num_requests = load.warmup if options.warmup is None else options.warmup
    if num_requests == 0:
        return
    arrivals = list(islice(cycle(load.arrivals(options.seed)), num_requests))
    prepared = await prepare(target, arrivals, options.shared_prefix_tokens, f"{options.seed}-{load.label}-warm-up")
    round_ = Round()
    concurrency = load.concurrency if isinstance(load, ClosedLoop) else num_requests
    await run_round(target, ClosedLoop(concurrency, num_requests, ()), prepared, round_)
    failures = [record.failure for record in round_.records if record.failure is not None]
    if len(failures) == num_requests:
        kind, message = failures[0]
        raise ServerError(kind, f"{target.client.url}: all {num_requests} warm-up requests failed: {message}")


def _summary(options: ServeBenchOptions, round_: Round) -> Summary:
    return summarize(round_.records, options.objective, options.price_per_hour)


def _line(options: ServeBenchOptions, round_: Round) -> str:
    summary = _summary(options, round_)
    text = f"{summary.output_tokens_per_s:,.0f} tokens/s"
    if summary.ttft_s is not None:
        text += f", TTFT {1e3 * summary.ttft_s.p50:,.1f} ms"
    if summary.itl_s is not None:
        text += f", ITL {1e3 * summary.itl_s.p50:,.2f} ms (medians)"
    num_failed = sum(summary.failures.values())
    return text + (f", {num_failed} of {summary.num_requests} requests FAILED" if num_failed else "")
