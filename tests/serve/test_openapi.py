"""schemathesis over the server's own OpenAPI document: what that allows is answered as it says, the rest is refused.

More by hand: `st run URL/openapi.json --seed N -n 1000`, beside a server that was started as here.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, Start
from tiny_llm import tiny_llm

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


# Not checked is whether all that fits the schema is accepted: a prompt may be empty, longer than the context, or ask for
# what this model's template does not know.
@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
def test_schemathesis(tiny: ServerProcess, environment: dict[str, str], tmp_path: Path, phase: str) -> None:
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", program, "run", f"{tiny.url}/openapi.json", "--mode", "all"]
    limits = ["--phases", phase, "--max-examples", 25, "--request-timeout", 20, "--max-response-time", 10]
    how = [
        "--seed",
        4,
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance",
        "--warnings",
        "off",
        "--continue-on-failure",
        "--no-color",
    ]
    done = subprocess.run(
        [str(part) for part in (*command, *limits, *how)],
        env={**environment, "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert "no tests were run" not in done.stdout.lower()
    tiny.wait_until_idle()
    assert tiny.metric("strop:engine_restarts_total") == tiny.metric("strop:blocks_leaked") == 0
    assert "Traceback" not in tiny.log and os.path.exists(f"/proc/{tiny.engine_pid}")
