"""Partition layouts on virtual devices give what one device gives, prompts and decoding, and send what they record."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CASES = [
    "2x2x2:multiquery_parallel:ws2d/heads:ws2d/batch",
    "2x2x2:multiquery_parallel:wg_xyz/batch:ws2d/batch/looped",
    "2x4x2:multiquery_parallel:wg_xyz/heads:ws2d/batch",
    "2x2x2:grouped_serial:wg_xy/heads:ws2d/batch",
    "2x2x2:grouped_serial:ws1d/heads/looped:ws1d/batch",
    "2x4x2:grouped_serial:ws2d/heads:wg_xy/batch",
    "8:grouped_serial:ws1d/heads:ws1d/heads",
    "2x2x2:grouped_plain_biased:ws2d/heads:wg_xyz/heads",
    "2x2x2:grouped_plain_biased:ws1d/heads:ws1d/heads",
    "2x2x2:grouped_plain_biased:dp/heads:dp/batch",
    "2x2x2:multihead_two_norms:wg_x/batch:ws2d/batch",
    "2x2x2:multihead_two_norms:ws2d/heads/looped:wg_x/heads",
    "2x4x2:multihead_two_norms:ws1d/heads:ws1d/batch",
    "2x2x2:multihead_out_norms:wg_xy/batch:ws2d/batch",
    "2x2x2:multihead_norms_of_sums:ws2d/heads:ws2d/heads",
]
"""Mesh, network, and its layouts for the prompts and for the tokens after them."""


def start(script: str, arguments: list[str], num_devices: int) -> subprocess.Popen[str]:
    """A process with so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    path = os.pathsep.join(part for part in sys.path if part)
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


class Results:
    """What a child process says of its cases, as soon as it says it."""

    def __init__(self, cases: list[str]) -> None:
        self._lines = self._run(cases)
        self._found: dict[str, Any] = {}

    def of(self, case: str) -> Any:
        while case not in self._found:
            name, result = next(self._lines)
            self._found[name] = result
        return self._found[case]

    def _run(self, cases: list[str]) -> Iterator[Any]:
        with start("run_cases.py", cases, num_devices=16) as child:
            assert child.stdout is not None
            for line in child.stdout:
                yield json.loads(line)
        raise AssertionError(f"run_cases.py ended with {child.returncode}; its error is above")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    chosen = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    return Results([case for case in CASES if case in chosen])


@pytest.mark.parametrize("case", CASES)
def test_as_on_one_device(case: str, results: Results) -> None:
    found = results.of(case)
    assert max(found["errors"]) < 1e-5, found["errors"]
    for recorded, in_program in found["bytes"]:
        assert recorded == in_program > 0


def test_over_two_processes() -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    processes = [start("run_process.py", [rank, port], num_devices=2) for rank in ("0", "1")]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    result = json.loads(said[0].splitlines()[-1])
    assert result["devices"] == [0, 0, 1, 1]
    assert max(result["errors"]) < 1e-5
