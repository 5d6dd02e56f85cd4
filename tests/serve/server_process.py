"""`strop serve` in a process of its own, as an operator runs it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from http_client import Reply, ask

T = TypeVar("T")

_URL = re.compile(r"^(http://\S+)  \(loading", re.MULTILINE)


class ServerProcess:
    """A server, and what it prints. Use it as a context manager: it never outlives the tests."""

    running: "list[ServerProcess]" = []  # noqa: RUF012
    """Those whose logs a failed test shows."""

    def __init__(self, *arguments: object, environment: dict[str, str], log_path: Path) -> None:
        """arguments: what follows `strop serve`; a port is picked."""
        self.log_path = log_path
        self.arguments = [str(argument) for argument in arguments]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from strop.cli.main import main; main()", "serve", *self.arguments]
                + ([] if "--port" in self.arguments else ["--port", "0"]),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running.append(self)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.running.remove(self)
        with contextlib.suppress(ProcessLookupError, StopIteration):
            os.kill(self.engine_pid, signal.SIGCONT)  # a test may have left it stopped
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def url(self) -> str:
        """Where it listens. Waits for it."""
        return wait_for(lambda: (found := _URL.search(self.log)) and found[1], "a URL", self.process)

    @property
    def engine_pid(self) -> int:
        """The engine's process; StopIteration if there is none."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        children = " ".join(path.read_text() for path in tasks.glob("*/children")).split()
        return next(int(pid) for pid in children if b"strop.serve.engine_main" in _command_line(pid))

    def ready(self) -> "ServerProcess":
        """Itself, when it serves."""
        wait_for(lambda: self.ask("/readyz").status == 200, "/readyz", self.process)
        return self

    def ask(self, path: str, body: object = None, **how: object) -> Reply:
        """See http_client.ask."""
        return ask(self.url, path, body, **how)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        """See http_client.metric."""
        return metric(self.url, name)

    def wait_until_idle(self) -> None:
        """Until the engine holds nothing."""
        wait_until_idle(self.url)


def metric(url: str, name: str, **headers: str) -> float:
    """Of /metrics, the sum over its labels; 0 for one that has not been counted yet."""
    page = ask(url, "/metrics", headers=headers).body.decode()
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, values))


def wait_until_idle(url: str) -> None:
    """Until nothing runs, and no blocks are held."""
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "strop:blocks_used", "strop:queue_tokens")

    def held() -> dict[str, float]:
        return {name: value for name in gauges if (value := metric(url, name))}

    wait_for(lambda: not held(), held)


def wait_for(
    probe: Callable[[], T], what: object, process: "subprocess.Popen[bytes] | None" = None, timeout_s: float = 240.0
) -> T:
    """What `probe` returns as soon as it is true; a connection that is refused counts as false."""
    end_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            if found := probe():
                return found
        assert process is None or process.poll() is None, f"the server ended with {process.returncode}"
        assert time.monotonic() < end_s, f"waited in vain for {what() if callable(what) else what}"
        time.sleep(0.02)


def _command_line(pid: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


Start = Callable[..., ServerProcess]
"""What makes one of some arguments."""
