"""OpenAI's clients of other versions and languages, which `make test` installs under build/clients."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "build" / "clients"


@pytest.fixture
def servers(server_url: str, keyed_url: str, encoder_url: str, keys: dict[str, str]) -> str:
    """The value of STROP_TEST_SERVERS."""
    return json.dumps({"server_url": server_url, "keyed_url": keyed_url, "encoder_url": encoder_url, "keys": keys})


def installed(path: Path) -> Path:
    """`path`, or a skipped test; in CI, a failed one."""
    if not path.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{path} is missing: make build/clients/.installed")
    return path


def run(command: list[object], environment: dict[str, str]) -> str:
    """What a program prints that must end well."""
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5000:]
    return done.stdout


def test_python_client_2(servers: str, environment: dict[str, str]) -> None:
    client = installed(CLIENTS / "python" / "openai").parent
    path = os.pathsep.join((str(client), environment["PYTHONPATH"]))
    more = {"PYTHONPATH": path, "STROP_TEST_SERVERS": servers}
    version = run([sys.executable, "-c", "import openai; print(openai.__version__)"], environment | more)
    assert version.startswith("2.")
    tests = [Path(__file__).with_name(f"test_openai_{name}.py") for name in ("python", "tools")]
    out = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], environment | more)
    assert " passed" in out and "skipped" not in out


def test_node_client(servers: str, environment: dict[str, str]) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    client = installed(CLIENTS / "node_modules" / "openai")
    assert json.loads((client / "package.json").read_text())["version"].startswith("6.")
    more = {"STROP_TEST_SERVERS": servers, "STROP_TEST_NODE_MODULES": str(client.parent)}
    tests = Path(__file__).with_name("openai_node.test.mjs")
    out = run([node, "--test", "--test-reporter", "tap", tests], environment | more)
    assert "# fail 0" in out and "# pass 0" not in out
