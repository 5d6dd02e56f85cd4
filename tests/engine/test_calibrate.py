"""The real kernels, measured in a moment: figures that can be, kept and read again, and steps predicted from them."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llm import tiny_llm

from strop.bench.predictions import Cell, Outcome, measure_cell, percentile, predict_cell, prepare
from strop.core.config import EngineConfig
from strop.engine.costs import CostModel
from strop.engine.engine import Engine
from strop.machine.profile import MachineProfile, read_profile, this_machine, write_profile
from strop.ops import native
from strop.plan.calibrate import COARSE, calibrate, measure_in_turn
from strop.plan.predict import Pace, Predictor, StepTime

TINY = replace(
    COARSE, seconds=0.2, formats=("q4", "q8"), dims=(512, 1024), rows=(1, 12, 64), page_rows=(1, 12),
    bandwidth_bytes=(1 << 20, 1 << 26), batches=(1, 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def profile() -> MachineProfile:
    if not native.register():
        pytest.skip("needs the native library")
    native.set_num_threads(2)
    library, path = native.library(), native.library_path()
    assert library is not None and path is not None
    found, pulse = calibrate(library, this_machine(native.isa() or "", 2, path), TINY)
    assert all(0.01 < factor < 100 for factor in pulse.now())
    return found


def test_figures_are_plausible(profile: MachineProfile, tmp_path: Path) -> None:
    write_profile(tmp_path, profile)
    assert read_profile(tmp_path, profile.machine) == profile
    assert set(profile.linear) == {"q4", "q8"}
    for sizes in profile.linear.values():
        for sized in sizes:
            assert all(
                1e-13 < y / x / sized.num_weights < 1e-7 for x, y in zip(sized.cold.x, sized.cold.y, strict=True)
            )
    assert [page.head_dim for page in profile.attention["bf16"]] == [64, 128]
    assert 1e-8 < profile.call_s < 1e-3
    assert 1e-6 < profile.step_s.at(1) < 1


def test_a_model_is_predicted_and_measured(
    profile: MachineProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_llm(context_len=512).build())
    engine = Engine.load(str(path), EngineConfig(8, max_context_len=512, prefix_cache=False))
    prepare(engine)
    predictor = Predictor(profile, CostModel(engine.params, engine.spec, engine.layout))
    for cell in (Cell("decode", 1, 100), Cell("decode", 8, 400), Cell("prefill", 1, 300)):
        predicted = predict_cell(predictor, cell, engine)
        outcome = Outcome("tiny", cell, measure_cell(engine, cell, 0.05), predicted, Pace())
        assert 1e-6 < predicted.seconds < 1
        assert outcome.error > -1
        assert not engine.has_unfinished
    del engine
    gc.collect()


def test_points_are_measured_in_turn() -> None:
    order: list[str] = []
    times = measure_in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 0.0)  # type: ignore[misc]
    assert order == ["a", "b"] * 4  # once before anything counts
    assert times.keys() == {"a", "b"}


def test_errors_are_relative_to_what_was_measured() -> None:
    cell = Cell("decode", 1, 1)
    assert Outcome("m", cell, 2.0, StepTime(1.5, {"compute": 1.5}), Pace(1.2, 9.0)).error == -0.25
    assert Outcome("m", cell, 2.0, StepTime(1.5, {"compute": 1.5}), Pace(1.2, 9.0)).error_at_pace == pytest.approx(-0.1)
    assert percentile([5, 1, 4, 2, 3], 0.95) == 5
    assert percentile(list(range(1, 101)), 0.95) == 95
    assert percentile([7], 0.95) == 7
