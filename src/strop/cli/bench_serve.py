"""`strop bench serve URL...`: load on OpenAI-compatible servers, and their latencies."""

import json
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from strop.cli.output import print_facts, print_table
from strop.core.errors import RequestError

if TYPE_CHECKING:
    from strop.bench.serve.load import Load
    from strop.bench.serve.session import ServeReport


@click.command("bench serve")
@click.argument("urls", nargs=-1, required=True)
@click.option("--concurrency", default="", help="Closed loops of so many clients: 1,8,32 if no arrivals are given.")
@click.option("--rate", default="", help="Poisson arrivals, so many a second, whatever the server does; a list too.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="CSV file: time_s,prompt_tokens,output_tokens. With --concurrency or --rate only its lengths count.",
)
@click.option(
    "--requests",
    default=0,
    type=click.IntRange(0),
    help="Requests per round; 0 means 4 for each client, 32 for arrivals.",
)
@click.option("--input-tokens", default=128, type=click.IntRange(1), help="Length of every prompt, without --trace.")
@click.option("--output-tokens", default=128, type=click.IntRange(1), help="Length of every answer, without --trace.")
@click.option(
    "--shared-prefix-tokens",
    default=0,
    type=click.IntRange(0),
    help="So many first tokens are the same in all prompts.",
)
@click.option("--chat", is_flag=True, help="Ask /v1/chat/completions instead of /v1/completions.")
@click.option("--model", help="Name of the model; the first that the server lists if not given.")
@click.option(
    "--repeats", default=3, type=click.IntRange(1), help="Rounds; every server runs once in each. Values are medians."
)
@click.option(
    "--warmup",
    type=click.IntRange(0),
    help="Requests first, not counted; one for each client if not given, 4 for arrivals.",
)
@click.option(
    "--objective",
    help="Limits for goodput: ttft=200ms,itl=30ms,tpot=25ms,e2e=5s; itl is that of a request's 99th percentile.",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(0),
    help="Of the machine, in any currency: adds cost per request and token.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the key, instead of $OPENAI_API_KEY.")
@click.option(
    "--timeout",
    default=600.0,
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which a request has failed.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="Makes prompts and arrivals repeatable; a server's prefix cache may know them.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything, each request too, to it.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write a page with plots to this file.")
def command(urls: tuple[str, ...], json_file: Path | None, html_file: Path | None, **settings: Any) -> None:
    """Measures servers under load.

    URLS are servers that speak OpenAI's API, with or without /v1; several are measured in turn, round by round, and
    compared with the first. Latencies are in ms, from the moment of receipt: TTFT to the first text, ITL between chunks
    with text, TPOT per token after the first, E2E to the end. Nothing that fails is left out of the count. Ctrl-C gives
    the report so far. Ends with exit code 1 when a request failed.
    """
    from strop.bench.serve.page import render_page
    from strop.bench.serve.records import parse_objective
    from strop.bench.serve.session import ServeBenchOptions, bench_servers

    if len(set(urls)) < len(urls):
        raise RequestError(f"{' '.join(urls)}: a server is named twice: give each URL once")
    options = ServeBenchOptions(
        urls,
        _loads(settings),
        secrets.randbelow(10**6) if settings["seed"] is None else settings["seed"],
        settings["model"],
        settings["chat"],
        settings["shared_prefix_tokens"],
        settings["warmup"],
        settings["repeats"],
        settings["timeout"],
        parse_objective(settings["objective"]) if settings["objective"] else None,
        settings["price_per_hour"],
    )
    for path in (json_file, html_file):
        if path is not None:
            _check_writable(path)
    report = bench_servers(options, _api_key(settings["api_key_file"]), lambda text: print(text, file=sys.stderr))
    _print_report(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json()), encoding="utf-8")
    if html_file is not None:
        html_file.write_text(render_page(report), encoding="utf-8")
    if report.is_interrupted or report.failures:
        sys.exit(130 if report.is_interrupted else 1)


def _loads(settings: dict[str, Any]) -> "tuple[Load, ...]":
    from strop.bench.serve.load import ClosedLoop, Lengths, Poisson, Trace, read_trace

    trace_file, num_requests = settings["trace"], settings["requests"]
    trace = None if trace_file is None else read_trace(trace_file)
    if trace is None:
        lengths: tuple[Lengths, ...] = (Lengths(settings["input_tokens"], settings["output_tokens"]),)
    else:
        lengths = tuple(arrival.lengths for arrival in trace)
    shortest = min(one.prompt_tokens for one in lengths)
    if settings["shared_prefix_tokens"] >= shortest:
        raise RequestError(
            f"--shared-prefix-tokens {settings['shared_prefix_tokens']} leaves nothing of a prompt of {shortest} "
            "tokens: share fewer"
        )
    if trace is not None and not (settings["concurrency"] or settings["rate"]):
        if num_requests:
            raise RequestError("--requests does not shorten a trace: leave it out, or cut the file")
        return (Trace(trace_file.name, trace),)
    concurrencies = _numbers("--concurrency", settings["concurrency"] or ("" if settings["rate"] else "1,8,32"), int)
    if num_requests and concurrencies and num_requests < max(concurrencies):
        raise RequestError(
            f"--requests {num_requests} are too few for {max(concurrencies)} clients: give each one at least"
        )
    loads: list[Load] = [ClosedLoop(int(one), num_requests or 4 * int(one), lengths) for one in concurrencies]
    return (*loads, *(Poisson(one, num_requests or 32, lengths) for one in _numbers("--rate", settings["rate"], float)))


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    if not text:
        return []
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1e6 for number in numbers) or len(set(numbers)) < len(numbers):
        raise RequestError(f"{option} {text!r} is not a list of different numbers above 0: give one like 1,8")
    return numbers


def _check_writable(path: Path) -> None:
    """Before an hour of measuring, not after it."""
    try:
        path.open("a").close()
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}): name a file in a folder of yours") from None


def _api_key(path: Path | None) -> str | None:
    """From the file, or else the environment. The key is in no message, whatever is wrong with it."""
    if path is None:
        source, key = "$OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY", "")
    else:
        source = f"--api-key-file {path}"
        try:
            key = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
            raise RequestError(f"{source} cannot be read ({reason}): give a file with nothing but the key") from None
    key = key.strip()
    if not all("!" <= letter <= "~" for letter in key) or (path is not None and not key):
        raise RequestError(f"{source} is not a key: it must be printable ASCII characters, in one line without blanks")
    return key or None


def _print_report(report: "ServeReport") -> None:
    from strop.bench.serve.figures import facts, notes, tables

    print_facts(facts(report))
    for table in tables(report):
        print(f"\n{table.title}")
        print_table(table.header, table.rows, right_aligned=table.header[1:])
    for note in notes(report):
        print(note)
