"""Server-sent events and answers out of bytes that are cut anywhere."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.bench.serve.events import MAX_EVENT_BYTES, Answer, EventReader

STREAM = (
    b": a comment\n\n"
    b'data: {"text": "caf\xc3\xa9 \xf0\x9f\x98\x80"}\n\n'
    b"event: message\r\nid: 7\r\ndata:no space\r\n\r\n"
    b": keep-alive\r\n"
    b"data: first\ndata:  second\n\n"
    b"retry: 5\n\n"
    b"data\n\n"
    b"data: alone\r\r"
    b"data: [DONE]\n\n"
    b"data: never ended"
)
EVENTS = ['{"text": "café 😀"}', "no space", "first\n second", "", "alone", "[DONE]"]


def pieces(data: bytes, cuts: set[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def read(data: bytes, cuts: set[int]) -> list[str]:
    reader = EventReader()
    return [event.decode() for piece in pieces(data, cuts) for event in reader.push(piece)]


def test_every_single_cut_and_byte_by_byte() -> None:
    for cut in range(len(STREAM) + 1):
        assert read(STREAM, {cut}) == EVENTS
    assert read(STREAM, set(range(len(STREAM)))) == EVENTS


@given(st.sets(st.integers(0, len(STREAM))), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_cuts_and_any_line_ends(cuts: set[int], line_end: bytes) -> None:
    data = STREAM.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", line_end)
    assert read(data, cuts) == EVENTS


def test_an_event_is_bounded() -> None:
    reader = EventReader()
    with pytest.raises(ValueError, match="longer than"):
        for _ in range(3):
            reader.push(b"data: " + b"x" * (MAX_EVENT_BYTES // 2) + b"\n")


def chunk(text: str | None, finish_reason: str | None = None, **more: object) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": finish_reason}]
    return b"data: " + json.dumps({"choices": choices} | more).encode() + b"\n\n"


def answer_of(*timed: tuple[float, bytes]) -> Answer:
    answer = Answer()
    for now_s, piece in timed:
        answer.push(now_s, piece)
    answer.end()
    return answer


def test_a_chunks_time_is_that_of_its_last_byte() -> None:
    first, second = chunk("a"), chunk("b", "length")
    usage = chunk(None, usage={"prompt_tokens": 5, "completion_tokens": 2})
    answer = answer_of(
        (1.0, first[:9]), (2.0, first[9:] + second[:3]), (3.0, second[3:] + usage), (4.0, b"data: [DONE]\n\n")
    )
    assert answer.chunk_s == [2.0, 3.0]
    assert (answer.finish_reason, answer.failure) == ("length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens) == (5, 2, 0)


def test_only_chunks_with_something_new_count() -> None:
    def delta(**fields: object) -> bytes:
        return (
            b"data: "
            + json.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}).encode()
            + b"\n\n"
        )

    answer = answer_of(
        (1, delta(role="assistant", content="")),
        (2, delta(content=None)),
        (3, delta(reasoning_content="hm")),
        (4, delta(content="yes")),
        (5, delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}])),
        (6, chunk("", "stop", usage={"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}})),
    )
    assert answer.chunk_s == [3, 4, 5]
    assert answer.failure is None
    assert answer.usage is not None and answer.usage.cached_tokens == 4


@pytest.mark.parametrize(
    ("pieces", "kind", "message"),
    [
        ([chunk("a")], "broken stream", "without a finish_reason"),
        ([chunk("a"), b'data: {"error": {"message": "out of blocks"}}\n\n'], "error in the stream", "out of blocks"),
        ([chunk("a"), b'data: {"error": "no more"}\n\n'], "error in the stream", "no more"),
        ([chunk("a"), b"data: {not json}\n\n"], "malformed chunk", "not json"),
        ([chunk("a"), b'data: {"choices": 5}\n\n'], "malformed chunk", "choices"),
        ([chunk("", "stop"), b"data: [DONE]\n\n"], "no text", "finish_reason stop"),
        ([b"data: [DONE]\n\n"], "no text", "finish_reason None"),
        ([b"<html>"], "broken stream", "without"),
    ],
)
def test_what_is_wrong_is_named(pieces: list[bytes], kind: str, message: str) -> None:
    answer = answer_of(*((1.0, piece) for piece in pieces))
    assert answer.failure is not None
    assert answer.failure[0] == kind
    assert message in answer.failure[1]


def test_an_error_of_null_is_none_and_an_empty_event_says_nothing() -> None:
    assert answer_of((1.0, chunk("a", "stop", error=None)), (1.0, b"data:\n\n")).failure is None
