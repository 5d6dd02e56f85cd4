"""`strop bench serve` against a real socket: what is sent, counted, sized, kept apart, and said."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_server import HEAD, Step, TinyServer, event, framed, refusal, token, usage, well

from strop.bench.serve.figures import notes
from strop.bench.serve.load import Arrival, ClosedLoop, Lengths, Load, Poisson, Trace
from strop.bench.serve.records import Objective
from strop.bench.serve.session import ServeBenchOptions, ServeReport, bench_servers
from strop.core.errors import RequestError, ServerError

SIZES = (Lengths(20, 3),)
NUM_PROBES = 1
"""Completions that find out what a server with /tokenize takes."""


def bench(*servers: TinyServer, load: Load | None = None, api_key: str | None = None, **options: Any) -> ServeReport:
    loads = (load or ClosedLoop(2, 6, SIZES),)
    defaults = {"seed": 1, "repeats": 1, "warmup": 0, "timeout_s": 20.0}
    chosen = ServeBenchOptions(tuple(one.url for one in servers), loads, **(defaults | options))
    return bench_servers(chosen, api_key, lambda text: None)


def after_probes(replies: list[Callable[[dict[str, Any], int], Iterator[Step]]]) -> Callable[..., Iterator[Step]]:
    """The probes are answered well, and later requests as listed; the last one for all others."""

    def reply(body: dict[str, Any], number: int) -> Iterator[Step]:
        number -= NUM_PROBES
        return (replies[min(number, len(replies) - 1)] if number >= 0 else well)(body, number)

    return reply


def test_a_closed_loop_keeps_its_concurrency_and_counts_by_usage() -> None:
    with TinyServer() as server:
        report = bench(server, load=ClosedLoop(3, 10, SIZES), warmup=2, repeats=2)
    (cell,) = report.cells
    assert server.max_active <= 3
    assert len(server.bodies) == NUM_PROBES + 2 + 2 * 10
    assert [summary.num_complete for summary in cell.summaries] == [10, 10]
    assert report.failures == {}
    for record in (record for round_ in cell.rounds for record in round_.records):
        assert (record.prompt_tokens, record.output_tokens, len(record.chunk_s)) == (20, 3, 3)
        assert record.sent_s <= record.chunk_s[0] <= record.chunk_s[1] <= record.chunk_s[2] <= record.end_s
    assert server.num_connections <= 8  # they are kept and used again
    for body in server.bodies:
        assert body["stream"] is True and body["temperature"] == 0 and body["ignore_eos"] is True


def test_times_come_from_receipt() -> None:
    """Before the chunks of these answers lie waits that no machine can shrink."""

    def slow(body: dict[str, Any], number: int) -> Iterator[Step]:
        yield HEAD
        for pause_s, text in ((0.2, "a"), (0.1, "b"), (0.1, "c")):
            yield pause_s
            yield token(text)
        yield usage(body, 6) + event(b"[DONE]") + framed(b"")

    with TinyServer(after_probes([slow])) as server:
        report = bench(server, load=ClosedLoop(2, 2, SIZES))
    (summary,) = report.cells[0].summaries
    for record in report.cells[0].rounds[0].records:
        assert record.ttft_s >= 0.2
        assert record.chunk_s[1] - record.sent_s >= 0.3
        assert record.e2e_s >= record.chunk_s[2] - record.sent_s >= 0.4
    assert summary.tokens_per_chunk == 2.0
    assert summary.output_tokens_per_s <= 12 / 0.4
    assert any("a chunk holds 2.00 tokens" in note for note in notes(report))


def test_prompts_are_distinct_unless_shared() -> None:
    with TinyServer() as server:
        bench(server, load=ClosedLoop(2, 12, SIZES), repeats=2)
        distinct = [body["prompt"].split() for body in server.bodies[NUM_PROBES:]]
    assert len({tuple(words[:8]) for words in distinct}) == 24
    with TinyServer() as server:
        bench(server, load=ClosedLoop(2, 12, SIZES), shared_prefix_tokens=8)
        shared = [body["prompt"].split() for body in server.bodies[NUM_PROBES:]]
    assert len({tuple(words[:8]) for words in shared}) == 1
    assert len({tuple(words[8:]) for words in shared}) == 12
    assert {len(words) for words in distinct + shared} == {19}  # the server adds one


def test_all_servers_get_the_same_prompts_and_take_turns() -> None:
    order: list[str] = []

    def told(name: str) -> Callable[[dict[str, Any], int], Iterator[Step]]:
        def reply(body: dict[str, Any], number: int) -> Iterator[Step]:
            if number >= NUM_PROBES:
                order.append(name)
            return well(body, number)

        return reply

    with TinyServer(told("a")) as one, TinyServer(told("b")) as two:
        report = bench(one, two, load=ClosedLoop(1, 2, SIZES), repeats=2)
    assert "".join(order) == "aabbaabb"
    assert [body["prompt"] for body in one.bodies] == [body["prompt"] for body in two.bodies]
    assert [cell.url for cell in report.cells] == [one.url, two.url]


@pytest.mark.parametrize(
    ("server", "method"),
    [
        (TinyServer(tokenize="prompt"), "counted by the server's /tokenize"),
        (TinyServer(tokenize="content"), "counted by the server's /tokenize"),
        (TinyServer(tokenize=None), "random token ids"),
    ],
)
def test_prompts_get_their_length_from_what_the_server_has(server: TinyServer, method: str) -> None:
    with server:
        report = bench(server)
    assert method in report.servers[0]["prompts"]
    assert {record.prompt_tokens for record in report.cells[0].rounds[0].records} == {20}


def test_a_server_that_counts_only_in_its_usage() -> None:
    def no_ids(body: dict[str, Any], number: int) -> Iterator[Step]:
        return iter([refusal(400, "text only")]) if isinstance(body["prompt"], list) else well(body, number)

    with TinyServer(no_ids, tokenize=None) as server:
        report = bench(server)
    assert report.servers[0]["prompts"] == "English text, 1.00 tokens a word (from the server's usage)"
    assert {record.prompt_tokens for record in report.cells[0].rounds[0].records} == {20}


def test_chat_counts_what_its_template_adds() -> None:
    with TinyServer() as server:
        report = bench(server, is_chat=True)
        assert " /v1/chat/completions " in server.heads[1]
    assert {record.prompt_tokens for record in report.cells[0].rounds[0].records} == {20}
    with TinyServer() as server, pytest.raises(RequestError, match=r"1 tokens has no room.*more than 1"):
        bench(server, is_chat=True, load=ClosedLoop(1, 1, (Lengths(1, 1),)))


@pytest.mark.parametrize("refused", [{"ignore_eos"}, {"stream_options"}, {"ignore_eos", "stream_options"}])
def test_what_a_server_refuses_is_left_out_and_said(refused: set[str]) -> None:
    def short(body: dict[str, Any], number: int) -> Iterator[Step]:
        yield HEAD
        yield token() + token("", "stop")
        if "stream_options" in body:
            yield usage(body, 1)
        yield event(b"[DONE]") + framed(b"")

    with TinyServer(short, refused=frozenset(refused)) as server:
        report = bench(server)
    assert refused.isdisjoint(key for body in server.bodies for key in body)
    facts = report.servers[0]
    assert ("refused" in facts["ignore_eos"]) == ("ignore_eos" in refused)
    assert ("no usage" in facts["output_tokens"]) == ("stream_options" in refused)
    assert report.cells[0].summaries[0].output_tokens == 1.0
    assert any("6 of 6 answers have fewer tokens than asked for" in note for note in notes(report))


def broken(body: dict[str, Any], number: int) -> Iterator[Step]:
    yield HEAD + token()


def stalled(body: dict[str, Any], number: int) -> Iterator[Step]:
    yield HEAD + token()
    yield 60.0


def erring(body: dict[str, Any], number: int) -> Iterator[Step]:
    yield HEAD + token() + event({"error": {"message": "the engine died"}}) + framed(b"")


def unfinished(body: dict[str, Any], number: int) -> Iterator[Step]:
    yield HEAD + token() + framed(b"")


def overloaded(body: dict[str, Any], number: int) -> Iterator[Step]:
    yield refusal(429, "the queue is full")


def not_http(body: dict[str, Any], number: int) -> Iterator[Step]:
    yield b"what?\r\n\r\n"


def test_every_failure_is_counted_and_the_others_go_on() -> None:
    replies = [broken, well, stalled, erring, unfinished, overloaded, overloaded, not_http, well]
    with TinyServer(after_probes(replies)) as server:
        report = bench(server, load=ClosedLoop(1, 10, SIZES), timeout_s=2.0, objective=Objective(e2e=10.0))
    (summary,) = report.cells[0].summaries
    assert summary.num_complete == 3
    assert summary.failures == {
        "broken connection": 1,
        "time-out": 1,
        "error in the stream": 1,
        "broken stream": 1,
        "HTTP 429": 2,
        "malformed response": 1,
    }
    assert summary.good_share == 0.3
    said = "\n".join(notes(report))
    for text in ("2 requests FAILED, HTTP 429: the queue is full\n", "the engine died", "no complete answer in 2 s"):
        assert text in said


def test_a_body_that_ends_with_its_connection_is_whole() -> None:
    def old(body: dict[str, Any], number: int) -> Iterator[Step]:
        yield b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        yield b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'

    with TinyServer(after_probes([old])) as server:
        report = bench(server, load=ClosedLoop(1, 2, SIZES))
    assert report.cells[0].summaries[0].num_complete == 2


def test_arrivals_do_not_wait_for_answers() -> None:
    """Answers that come only when all requests are there."""

    def patient(body: dict[str, Any], number: int) -> Iterator[Step]:
        while server.max_active < 4:
            yield 0.005
        yield from well(body, number)

    arrivals = tuple(Arrival(0.01 * i, Lengths(10 + i, 2)) for i in range(4))
    with TinyServer(after_probes([patient])) as server:
        report = bench(server, load=Trace("t.csv", arrivals))
    records = report.cells[0].rounds[0].records
    assert [record.prompt_tokens for record in records] == [10, 11, 12, 13]
    assert all(record.sent_s >= record.due_s and record.is_complete for record in records)
    with TinyServer() as server:
        report = bench(server, load=Poisson(1000.0, 5, SIZES))
    assert report.cells[0].summaries[0].num_complete == 5


def test_the_key_is_sent_and_never_shown() -> None:
    key = "sk-very-secret"

    def repeats_the_key(body: dict[str, Any], number: int) -> Iterator[Step]:
        yield refusal(401, f"Incorrect API key provided: {key}")

    with TinyServer(after_probes([repeats_the_key])) as server:
        report = bench(server, api_key=key)
        assert all(f"Authorization: Bearer {key}\r\n" in head for head in server.heads)
    assert report.cells[0].summaries[0].failures == {"HTTP 401": 6}
    assert "Incorrect API key provided: ***" in "\n".join(notes(report))
    assert key not in json.dumps(report.as_json()) + repr(report)
    with TinyServer(repeats_the_key) as server, pytest.raises(ServerError, match=r"HTTP 401: .* provided: \*\*\*"):
        bench(server, api_key=key)


def test_a_server_that_is_not_there_is_named() -> None:
    with TinyServer() as server:
        url = server.url
    options = ServeBenchOptions((url,), (ClosedLoop(1, 1, SIZES),), seed=0)
    with pytest.raises(ServerError, match=rf"no server: {url} cannot be reached .*refused.*start the server"):
        bench_servers(options, None, lambda text: None)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://here", "http://", "http://a:b@here", "http://here:port", "http://here/?a=b"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    options = ServeBenchOptions((url,), (ClosedLoop(1, 1, SIZES),), seed=0)
    with pytest.raises(RequestError, match="is not a server's address"):
        bench_servers(options, None, lambda text: None)


def test_a_load_that_always_fails_is_not_measured() -> None:
    with (
        TinyServer(after_probes([overloaded])) as server,
        pytest.raises(ServerError, match=r"HTTP 429: .* all 3 warm-up requests failed: the queue is full"),
    ):
        bench(server, warmup=3)


def test_an_interrupt_gives_the_report_so_far() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored

    def interrupting(body: dict[str, Any], number: int) -> Iterator[Step]:
        yield HEAD + token()
        yield 0.1
        os.kill(os.getpid(), signal.SIGINT)
        yield 60.0

    try:
        with TinyServer(after_probes([well, well, interrupting])) as server:
            report = bench(server, load=ClosedLoop(1, 10, SIZES), repeats=3)
    finally:
        signal.signal(signal.SIGINT, before)
    (summary,) = report.cells[0].summaries
    assert report.is_interrupted
    assert (summary.num_requests, summary.num_complete, summary.num_cut_off) == (3, 2, 1)
    assert notes(report)[0].startswith("Interrupted")
