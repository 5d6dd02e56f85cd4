"""Hugging Face folders and `open_checkpoint`: what is there decides, and what is not there is said."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file
from tiny_gguf import tiny_model

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.checkpoint import open_checkpoint
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.hf import HFCheckpoint, read_json

TENSORS = {
    "single": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(4, np.float16),
    "brain": np.full((2, 2), 1.5, ml_dtypes.bfloat16),
    "whole": np.arange(3),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    save_file({"single": TENSORS["single"]}, folder / "model-1.safetensors")
    save_file({"half": TENSORS["half"], "brain": TENSORS["brain"]}, folder / "model-2.safetensors")
    names = {"single": "model-1.safetensors", "half": "model-2.safetensors", "brain": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reads_every_dense_dtype(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, HFCheckpoint)
    for name in ("single", "half", "brain"):
        read = checkpoint.read(name)
        assert read.dtype == TENSORS[name].dtype
        np.testing.assert_array_equal(read, TENSORS[name])
        info = checkpoint.tensors[name]
        assert (info.shape, info.num_bytes) == (TENSORS[name].shape, TENSORS[name].nbytes)
    with pytest.raises(UnsupportedError, match=r"'whole' has dtype I64.*BF16"):
        checkpoint.read("whole")


def test_reads_shards(folder: Path) -> None:
    write_shards(folder)
    checkpoint = HFCheckpoint(folder)
    assert set(checkpoint.tensors) == {"single", "half", "brain"}
    np.testing.assert_array_equal(checkpoint.read("brain"), TENSORS["brain"])


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({}, "weight_map"),
        ({"single": "../model-1.safetensors"}, "same folder"),
        ({"single": "pytorch_model-1.bin"}, "safetensors file"),
        ({"single": "model-3.safetensors"}, "1 of the 1 shards .*missing: 'model-3.safetensors'"),
        ({"single": "model-2.safetensors"}, "not in their shards: 'single'"),
        ({"single": 7}, "same folder"),
    ],
)
def test_an_index_that_lies_is_refused(folder: Path, weight_map: dict[str, Any], named: str) -> None:
    write_shards(folder, weight_map)
    with pytest.raises(FormatError, match=named):
        HFCheckpoint(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    write_shards(folder)
    save_file({"single": TENSORS["single"], "half": TENSORS["half"]}, folder / "model-1.safetensors")
    with pytest.raises(FormatError, match="'half' is in both"):
        HFCheckpoint(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 9, 100, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(FormatError, match="download it again"):
            HFCheckpoint(folder)


CONTENT = save(TENSORS)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 330), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_header_bytes_are_read_or_refused_but_never_crash(flips: list[tuple[int, int]]) -> None:
    content = bytearray(CONTENT)
    for position, byte in flips:
        content[position % len(content)] = byte
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text("{}")
        Path(directory, "model.safetensors").write_bytes(content)
        try:
            checkpoint = HFCheckpoint(directory)
            for name in checkpoint.tensors:
                checkpoint.read(name)
        except (FormatError, UnsupportedError):
            pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": NaN}', "[" * 100_000, '{"a": "\\ud800', "\x00"])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_huge_json_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strop.formats.hf.MAX_JSON_BYTES", 10)
    (tmp_path / "config.json").write_text('{"key": "value"}')
    with pytest.raises(FormatError, match="at most 10"):
        read_json(tmp_path / "config.json")


def test_the_hash_covers_config_and_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(folder / "cache"))
    first = HFCheckpoint(folder).source_hash()
    assert HFCheckpoint(folder).source_hash() == first
    (folder / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    second = HFCheckpoint(folder).source_hash()
    save_file(TENSORS | {"half": np.zeros(4, np.float16)}, folder / "model.safetensors")
    assert len({first, second, HFCheckpoint(folder).source_hash()}) == 3


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()


def adapter_with_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")


def two_ggufs(folder: Path) -> None:
    (folder / "config.json").unlink()
    for name in ("q4", "q8"):
        (folder / f"{name}.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (only_pickles, "'pytorch_model.bin'.*run any code.*safe_serialization"),
        (adapter, "LoRA adapter.*merge"),
        (adapter_with_config, "LoRA adapter.*merge"),
        (two_ggufs, "2 GGUF files.*q4.gguf, q8.gguf.*path of one"),
    ],
)
def test_folders_that_hold_something_else(folder: Path, change: Callable[[Path], None], named: str) -> None:
    change(folder)
    with pytest.raises(UnsupportedError, match=named):
        open_checkpoint(folder)


def test_folders_and_files_that_hold_no_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no model\.safetensors"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match="folder without a model"):
        open_checkpoint(folder)
    with pytest.raises(FormatError, match="no such file or folder"):
        open_checkpoint(folder / "model.gguf")
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(UnsupportedError, match="not a GGUF file"):
        open_checkpoint(folder / "notes.txt")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="pass the folder"):
        open_checkpoint(folder / "config.json")


def test_gguf_files_are_known_by_content_and_alone_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(tiny_model().build())
    assert isinstance(open_checkpoint(tmp_path / "blob"), GGUFCheckpoint)
    (tmp_path / "blob").rename(tmp_path / "model.gguf")
    assert isinstance(open_checkpoint(tmp_path), GGUFCheckpoint)
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(open_checkpoint(tmp_path), GGUFCheckpoint)


def test_opening_a_local_model_does_not_import_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    open_checkpoint(folder)
