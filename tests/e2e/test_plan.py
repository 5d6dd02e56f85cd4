"""From a plan for this machine to its file, and to the same requests run and measured."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Strop = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("objective", ["", "itl=10s,throughput"])  # a whole batch at once; requests one by one
def test_a_plan_is_made_and_measured(strop: Strop, smollm2_path: Path, tmp_path: Path, objective: str) -> None:
    plan, measured = tmp_path / "plan.json", tmp_path / "measured.json"
    asked = ["--traffic", "in=24,out=6", "--objective", objective, "--out", str(plan), "--json"]
    result = strop("plan", smollm2_path, *asked)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["hardware"] == {"name": "this-machine", "devices": 1}
    assert found["chosen"]["batch"] >= 1
    assert json.loads(plan.read_text())["engine"]["max_num_seqs"] == found["chosen"]["batch"]
    result = strop("bench", "--plan", plan, "--seconds", 1, "--json", measured)
    assert result.returncode == 0, result.stderr
    assert "planned for 1 x this-machine, measured here" in result.stdout
    promises = {one["name"]: one for one in json.loads(measured.read_text())["promises"]}
    assert {"step of answers", "TTFT", "ITL, mean", "E2E", "requests", "memory"} <= promises.keys()
    assert all(one["predicted"] > 0 and one["measured"] > 0 for one in promises.values())
    assert promises["ITL, mean"]["measured"] < promises["E2E"]["measured"]
    assert abs(promises["memory"]["error"]) < 0.3
    rate = promises["written"]["measured"] / promises["requests"]["measured"] * 60
    assert rate == pytest.approx(6)


def test_a_file_without_promises(strop: Strop, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"engine": {}, "plan": {"model": "m.gguf", "devices": 0}}')
    failed = strop("bench", "--plan", path)
    assert failed.returncode == 1
    assert "what the plan promises cannot be read" in failed.stderr and "make the plan again" in failed.stderr
