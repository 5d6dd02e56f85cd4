"""An engine on a mesh answers as on one device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llm import tiny_llm

from strop.core.config import EngineConfig
from strop.core.errors import RequestError, UnsupportedError
from strop.engine.engine import Engine
from strop.engine.pack import Packer
from strop.llm import LLM
from strop.ops import native


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_llm("qwen2", "Q4_1", ffn_dim=128).build())
    return path


@pytest.mark.parametrize(
    ("platform", "cases"),
    [
        ("xla", ["2x2/auto", "4/ws1d", "2x2/wg_x", "2x2/auto/batch", "4/ws1d/batch"]),
        ("native", ["2/ws1d", "2x2/ws2d", "1x2/auto", "2/dp", "2x2/wg_x", "2x1x2/wg_xy", "2x2/wg_xyz"]),
        ("native", ["2/ws1d/batch", "2x2/ws2d/batch", "1x2/auto/batch", "2x2/wg_xy/batch", "3/dp/batch"]),
    ],
)
def test_answers_on_a_mesh_are_those_of_one_device(
    platform: str, cases: list[str], model: Path, environment: dict[str, str]
) -> None:
    if platform == "native" and not native.register():
        pytest.skip("needs the native library")
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "run_engine.py"), str(model), "1/auto", *cases],
        env=environment | {"XLA_FLAGS": flags} | ({"STROP_NATIVE": "0"} if platform == "xla" else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr.count("without the native kernels") == (1 + len(cases) if platform == "xla" else 0)
    one, *on_mesh = map(json.loads, ran.stdout.splitlines())
    assert len(on_mesh) == len(cases)
    for case, answers in zip(cases, on_mesh, strict=True):
        assert answers == one, case


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mesh": "64x2"}, UnsupportedError, r"mesh 64x2x1 has 128 devices, and this process sees \d+ of cpu"),
        ({"mesh": "two"}, RequestError, "mesh 'two' is not a shape"),
        ({"mesh": "1x1", "layout": "ws3d"}, RequestError, "layout='ws3d' is unknown: choose from auto, ws1d"),
        ({"layout": "ws2d"}, RequestError, "layout='ws2d' needs a mesh of devices"),
        ({"attention": "batch"}, RequestError, "attention='batch' needs a mesh of devices"),
        ({"mesh": "1x1", "attention": "rows"}, RequestError, "attention='rows' is unknown: choose from heads, batch"),
    ],
)
def test_settings_that_cannot_be(model: Path, settings: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine.load(str(model), EngineConfig(**settings))  # type: ignore[arg-type]


def test_pooling_is_not_partitioned(model: Path) -> None:
    with pytest.raises(RequestError, match="mesh='1x1' is for models that generate"):
        LLM(str(model), mesh="1x1", runner="pooling")


@pytest.mark.parametrize("padding_is_free", [False, True])
def test_every_step_can_be_shared_by_three_devices(padding_is_free: bool) -> None:
    packer = Packer(4, 8, 32, 1, padding_is_free=padding_is_free, row_multiple=3)
    shapes = [packer.shape(num_rows, 1, 32) for num_rows in (1, 64, 200)]
    assert all(shape.num_rows % 3 == 0 and shape.num_rows >= 1 for shape in shapes)
