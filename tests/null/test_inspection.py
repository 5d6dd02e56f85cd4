"""`strop inspect` on files: what it says of good ones, and of those that Strop cannot run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llm import tiny_llm

from strop.bench.inspection import TensorGroup, facts, inspect, tensor_groups
from strop.core.config import EngineConfig
from strop.core.errors import CapacityError, RequestError
from strop.formats.checkpoint import open_checkpoint
from strop.formats.values import TensorInfo
from strop.models.describe import describe_spec, ranges
from strop.models.reader import load_spec

ONE = EngineConfig(max_num_seqs=1)
IQ1_S = 19


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_llm().build())
    return path


def test_a_model_that_runs(tiny: Path) -> None:
    found = inspect(str(tiny), ONE, with_speed=False)
    assert found.problems == [] and found.kind == "GGUF file"
    assert found.num_file_bytes == tiny.stat().st_size
    assert found.facts["llama.block_count"] == "2"
    assert not any(key.startswith("tokenizer.") for key in found.facts)
    by_format = {group.format: group for group in found.tensors}
    assert by_format["Q4_1"].num_tensors == 15 and by_format["F32"].num_tensors == 5
    assert by_format["F32"].num_bytes == 4 * by_format["F32"].num_values == 4 * 5 * 64
    assert found.tokenizer.startswith("268 tokens")
    assert "characters" in found.chat_template
    assert found.memory is not None and found.memory.max_context_len == 128
    assert json.loads(json.dumps(found.as_json()))["spec"]["vocab_size"] == 268


def damaged(path: Path, **changes: Any) -> Path:
    model = tiny_llm()
    for name, item in changes.items():
        setattr(model.tensors[0], name, item)
    path.write_bytes(model.build())
    return path


def test_unknown_tensor_types_leave_the_metadata(tmp_path: Path) -> None:
    found = inspect(str(damaged(tmp_path / "model.gguf", type_id=IQ1_S)), ONE)
    assert "IQ1_S" in str(found.problems[0]) and found.spec is None
    assert found.kind == "GGUF file" and found.facts["llama.embedding_length"] == "64"


def test_an_unknown_family_leaves_tensors_and_tokenizer(tmp_path: Path) -> None:
    model = tiny_llm()
    metadata = dict(model.metadata)
    metadata["general.architecture"] = metadata["general.architecture"].replace(b"llama", b"lhama")
    model.metadata = list(metadata.items())
    path = tmp_path / "model.gguf"
    path.write_bytes(model.build())
    found = inspect(str(path), ONE)
    assert "lhama" in str(found.problems[0])
    assert found.tensors and found.tokenizer and found.spec is None and found.memory is None


def test_a_folder_of_pickles_leaves_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "x": [1]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    found = inspect(str(tmp_path), ONE)
    assert found.facts == {"model_type": "llama", "hidden_size": "64"}
    assert "pickled" in str(found.problems[0])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"hello world, this is no model at all"])
def test_rubbish_is_a_problem_and_no_crash(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    found = inspect(str(path), ONE)
    assert len(found.problems) == 1 and found.num_file_bytes == len(content)


def test_a_model_that_does_not_fit_is_described_all_the_same(tiny: Path) -> None:
    found = inspect(str(tiny), replace(ONE, memory_bytes=1 << 20), with_speed=False)
    assert isinstance(found.problems[0], CapacityError)
    assert found.spec is not None and found.tensors


def test_a_context_out_of_range_is_the_users_error(tiny: Path) -> None:
    with pytest.raises(RequestError, match="max_context_len=999"):
        inspect(str(tiny), replace(ONE, max_context_len=999))


def test_a_model_that_cannot_run_loads_no_jax(tmp_path: Path) -> None:
    path = damaged(tmp_path / "model.gguf", type_id=IQ1_S)
    code = f"""
import sys
sys.argv = ['strop', 'inspect', {str(path)!r}]
from strop.cli.main import main
try:
    main()
finally:
    print('jax' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "IQ1_S" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_facts_are_short_plain_lines() -> None:
    found = facts({"a": "x" * 500, "b\x1b[2J": "one\ntwo", "list": [1], "tokenizer.ggml.model": "gpt2", "n": 3})
    assert found["a"].endswith("...") and len(found["a"]) == 120
    assert found["b [2J"] == "one two"
    assert found.keys() == {"a", "b [2J", "n"}
    assert len(facts(dict.fromkeys(map(str, range(500)), 1))) == 40


def test_tensor_groups_count_the_largest_first() -> None:
    infos = [TensorInfo("a", (4,), "F32", 16), TensorInfo("b", (64, 32), "Q8_0", 2176), TensorInfo("c", (), "F32", 4)]
    assert tensor_groups(infos) == [TensorGroup("Q8_0", 1, 2048, 2176), TensorGroup("F32", 2, 5, 20)]


def test_layers_of_two_kinds_in_words(tiny: Path) -> None:
    spec = load_spec(open_checkpoint(tiny))
    full = spec.layers[0]
    attention = replace(full.attention, window_len=512, rope=None, qkv_bias=True, scale=0.1)
    near = replace(full, attention=attention)
    text = dict(describe_spec(replace(spec, layers=(near, near, full, near))))
    assert text["layers"] == "4" and text["vocabulary"].startswith("268 tokens")
    assert text["layers 0-1, 3"] == (
        "4 query heads on 2 key-value heads of 16 dims, sees a window of 512 tokens, no rope, qkv_bias, scale=0.1"
    )
    assert text["layer 2"].endswith("sees the whole context, rope theta 10,000")
    assert "every layer" in dict(describe_spec(spec))


def test_scaled_rope_in_words(tiny: Path) -> None:
    spec = load_spec(open_checkpoint(tiny))
    for scales, said in (((0.5,) * 8, "positions scaled by 0.5"), ((1.0,) * 4 + (0.25,) * 4, "by 0.25 to 1")):
        rope = spec.layers[0].attention.rope
        assert rope is not None
        layer = replace(
            spec.layers[0], attention=replace(spec.layers[0].attention, rope=replace(rope, inv_freq_scale=scales))
        )
        assert said in dict(describe_spec(replace(spec, layers=(layer,))))["every layer"]


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
