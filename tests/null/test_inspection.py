"""`strop inspect` on files: what it says of good ones, and of those that Strop cannot run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import split_parts, write_parts
from tiny_llm import tiny_llm

from strop.bench.inspection import TensorGroup, facts, inspect, tensor_groups, total
from strop.cli.output import print_facts, print_table
from strop.core.config import EngineConfig
from strop.core.errors import CapacityError, RequestError, UnsupportedError
from strop.formats.checkpoint import open_checkpoint
from strop.formats.values import TensorInfo
from strop.models.describe import describe_spec, ranges
from strop.models.reader import load_spec
from strop.ops import native

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
    assert found.facts["llama.block_count"] == 2
    assert not any(key.startswith("tokenizer.") for key in found.facts)
    by_format = {group.format: group for group in found.formats}
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
    assert found.kind == "GGUF file" and found.facts["llama.embedding_length"] == 64
    assert {group.format: group.num_tensors for group in found.formats} == {"Q4_1": 14, "F32": 5, "IQ1_S": 1}
    assert found.num_file_bytes > 0 and len(found.tensors) == 20


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
    assert found.facts == {"model_type": "llama", "hidden_size": 64}
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


def test_facts_are_plain_and_short() -> None:
    found = facts({"a": "x" * 500, "list": [1], "tokenizer.ggml.model": "gpt2", "n": 3, "bad": float("nan")})
    assert str(found["a"]).endswith("...") and len(str(found["a"])) == 120
    assert found == {"a": found["a"], "n": 3, "bad": "nan"}
    assert len(facts(dict.fromkeys(map(str, range(500)), 1))) == 40


def test_what_the_kernels_cannot_run_is_said(tmp_path: Path) -> None:
    """Everything about it but where it would run."""
    if native.library() is None:
        pytest.skip("needs the native library")
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_llm().build())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.models.load.load_abstract", lambda *args, **kwargs: _refuse())
        found = inspect(str(path), ONE)
    assert [str(problem) for problem in found.problems] == ["no such kernel"]
    assert found.spec is not None and found.memory is not None and not found.platform


def _refuse() -> str:
    raise UnsupportedError("no such kernel")


def test_what_a_file_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts([("b\x1b[2J", "one\ntwo"), ("empty", "")])
    print_table(["name"], [["\x1b]0;title\x07"]])
    assert capsys.readouterr().out == "b [2J\tone two\nname\n ]0;title \n"


def test_a_truncated_file_leaves_what_stands_before_the_damage(tiny: Path, tmp_path: Path) -> None:
    raw = tiny.read_bytes()
    path = tmp_path / "model.gguf"
    ends = (raw.index(b"token_embd.weight"), raw.index(b"blk.1.attn_k.weight"), len(raw) - 100)
    for end, num_tensors in zip(ends, (0, 13, 20), strict=True):
        path.write_bytes(raw[:end])
        found = inspect(str(path), ONE)
        assert len(found.problems) == 1 and "damaged" in str(found.problems[0])
        assert found.kind == "GGUF file" and found.facts["general.architecture"] == "llama"
        assert len(found.tensors) == num_tensors


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, split_parts(tiny_llm(), 3))
    for path in paths:
        found = inspect(str(path), ONE, with_speed=False)
        assert found.problems == [] and found.kind == "GGUF in 3 parts"
        assert found.num_file_bytes == sum(part.stat().st_size for part in paths)
        assert len(found.tensors) == 20
    paths[1].unlink()
    found = inspect(str(paths[0]), ONE)
    assert paths[1].name in str(found.problems[0])
    assert found.facts["general.architecture"] == "llama" and 0 < len(found.tensors) < 20


def test_a_context_is_planned_for(tiny: Path) -> None:
    short, long = (
        inspect(str(tiny), replace(ONE, max_context_len=length), with_speed=False).memory for length in (32, 128)
    )
    assert short is not None and long is not None and short.cache_bytes < long.cache_bytes


def test_without_kernels_it_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is not None:
        found = inspect(str(tiny), ONE, with_speed=False)
        assert (found.platform, found.no_kernels) == ("native", None)
    monkeypatch.setenv("STROP_NATIVE", "0")
    found = inspect(str(tiny), ONE, with_speed=False)
    assert (found.platform, found.no_kernels, found.problems) == ("xla", "STROP_NATIVE=0", [])


def test_tensor_groups_count_the_largest_first() -> None:
    infos = [TensorInfo("a", (4,), "F32", 16), TensorInfo("b", (64, 32), "Q8_0", 2176), TensorInfo("c", (), "F32", 4)]
    groups = tensor_groups(infos)
    assert groups == [TensorGroup("Q8_0", 1, 2048, 2176), TensorGroup("F32", 2, 5, 20)]
    assert total(groups) == TensorGroup("all", 3, 2053, 2196)


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
