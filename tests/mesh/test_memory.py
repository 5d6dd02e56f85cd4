"""What a process of a mesh holds, as planned before anything is loaded, against what is loaded."""

import math
from pathlib import Path

import jax
import pytest
from tiny_llm import tiny_llm

from strop.core.config import EngineConfig
from strop.engine.engine import Engine
from strop.formats.checkpoint import open_checkpoint
from strop.models.memory import MESH_RUNTIME_BYTES, MemoryPlan, fit_memory, plan_memory, weight_bytes
from strop.models.mesh import PLACEMENTS, MeshPart, MeshShape
from strop.models.reader import ParameterReader, load_spec
from strop.ops import native

CONFIG = EngineConfig(max_num_seqs=2, max_step_tokens=64, max_context_len=64, num_blocks=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_llm("qwen2", "Q4_1", ffn_dim=128).build())
    return path


@pytest.fixture(scope="module")
def reader(model: Path) -> ParameterReader:
    checkpoint = open_checkpoint(str(model))
    return ParameterReader(checkpoint, load_spec(checkpoint))


def planned(reader: ParameterReader, layout: str, mesh: MeshShape, num_devices: int) -> MemoryPlan:
    part = MeshPart(PLACEMENTS[layout], mesh, num_devices)  # type: ignore[index]
    return plan_memory(reader, reader.spec, CONFIG, "native", available_bytes=2**32, part=part)


@pytest.mark.parametrize("layout", ["ws1d", "dp", "wg_x"])
def test_all_devices_of_one_process_are_counted(layout: str, model: Path) -> None:
    if not native.register():
        pytest.skip("needs the native library")
    engine = Engine.load(str(model), EngineConfig(2, 64, max_context_len=64, num_blocks=5, mesh="2", layout=layout))
    weights = [*engine.params.weights.values(), *engine.params.vectors.values()]
    shards = [shard.data for array in jax.tree.leaves(weights) for shard in array.addressable_shards]
    held = sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())
    assert math.isclose(engine.memory.weight_bytes, held, rel_tol=0.02)
    caches = sum(shard.data.nbytes for cache in engine._caches for shard in cache.addressable_shards)
    assert engine.memory.cache_bytes == caches


def test_a_process_counts_its_own_devices(reader: ParameterReader) -> None:
    mesh = MeshShape(2, 2)
    for layout in ("ws1d", "ws2d", "wg_xy"):
        whole, half = (planned(reader, layout, mesh, count) for count in (4, 2))
        for name in ("weight_bytes", "cache_bytes", "activation_bytes"):
            assert abs(getattr(whole, name) - 2 * getattr(half, name)) <= 4, (layout, name)
    alone = fit_memory(weight_bytes(reader, "native", 4), reader.spec, CONFIG, "native", available_bytes=2**32)
    copies = planned(reader, "dp", mesh, 4)
    assert alone.weight_bytes < copies.weight_bytes < 2 * alone.weight_bytes  # a pack's pages are shared
    assert weight_bytes(reader, "xla", 4, MeshPart(PLACEMENTS["dp"], mesh, 4)) == 4 * weight_bytes(reader, "xla", 4)
    assert copies.cache_bytes == 2 * alone.cache_bytes  # two key/value heads, on four devices
    assert copies.runtime_bytes > alone.runtime_bytes + MESH_RUNTIME_BYTES


def test_gathered_weights_are_counted(reader: ParameterReader) -> None:
    mesh = MeshShape(2, 2)
    stay, gather = (planned(reader, layout, mesh, 4).activation_bytes for layout in ("ws2d", "wg_xyz"))
    assert gather > stay
