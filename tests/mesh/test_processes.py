"""One engine over two processes: it answers as one process does, and ends in words when one is missing or lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, wait_for
from tiny_llm import tiny_llm

from strop import __version__
from strop.core.config import EngineConfig, Processes
from strop.core.errors import CapacityError, EngineDownError, RequestError
from strop.engine.channel import Channel, Hello, Refused, Welcome
from strop.engine.group import join

RUN = ("--raw", "--max-tokens", 12, "--context", 64, "--ignore-eos", "--json")
PROMPT = "once upon a time"
STROP = ("-c", "from strop.cli.main import main; main()")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_llm("qwen2", "Q4_1", ffn_dim=128).build())
    return path


@pytest.fixture
def meeting_point() -> str:
    with socket.create_server(("localhost", 0)) as free:
        return f"localhost:{free.getsockname()[1]}"


def member(meeting_point: str, process_id: int) -> tuple[object, ...]:
    return "--coordinator", meeting_point, "--num-processes", 2, "--process-id", process_id


@contextmanager
def started(environment: dict[str, str], num_devices: int, *commands: tuple[object, ...]) -> Iterator[Any]:
    """A process each, with so many devices."""
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def said(process: "subprocess.Popen[str]", returncode: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == returncode, err
    return out, err


@pytest.mark.parametrize("case", ["2x2/ws2d", "2x2/ws2d/batch"])
def test_answers_are_those_of_one_process(
    case: str, model: Path, meeting_point: str, environment: dict[str, str]
) -> None:
    script = Path(__file__).parent / "run_engine.py"
    in_two = [(script, model, case, meeting_point, i) for i in range(2)]
    with started(environment, 2, *in_two, (script, model, "1/auto")) as (first, second, alone):
        answers, expected = (json.loads(said(process)[0].splitlines()[-1]) for process in (first, alone))
        assert answers == expected
        said(second)


def test_run(model: Path, meeting_point: str, environment: dict[str, str]) -> None:
    run = (*STROP, "run", model)
    alike = ("--mesh", 2, "--layout", "ws1d")
    commands = [
        (*run, PROMPT, *RUN, *alike, *member(meeting_point, 0)),
        (*run, "another prompt", "--raw", *member(meeting_point, 1)),
        (*run, PROMPT, *RUN),
    ]
    with started(environment | {"STROP_NATIVE": "0"}, 1, *commands) as (first, second, alone):
        answer, expected = (json.loads(said(process)[0]) for process in (first, alone))
        assert len(answer["token_ids"]) == 12
        assert answer["token_ids"] == expected["token_ids"]
        out, err = said(second)
        assert not out and "process 0 has ended" in err


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost(lost: int, model: Path, meeting_point: str, environment: dict[str, str]) -> None:
    run = (*STROP, "run", model, PROMPT, "--raw", "--max-tokens", 100, "--ignore-eos", "--mesh", 2, "--layout", "ws1d")
    with started(environment, 1, *((*run, *member(meeting_point, i)) for i in range(2))) as processes:
        processes[0].stdout.read(1)  # it answers
        processes[lost].kill()
        left = processes[1 - lost]
        _, err = left.communicate(timeout=60)
        assert left.returncode != 0
        # jax may be quicker, and says in words of its own that another task died
        assert f"process {lost}" in err or "another task died" in err


def test_serve(model: Path, meeting_point: str, environment: dict[str, str], tmp_path: Path) -> None:
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = environment | {"XLA_FLAGS": flags}
    shape = ("--name", "tiny", "--context", 64, "--max-seqs", 4)
    body = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 12, "temperature": 0, "logprobs": 2}
    more = body | {"prompt": "hello", "n": 2, "temperature": 0.8, "seed": 7}

    def serve(name: str, *options: object) -> ServerProcess:
        return ServerProcess(model, *shape, *options, environment=environment, log_path=tmp_path / name)

    def answers(server: ServerProcess) -> list[Any]:
        return [server.ask("/v1/completions", one).json["choices"] for one in (body, more, body)]

    def follower(name: str) -> ServerProcess:
        return serve(name, *member(meeting_point, 1))

    with serve("alone") as alone:
        expected = answers(alone.ready())
    with serve("first", "--mesh", 2, *member(meeting_point, 0)) as first:
        with follower("second") as second:
            assert texts(answers(first.ready())) == texts(expected)
            first.wait_until_idle()
            os.kill(second.process.pid, signal.SIGKILL)
            second.process.wait()
            wait_for(lambda: first.ask("/readyz").status == 503, "the loss")
            assert "process 1 of 2 was lost" in first.log
        with follower("third") as third:
            assert texts(answers(first.ready())) == texts(expected)
            first.process.terminate()
            assert first.process.wait(60) == 0
            assert third.process.wait(60) == 0, third.log
            assert "process 0 has ended" in third.log


def texts(answers: list[Any]) -> list[Any]:
    return [[choice["text"] for choice in choices] for choices in answers]


# Without jax: who comes, and who does not


def of_two(meeting_point: str, process_id: int, timeout_s: float = 10.0) -> Processes:
    return Processes(meeting_point, 2, process_id, timeout_s)


def test_a_process_that_does_not_come(meeting_point: str) -> None:
    with pytest.raises(EngineDownError, match=r"process 1 of 2 did not come to localhost:\d+ within 0 s: start it"):
        join(EngineConfig(mesh="2"), of_two(meeting_point, 0, 0.3))
    with pytest.raises(EngineDownError, match="not all 2 processes came to localhost"):
        join(EngineConfig(), of_two(meeting_point, 1, 0.3))


def test_who_is_let_in(meeting_point: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = meeting_point.split(":")
    failures: list[Exception] = []

    def lead() -> None:
        try:
            join(EngineConfig(mesh="2"), of_two(meeting_point, 0, 3.0))
        except Exception as error:
            failures.append(error)

    def say(message: Any) -> Any:
        channel = Channel(wait_for(lambda: socket.create_connection((host, int(port))), "the first process"))
        try:
            channel.send(message)
            return channel.receive(10.0)
        finally:
            channel.close()

    leading = threading.Thread(target=lead)
    leading.start()
    with wait_for(lambda: socket.create_connection((host, int(port))), "the first process") as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    with pytest.raises(ConnectionError):
        say(Welcome(EngineConfig(), "localhost:1"))
    assert isinstance(refused := say(Hello("0.0", 2, 1)), Refused) and "Strop 0.0" in refused.reason
    assert isinstance(refused := say(Hello(__version__, 3, 1)), Refused) and "num_processes=2" in refused.reason
    leading.join()
    assert isinstance(failures[0], EngineDownError)
    assert caplog.text.count("a connection was dropped") == 2


@pytest.mark.parametrize(
    ("settings", "processes", "error", "message"),
    [
        ({}, {}, RequestError, "num_processes=2 needs a mesh"),
        ({"mesh": "3"}, {}, RequestError, "mesh='3' has 3 devices, which num_processes=2 cannot share evenly"),
        ({"mesh": "2"}, {"num_processes": 1}, RequestError, "num_processes=1 is out of range"),
        ({"mesh": "2"}, {"process_id": 2}, RequestError, "process_id=2 is out of range: 0 to 1"),
        ({"mesh": "2"}, {"coordinator": "8476"}, RequestError, "coordinator='8476' is no address"),
        ({"mesh": "2"}, {"coordinator": "192.0.2.1:8476"}, CapacityError, "cannot be listened on"),
    ],
)
def test_processes_that_cannot_be(
    settings: dict[str, Any], processes: dict[str, Any], error: type[Exception], message: str
) -> None:
    chosen = {"coordinator": "localhost:8476", "num_processes": 2, "process_id": 0, "join_timeout_s": 0.1}
    with pytest.raises(error, match=message):
        join(EngineConfig(**settings), Processes(**(chosen | processes)))
