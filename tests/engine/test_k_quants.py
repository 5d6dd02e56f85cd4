"""A Q4_K_M model, whose layers mix formats, on the native kernels."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.core.config import EngineConfig
from strop.engine.engine import Engine
from strop.engine.loading import load_model
from strop.formats.checkpoint import open_checkpoint
from strop.formats.pack_cache import PackCache
from strop.models.load import LAYOUT_VERSION
from strop.ops import native

CONFIG = EngineConfig(max_num_seqs=2, max_step_tokens=64, max_context_len=128, num_blocks=9, num_threads=2)


def test_every_row_is_packed_in_its_own_format(loaded: Callable[..., Any]) -> None:
    params = loaded("llama", "Q4_K_M").params
    found = [
        tuple(params.weights[getattr(layer, role).stack].format for role in ("qkv", "o", "gate_up", "down"))
        for layer in params.layers
    ]
    assert found == [
        ("q4_two_level+q8", "q4_two_level", "q4_two_level", "q4_two_level"),
        ("q4_two_level+q5_two_level+q4_two_level", "q4_two_level", "q4_two_level", "q8"),
    ]


@pytest.mark.parametrize("weights", ["Q4_K_M", "Q4_1", "BF16"])
def test_planned_bytes_are_those_of_the_pack(
    weights: str, tiny_path: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.register():
        pytest.skip("the native library is not built")
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    path = tiny_path("llama", weights)
    model, _ = load_model(str(path), CONFIG)
    key = f"{open_checkpoint(path).source_hash()}-tiles{LAYOUT_VERSION}"
    pack = PackCache().open_or_build(key, lambda writer: pytest.fail("built again"))
    arrays = sum(pack[name].nbytes for name in pack if name != "manifest")
    assert model.memory.weight_bytes == arrays
    assert arrays < pack.num_bytes < arrays + (len(pack) + 1) * 4096


def test_scores_are_those_of_the_dequantised_weights(
    tiny_path: Callable[..., Path], loaded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    token_ids = np.random.default_rng(0).integers(0, 268, 40).tolist()
    model = loaded("llama", "Q4_K_M")
    found = np.concatenate(list(Engine(model, replace(CONFIG, memory_bytes=2**33)).score(token_ids)))
    monkeypatch.setenv("STROP_NATIVE", "0")
    exact, config = load_model(str(tiny_path("llama", "Q4_K_M")), CONFIG)
    assert exact.platform == "xla"
    expected = np.concatenate(list(Engine(exact, config).score(token_ids)))
    # int8 activations alone: these small random models lose 6 % in Q4_1 and Q8_0, 7 % here.
    assert np.sqrt(np.mean(np.square(found - expected))) < 0.1 * expected.std()


def test_rounding_is_reported_at_every_start(
    tiny_path: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not native.register():
        pytest.skip("the native library is not built")
    monkeypatch.setenv("STROP_CACHE", str(tmp_path))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "strop.models.load"):
            load_model(str(tiny_path("llama", "Q4_K_M")), CONFIG)
        (line,) = [record.getMessage() for record in caplog.records if "rounded" in record.getMessage()]
        assert "v (1 x), down (1 x), embed (1 x)" in line
        rms, worst = (float(word.rstrip(",")) for word in line.split() if word.rstrip(",").startswith("0.0"))
        assert 0 < rms < worst < 0.5 / 127 * (1 + 2**-9)
