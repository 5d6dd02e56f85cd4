"""A stream is its answer: the same text, byte for byte, with the same end and the same usage, and nothing too early."""

from dataclasses import dataclass
from typing import Any

import pytest
from http_client import Reply, ask
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = "smollm2"
PROMPTS = (
    "Reply with emojis: 🙂🎉🚀",
    "Écris « déjà vu » en français.",
    "把这句话翻译成英文——刀要磨。",
    "Repeat after me: नमस्ते दुनिया 👩‍👩‍👧‍👦 مرحبا",
    "Count: one, two, three,",
    "\u202eright to left\u202c and \x00 nul",
)


@dataclass(frozen=True)
class Endpoint:
    """Where a text is asked for, and where an answer has it."""

    path: str

    def body(self, prompt: str, **more: Any) -> dict[str, Any]:
        """A request, streamed with its usage if it is streamed."""
        if self.path == "/v1/responses":
            return {"model": MODEL, "input": prompt, "max_output_tokens": more.pop("max_tokens"), **more}
        usage = {"stream_options": {"include_usage": True}} if more.get("stream") else {}
        words = {"prompt": prompt} if self.path == "/v1/completions" else {"messages": [user(prompt)]}
        return {"model": MODEL, **words, **usage, **more}

    def whole(self, reply: Reply) -> tuple[list[str], list[str], dict[str, Any]]:
        """Texts, finish reasons and usage."""
        assert reply.status == 200, reply.body
        body = reply.json
        if self.path == "/v1/responses":
            return ["".join(part["text"] for part in body["output"][0]["content"])], [body["status"]], body["usage"]
        texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body["choices"]]
        return texts, [choice["finish_reason"] for choice in body["choices"]], body["usage"]

    def streamed(self, reply: Reply) -> tuple[list[str], list[str], dict[str, Any]]:
        """The same of a stream, which must be in order."""
        if self.path == "/v1/responses":
            *frames, last = reply.frames
            assert not any(frame["type"] in ("response.completed", "response.incomplete") for frame in frames)
            texts = [frame["delta"] for frame in frames if frame["type"] == "response.output_text.delta"]
            return ["".join(texts)], [last["response"]["status"]], last["response"]["usage"]
        assert reply.body.endswith(b"data: [DONE]\n\n")
        *frames, last = reply.frames
        assert last["choices"] == [] and all(frame["usage"] is None for frame in frames)
        choices = [choice for frame in frames for choice in frame["choices"]]
        texts, reasons = {}, {}
        for choice in choices:
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            assert index not in reasons, "something came after a choice's end"
            texts[index] = texts.get(index, "") + (text or "")
            if choice["finish_reason"] is not None:
                reasons[index] = choice["finish_reason"]
        order = range(len(texts))
        return [texts[i] for i in order], [reasons[i] for i in order], last["usage"]


ENDPOINTS = tuple(map(Endpoint, ("/v1/chat/completions", "/v1/completions", "/v1/responses")))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """`text` before the stop string that is complete first (of several, the longest), and whether there is one."""
    found = [(at + len(stop), -len(stop)) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text, False
    end, length = min(found)
    return text[: end + length], True


def counts(usage: dict[str, Any]) -> list[int]:
    """Without what depends on who asked before."""
    return [number for number in usage.values() if isinstance(number, int)]


@pytest.fixture(scope="module")
def split_ids(server_url: str) -> list[int]:
    """Tokens that are parts of characters, mostly."""
    return [i for i in ask(server_url, "/tokenize", {"prompt": "🙂漢👩‍👧é𓀀"}).json["tokens"] if i > 100]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_streams_are_exact(server_url: str, split_ids: list[int], data: st.DataObject) -> None:
    endpoint = data.draw(st.sampled_from(ENDPOINTS), "endpoint")
    some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    prompt = data.draw(st.sampled_from(PROMPTS) | some_text, "prompt")
    how: dict[str, Any] = {"max_tokens": data.draw(st.integers(1, 48), "max_tokens"), "temperature": 0}
    if endpoint.path != "/v1/responses":
        how["n"] = data.draw(st.integers(1, 3), "n")
        if data.draw(st.booleans(), "sampled"):
            how |= {"temperature": 1.0, "seed": data.draw(st.integers(0, 2**32), "seed")}
        if data.draw(st.booleans(), "odd"):
            how["logit_bias"] = dict.fromkeys(map(str, split_ids), 8)

    def asked(**more: Any) -> tuple[list[str], list[str], dict[str, Any]]:
        whole = endpoint.whole(ask(server_url, endpoint.path, endpoint.body(prompt, **how, **more)))
        streamed = endpoint.streamed(ask(server_url, endpoint.path, endpoint.body(prompt, stream=True, **how, **more)))
        assert streamed[:2] == whole[:2]
        assert counts(streamed[2]) == counts(whole[2])
        return whole

    texts, reasons, _ = asked()
    if endpoint.path == "/v1/responses":
        return
    stops = []
    for text in data.draw(st.lists(st.sampled_from(texts), max_size=4), "stops in"):
        begin = data.draw(st.integers(0, max(0, len(text) - 1)), "begin")
        stop = text[begin : begin + data.draw(st.integers(1, 12), "length")] + data.draw(st.sampled_from(["", "", "|"]))
        stops += [stop] if stop else []
    if stops:
        cut = [until_stop(text, stops) for text in texts]
        stopped = asked(stop=stops)
        assert stopped[0] == [text for text, _ in cut]
        assert stopped[1] == ["stop" if was_cut else reason for (_, was_cut), reason in zip(cut, reasons, strict=True)]


def test_what_is_streamed_never_comes_back(server_url: str) -> None:
    """All that a stream has said is a prefix of the answer, also where a stop string spans many tokens."""
    body = ENDPOINTS[0].body("Tell me a story about a lighthouse keeper.", max_tokens=80, temperature=0)
    text = ask(server_url, ENDPOINTS[0].path, body).json["choices"][0]["message"]["content"]
    assert len(text) > 100
    for begin in range(10, len(text) - 30, 7):
        stop = text[begin : begin + 25]
        answer = text[: text.find(stop)]
        frames = ask(server_url, ENDPOINTS[0].path, {**body, "stop": [stop], "stream": True}).frames
        so_far = ""
        for frame in frames:
            so_far += frame["choices"][0]["delta"].get("content") or ""
            assert answer.startswith(so_far)
        assert so_far == answer
