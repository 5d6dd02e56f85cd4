"""scripts/random_model.py writes what Strop reads."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.formats.gguf import GGUFCheckpoint
from strop.formats.gguf_tokenizer import tokenizer_from_gguf
from strop.formats.values import dense
from strop.models.reader import load_spec

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "scripts/random_model.py"))


@pytest.mark.parametrize("matrix_type", ["Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_random_model_is_read_and_keeps_sizes(
    script: dict[str, Any], architecture: str, matrix_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    shape = script["Shape"](architecture, 2, 256, 544, 4, 2, 64, 400, 512, 1e4, 1e-5)
    script["write_model"](shape, "tiny", path, matrix_type)
    checkpoint = GGUFCheckpoint(path)
    spec = load_spec(checkpoint)
    assert (spec.num_layers, spec.model_dim, spec.vocab_size, spec.tied_embeddings) == (2, 256, 400, True)
    assert spec.layers[0].attention.qkv_bias == (architecture == "qwen2")
    assert len(tokenizer_from_gguf(checkpoint.metadata).encode(" time time", add_special=False)) == 2
    for name, fallback in (("token_embd", "Q6_K"), ("blk.1.ffn_up", matrix_type), ("blk.1.ffn_down", None)):
        weights = dense(checkpoint.read(f"{name}.weight")).astype(np.float64)
        assert fallback in (None, checkpoint.tensors[f"{name}.weight"].format)
        assert np.mean(weights**2) * weights.shape[1] == pytest.approx(1, rel=0.1)
        assert abs(np.mean(weights)) * weights.shape[1] ** 0.5 < 0.2
