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
from strop.plan.calibrate import COARSE, Rounds, calibrate, typical
from strop.plan.predict import Predictor, StepTime

TINY = replace(
    COARSE, seconds=0.2, formats=("q4", "q8"), products={512: (1, 12, 64), 2048: (1, 12, 64)}, page_rows=(1, 12),
    bandwidth_bytes=(1 << 20, 1 << 26), batches=(1, 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def profile() -> MachineProfile:
    if not native.register():
        pytest.skip("needs the native library")
    native.set_num_threads(2)
    library, path = native.library(), native.library_path()
    assert library is not None and path is not None
    return calibrate(library, this_machine(native.isa() or "", 2, path), TINY)


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
        outcome = Outcome("tiny", cell, typical(measure_cell(engine, cell, 0.05)), predicted)
        assert 1e-6 < predicted.seconds < 1
        assert outcome.error > -1
        assert not engine.has_unfinished
    del engine
    gc.collect()


def test_points_are_measured_in_turn() -> None:
    order: list[str] = []
    rounds = Rounds({name: lambda name=name: order.append(name) for name in "ab"})  # type: ignore[misc]
    assert order == ["a", "b"]  # once before anything counts
    rounds.run(0.0, least_rounds=2)
    rounds.run(0.0)
    assert order == ["a", "b"] * 4
    assert rounds.seconds().keys() == {"a", "b"}
    assert typical([9.0, 1.0, 2.0, 3.0]) == 2.0


def test_errors_are_relative_to_what_was_measured() -> None:
    cell = Cell("decode", 1, 1)
    assert Outcome("m", cell, 2.0, StepTime(1.5, {"compute": 1.5})).error == -0.25
    assert percentile([5, 1, 4, 2, 3], 0.95) == 5
    assert percentile(list(range(1, 101)), 0.95) == 95
    assert percentile([7], 0.95) == 7
