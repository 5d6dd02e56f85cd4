"""`load_abstract` returns what `load` returns, with shapes for matrices: the cost of a model that is not loaded."""

from pathlib import Path

import pytest
from tiny_llm import tiny_llm

from strop.engine.costs import CostModel
from strop.formats.checkpoint import open_checkpoint
from strop.models.layout import Single
from strop.models.load import load, load_abstract
from strop.models.parameters import Parameters
from strop.models.reader import ParameterReader, load_spec
from strop.ops import native
from strop.ops.dispatch import Platform


def shapes_of(params: Parameters) -> list[tuple[object, ...]]:
    weights = params.weights.values()
    return sorted((weight.format, weight.shape, weight.data.shape, str(weight.data.dtype)) for weight in weights)


@pytest.mark.parametrize("platform", ["native", "xla"])
@pytest.mark.parametrize(
    ("family", "weights", "tied"), [("llama", "Q4_1", True), ("qwen2", "Q5_0", False), ("llama", "BF16", False)]
)
def test_the_same_shapes_and_costs(
    family: str, weights: str, tied: bool, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform == "native" and not native.register():
        pytest.skip("needs the native library")
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_llm(family, weights, tied=tied).build())
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint)
    reader = ParameterReader(checkpoint, spec)
    loaded = load(reader, spec, platform, num_positions=64, source_hash=checkpoint.source_hash)
    abstract = load_abstract(reader, spec, platform, num_positions=64)
    assert shapes_of(abstract) == shapes_of(loaded)
    for ours, theirs in zip(abstract.layers, loaded.layers, strict=True):
        assert abstract.weights[ours.gate_up.stack].shape == loaded.weights[theirs.gate_up.stack].shape
        assert (ours.down.index, ours.rope) == (theirs.down.index, theirs.rope)
    layout = Single(platform)
    for batch in (1, 4):
        costs = [CostModel(params, spec, layout).decode_step(batch, 40) for params in (loaded, abstract)]
        assert costs[0] == costs[1] and costs[0].num_bytes > 0
