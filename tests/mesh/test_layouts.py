"""Partition layouts on virtual devices give what one device gives, prompts and decoding, and send what they record."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CASES = {
    "2x2x2": [
        "multiquery_parallel:ws2d/heads:ws2d/batch",
        "multiquery_parallel:wg_xyz/batch:ws2d/batch",
        "multiquery_serial:wg_x/heads:ws2d/heads",
        "multiquery_serial:wg_xy/batch:ws2d/batch/looped",
        "grouped_serial:wg_xy/heads:ws2d/batch",
        "grouped_serial:ws1d/heads/looped:ws1d/batch",
        "grouped_plain_biased:ws2d/heads:wg_xyz/heads",
        "grouped_plain_biased:ws1d/heads:ws1d/heads",
        "multihead_two_norms:wg_x/batch/looped:ws2d/batch",
        "multihead_two_norms:ws2d/heads/looped:wg_xy/heads",
        "multihead_out_norms:ws2d/heads:ws2d/batch",
        "multihead_norms_of_sums:ws2d/heads:ws2d/heads",
        "grouped_plain_biased:dp/batch:dp/batch",
    ],
    "2x4x2": [
        "multiquery_parallel:wg_xyz/heads:ws2d/batch/looped",
        "grouped_serial:ws2d/heads:wg_xy/batch",
        "grouped_plain_biased:wg_x/heads:ws2d/batch",
        "multihead_two_norms:ws1d/batch:ws1d/batch/looped",
    ],
    "8": ["grouped_serial:ws1d/heads:ws1d/heads"],
    "1x8": ["multiquery_serial:ws2d/heads:ws2d/batch"],
}


class Results:
    """What child processes, one for each mesh, say of their cases, as soon as they say it."""

    def __init__(self, wanted: dict[str, list[str]]) -> None:
        self._children: dict[str, Iterator[Any]] = {}
        self._wanted = wanted
        self._found: dict[tuple[str, str], Any] = {}

    def of(self, mesh: str, case: str) -> Any:
        if mesh not in self._children:
            self._children[mesh] = self._run(mesh)
        while (mesh, case) not in self._found:
            name, result = next(self._children[mesh])
            self._found[mesh, name] = result
        return self._found[mesh, case]

    def _run(self, mesh: str) -> Iterator[Any]:
        flags = "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0"
        path = os.pathsep.join(part for part in sys.path if part)
        command = [sys.executable, str(Path(__file__).parent / "run_cases.py"), mesh, *self._wanted[mesh]]
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                yield json.loads(line)
        raise AssertionError(f"{command} ended with {child.returncode}; its error is above")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if getattr(item, "originalname", "") == test_as_on_one_device.__name__:
            params = item.callspec.params  # type: ignore[attr-defined]
            wanted.setdefault(params["mesh"], []).append(params["case"])
    return Results(wanted)


@pytest.mark.parametrize(("mesh", "case"), [(mesh, case) for mesh, cases in CASES.items() for case in cases])
def test_as_on_one_device(mesh: str, case: str, results: Results) -> None:
    found = results.of(mesh, case)
    assert max(found["errors"]) < 1e-5, found["errors"]
    for recorded, in_program in found["bytes"]:
        assert recorded == in_program > 0
