"""A server's life as its operator sees it: starting, stalling, losing its engine, ending."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from http_client import ask, checked_error, stream
from openai import OpenAI
from server_process import ServerProcess, Start, wait_for

from strop.serve.keys import new_key

CHAT = "/v1/chat/completions"
QUICK: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 0,
    "max_tokens": 20,
}
LONG = {**QUICK, "max_tokens": 400, "ignore_eos": True}


def is_refused(url: str) -> bool:
    try:
        ask(url, "/livez")
    except ConnectionRefusedError:
        return True
    return False


@pytest.fixture(scope="module")
def mortal(serve_smollm2: Start) -> Iterator[ServerProcess]:
    """A server whose engine may be stopped and killed."""
    with serve_smollm2() as server:
        yield server.ready()


def test_what_cannot_start(start_server: Start, smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "keys").write_text("no key\n")
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: dict[str, tuple[object, ...]] = {
            "no-such.gguf": (tmp_path / "no-such.gguf",),
            "empty.gguf": (tmp_path / "empty.gguf",),
            str(port): (smollm2_path, "--port", port),
            "192.0.2.1": (smollm2_path, "--host", "192.0.2.1"),
            "does not parse": (smollm2_path, "--template", tmp_path / "broken.jinja"),
            "line 1": (smollm2_path, "--api-keys", tmp_path / "keys"),
            "does not fit": (smollm2_path, "--memory", 0.1),
            "--context 1000000": (smollm2_path, "--context", 1_000_000),
        }
        for named, arguments in cases.items():
            with start_server(*arguments) as server:
                assert server.process.wait(240) == 1
                lines = [line for line in server.log.splitlines() if not line.startswith("http://")]
                assert len(lines) == 1, server.log
                assert lines[0].startswith("strop: ") and named in lines[0]


def test_while_it_loads(serve_smollm2: Start) -> None:
    with serve_smollm2("--name", "other") as server:
        assert server.ask("/livez").status == 200
        replies = [
            server.ask(path, body)
            for path, body in (("/readyz", None), ("/health", None), (CHAT, QUICK), ("/v1/models", None))
        ]
        if replies[0].status == 503:  # else it was too quick
            assert all(reply.status in (200, 503) for reply in replies)
            assert "loading" in replies[0].error["message"]
            assert replies[0].headers["retry-after"] == "2"
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=100)
        assert [card.id for card in client.models.list().data] == ["smollm2", "other"]
        assert client.chat.completions.create(**{**QUICK, "model": "other"}).model == "other"


def test_it_can_be_ended_while_it_loads(serve_smollm2: Start) -> None:
    with serve_smollm2() as server:
        assert server.url
        server.process.terminate()
        assert server.process.wait(60) == 0


def test_a_stopped_engine_is_not_ready(mortal: ServerProcess) -> None:
    with stream(mortal.url, CHAT, {**LONG, "stream": True}) as frames:
        next(frames)
        os.kill(mortal.engine_pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        wait_for(lambda: mortal.ask("/readyz").status == 503, "503", mortal.process)
        assert time.monotonic() - stopped_s < 5
        assert "silent" in mortal.ask("/readyz").error["message"]
        assert mortal.metric("strop:engine_ready") == 0
        assert mortal.ask("/livez").status == 200
        os.kill(mortal.engine_pid, signal.SIGCONT)
        wait_for(lambda: mortal.ask("/readyz").status == 200, "200", mortal.process)
        *_, last = frames
    assert last["choices"][0]["finish_reason"] == "length"
    assert mortal.metric("strop:engine_restarts_total") == 0


def test_a_killed_engine_comes_back(mortal: ServerProcess) -> None:
    answer = mortal.ask(CHAT, QUICK).json["choices"]
    before = mortal.metric("strop:engine_restarts_total")
    client = OpenAI(base_url=f"{mortal.url}/v1", api_key="none", max_retries=0)
    endless: dict[str, Any] = {"model": "smollm2", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    prompts = {"model": "smollm2", "prompt": ["a", "b"], "max_tokens": 900, "n": 2, "ignore_eos": True, "stream": True}
    with (
        ThreadPoolExecutor(1) as pool,
        stream(mortal.url, CHAT, {**LONG, "stream": True}) as chat,
        stream(mortal.url, "/v1/completions", prompts) as texts,
        client.chat.completions.create(messages=QUICK["messages"], stream=True, **endless) as chunks,
        client.responses.create(model="smollm2", input="Tell a very long story.", stream=True) as events,
    ):
        whole = pool.submit(mortal.ask, CHAT, LONG)
        for open_stream in (chat, texts, chunks, events):
            next(iter(open_stream))
        wait_for(lambda: mortal.metric("vllm:num_requests_running") == 8, "8 sequences", mortal.process)
        os.kill(mortal.engine_pid, signal.SIGKILL)
        for frames in (chat, texts):
            *_, last = frames
            assert checked_error(last)["type"] == "server_error"
            assert "signal 9" in last["error"]["message"]
        for typed in (chunks, events):
            with pytest.raises(openai.APIError, match="signal 9"):
                for _ in typed:
                    pass
        assert whole.result().status == 503
        assert "signal 9" in whole.result().error["message"]
        assert whole.result().headers["retry-after"]
    patient = client.with_options(max_retries=100)
    assert patient.chat.completions.create(**QUICK).choices[0].message.content == answer[0]["message"]["content"]
    assert mortal.metric("strop:engine_restarts_total") == before + 1
    mortal.wait_until_idle()


def test_metrics_forget_a_dead_engine(mortal: ServerProcess) -> None:
    with stream(mortal.url, CHAT, {**LONG, "stream": True}) as frames:
        next(frames)
        os.kill(mortal.engine_pid, signal.SIGKILL)
    wait_for(lambda: mortal.ask("/readyz").status == 503, "503", mortal.process)
    mortal.ready()
    assert mortal.metric("strop:blocks_used") == mortal.metric("vllm:num_requests_running") == 0


def test_an_engine_does_not_outlive_its_server(serve_smollm2: Start) -> None:
    with serve_smollm2() as server:
        engine_pid = server.ready().engine_pid
        server.process.kill()
        server.process.wait()
        wait_for(lambda: not Path(f"/proc/{engine_pid}").exists(), "the engine's end")


def test_sigterm_lets_streams_end(serve_smollm2: Start) -> None:
    with serve_smollm2() as server:
        whole = server.ready().ask(CHAT, LONG).json["choices"][0]["message"]["content"]
        engine_pid = server.engine_pid
        with stream(server.url, CHAT, {**LONG, "stream": True}) as frames, ThreadPoolExecutor(1) as pool:
            text = next(frames)["choices"][0]["delta"]["content"]
            other = pool.submit(server.ask, CHAT, LONG)
            wait_for(lambda: server.metric("vllm:num_requests_running") == 2, "the other", server.process)
            server.process.terminate()
            wait_for(lambda: "SIGTERM" in server.log, "SIGTERM", server.process)
            wait_for(lambda: is_refused(server.url), "a closed port", server.process)
            for frame in frames:
                text += frame["choices"][0]["delta"].get("content") or ""
            assert text == whole
            assert frame["choices"][0]["finish_reason"] == "length"
            assert other.result().json["choices"][0]["message"]["content"] == whole
        assert server.process.wait(30) == 0
        assert not Path(f"/proc/{engine_pid}").exists()
        assert "Traceback" not in server.log


def test_sigterm_does_not_wait_for_ever(serve_smollm2: Start) -> None:
    with serve_smollm2("--drain", 1) as server:
        server.ready()
        endless = {**LONG, "n": 8, "max_tokens": 1900}
        with stream(server.url, CHAT, {**endless, "stream": True}) as frames, ThreadPoolExecutor(1) as pool:
            next(frames)
            other = pool.submit(server.ask, CHAT, endless)
            wait_for(lambda: server.metric("vllm:num_requests_running") > 8, "the other", server.process)
            server.process.terminate()
            *_, last = frames
            assert "closing" in checked_error(last)["message"]
            assert other.result().status == 503 and other.result().headers["retry-after"]
        assert server.process.wait(30) == 0


def test_an_answer_has_a_time_limit(serve_smollm2: Start) -> None:
    with serve_smollm2("--timeout", 1) as server:
        server.ready()
        endless = {**LONG, "n": 16, "max_tokens": 1900}
        *_, last = server.ask(CHAT, {**endless, "stream": True}).frames
        assert "longer than 1 s" in checked_error(last)["message"]
        reply = server.ask(CHAT, endless)
        assert reply.status == 504 and "longer than 1 s" in reply.error["message"]
        assert reply.headers["x-should-retry"] == "false"  # or clients would ask three times for what takes too long
        server.wait_until_idle()


def test_the_queue_has_an_end_in_tokens(serve_smollm2: Start) -> None:
    with serve_smollm2("--max-seqs", 1, "--max-queue-tokens", 200) as server:
        server.ready()
        some = {"model": "smollm2", "prompt": [7] * 150, "max_tokens": 5}
        with stream(server.url, CHAT, {**LONG, "stream": True}) as frames, ThreadPoolExecutor(1) as pool:
            next(frames)
            first = pool.submit(server.ask, "/v1/completions", some)
            wait_for(lambda: server.metric("strop:queue_tokens") == 150, "150 tokens", server.process)
            refused = server.ask("/v1/completions", some)
            assert refused.status == 429 and "150 tokens are waiting" in refused.error["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert first.result().status == 200
        assert server.ask("/v1/completions", {**some, "prompt": [7] * 400}).status == 200  # an empty queue takes any
        assert server.metric("strop:requests_rejected_total") == 1
        server.wait_until_idle()


def test_nothing_waits_for_a_slow_reader(mortal: ServerProcess) -> None:
    """A client that does not read its stream holds up nobody, and gets all of it later."""
    with stream(mortal.url, CHAT, {**LONG, "n": 8, "logprobs": True, "top_logprobs": 20, "stream": True}) as frames:
        mortal.wait_until_idle()
        assert mortal.ask(CHAT, QUICK).status == 200
        *_, last = frames
    assert last["choices"][0]["finish_reason"] == "length"


def test_keys_come_and_go(serve_smollm2: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    ada = {"Authorization": f"Bearer {new_key(path, 'ada')}"}
    with serve_smollm2("--api-keys", path) as server:
        server.ready()
        for closed in ("/v1/models", "/metrics", "/tokenize", "/no/such/path", "/openapi.json"):
            assert server.ask(closed).error["code"] == "invalid_api_key"
        assert server.ask("/v1/models", headers=ada).status == 200
        bob = {"Authorization": f"bearer {new_key(path, 'bob')}"}
        assert server.ask(CHAT, QUICK, headers=bob).status == 200
        path.write_text(path.read_text().splitlines()[1] + "\n")
        assert server.ask(CHAT, QUICK, headers=ada).status == 401
        path.write_text("damaged\n")
        assert server.ask(CHAT, QUICK, headers=bob).status == 200
        wait_for(lambda: server.log.count(": answered ") >= 2, "a line for each answer")
        answers = [line for line in server.log.splitlines() if ": answered " in line]
        assert len(answers) == 2 and all(" key=bob " in line for line in answers)
        assert server.log.count(": refused: the API key is missing") == 6


def test_nobody_sees_what_another_key_has_asked(keyed_url: str, keys: dict[str, str]) -> None:
    """Whether a prompt is in the prefix cache is told by the time an answer takes: keys do not share it."""
    prompt = {"model": "smollm2", "prompt": "A secret of some length, told to the model once. " * 20, "max_tokens": 1}

    def num_cached(name: str) -> int:
        reply = ask(keyed_url, "/v1/completions", prompt, headers={"Authorization": f"Bearer {keys[name]}"})
        cached: int = reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert num_cached("ada") == 0
    assert num_cached("ada") > 100
    assert num_cached("bob") == 0
    assert num_cached("bob") > 100


def test_pages_of_strangers(serve_smollm2: Start) -> None:
    friend, stranger = {"Origin": "https://app.example"}, {"Origin": "https://evil.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with serve_smollm2("--cors-origin", friend["Origin"]) as server:
        server.ready()
        allowed = server.ask(CHAT, method="OPTIONS", headers=friend | asks)
        assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == friend["Origin"]
        assert server.ask(CHAT, QUICK, headers=friend).headers["access-control-allow-origin"] == friend["Origin"]
        assert server.ask(CHAT, b"{", headers=friend).headers["access-control-allow-origin"] == friend["Origin"]
        refused = server.ask(CHAT, method="OPTIONS", headers=stranger | asks)
        assert refused.status == 400 and "access-control-allow-origin" not in refused.headers
        assert "access-control-allow-origin" not in server.ask("/v1/models", headers=stranger).headers
