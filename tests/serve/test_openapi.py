"""schemathesis over the server's own OpenAPI document: what that allows is answered as it says, the rest is refused.

More of it: `STROP_TEST_EXAMPLES=400 STROP_TEST_SEED=17 pytest tests/serve/test_openapi.py`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, Start, wait_until_idle
from tiny_llm import tiny_llm

NUM_EXAMPLES = int(os.environ.get("STROP_TEST_EXAMPLES", "25"))
SEED = int(os.environ.get("STROP_TEST_SEED", "4"))
TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def tiny(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Writes quickly, and nothing of meaning."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.gguf").write_bytes(tiny_llm().build())
    (folder / "chat.jinja").write_text(TEMPLATE)
    with start_server(folder / "tiny.gguf", "--name", "tiny", "--template", folder / "chat.jinja") as server:
        yield server.ready()


def fuzz(url: str, environment: dict[str, str], folder: Path, *options: object) -> str:
    """What schemathesis says of a server that it finds no fault with.

    Not checked is whether all that fits the document is accepted: a prompt may be empty, or longer than the context.
    """
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    limits = ["--request-timeout", 20, "--max-response-time", 10, "--seed", SEED, "--mode", "all"]
    limits += ["--max-examples", NUM_EXAMPLES]
    checks = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    command = [sys.executable, "-c", program, "run", f"{url}/openapi.json", *limits, *checks, "--no-color", *options]
    done = subprocess.run(
        [str(part) for part in command],
        env={**environment, "PYTHONPATH": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600 + 5 * NUM_EXAMPLES,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("phase", "least"), [("coverage", 1500), ("fuzzing", 150)])
def test_all_routes(tiny: ServerProcess, environment: dict[str, str], tmp_path: Path, phase: str, least: int) -> None:
    before = tiny.metric("strop:http_requests_total")
    fuzz(tiny.url, environment, tmp_path, "--phases", phase)
    tiny.wait_until_idle()
    assert tiny.metric("strop:http_requests_total") - before > least
    assert tiny.metric("strop:engine_restarts_total") == tiny.metric("strop:blocks_leaked") == 0
    assert "Traceback" not in tiny.log


def test_embeddings(encoder_url: str, environment: dict[str, str], tmp_path: Path) -> None:
    paths = [option for path in ("/v1/embeddings", "/tokenize", "/detokenize") for option in ("--include-path", path)]
    fuzz(encoder_url, environment, tmp_path, *paths)
    wait_until_idle(encoder_url)
