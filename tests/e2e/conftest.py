"""Real processes: `strop run` as a user starts it, with a cache directory of the run's own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llm import tiny_llm


@pytest.fixture(scope="session")
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """start(*arguments, env={...}, before="import ..."): a process with pipes; `before` is Python to run first."""

    def run(*arguments: object, env: dict[str, str] | None = None, before: str = "") -> subprocess.Popen[str]:
        code = f"{before}\nfrom strop.cli.main import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    return run


@pytest.fixture(scope="session")
def strop(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """strop(*arguments, stdin="", env={...}): the finished process."""

    def run(*arguments: object, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        with start(*arguments, **options) as process:
            out, err = process.communicate(stdin, timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_llm().build())
    return path


@pytest.fixture(scope="session")
def clean_error() -> Callable[..., None]:
    """clean_error(result, *named): exit code 1, one line on standard error besides the memory plan's, and no answer."""

    def check(result: subprocess.CompletedProcess[str], *named: str) -> None:
        lines = [line for line in result.stderr.splitlines() if not line.startswith(("memory:", "fits:"))]
        assert result.returncode == 1, result.stderr
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("strop: "), result.stderr
        assert result.stdout == ""
        for name in named:
            assert name in lines[0]

    return check
