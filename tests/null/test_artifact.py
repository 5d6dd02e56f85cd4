"""The artifact: canonical values survive, any change to a file is noticed, writing is all or nothing."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_gguf import random_blocks, tiny_model

from strop.core.errors import CapacityError, FormatError, UnsupportedError
from strop.formats import artifact
from strop.formats.artifact import ArtifactCheckpoint, write_artifact
from strop.formats.checkpoint import open_checkpoint
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.k_quants import SUPER_BLOCK_FORMATS, decode_super_blocks
from strop.formats.values import BLOCK_FORMATS, GroupQuantized, TensorValue, TwoLevelScale, decode_blocks
from strop.models.reader import ParameterReader, load_spec, spec_to_json

VALUES: dict[str, TensorValue] = {
    "single": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(4, np.float16),
    "brain": np.full((2, 2), 1.5, ml_dtypes.bfloat16),
    **{name: decode_blocks(name, random_blocks(name, 6, 64), (6, 64)) for name in BLOCK_FORMATS},
    "zeros": GroupQuantized(
        np.arange(128, dtype=np.uint8).reshape(2, 64) % 16,
        np.ones((2, 2), np.float16),
        None,
        np.array([[0, 15], [7, 8]], np.uint8),
        4,
    ),
    **{name: decode_super_blocks(name, random_blocks(name, 3, 512), (3, 512)) for name in SUPER_BLOCK_FORMATS},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    write_artifact(tmp_path / "model", {"a": 1}, VALUES.items(), files=files, receipt={"kl": 0.1})
    return tmp_path / "model"


def assert_same(left: TensorValue, right: TensorValue) -> None:
    if not isinstance(left, GroupQuantized):
        assert isinstance(right, np.ndarray)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
        return
    assert isinstance(right, GroupQuantized)
    assert (left.bits, left.group_len) == (right.bits, right.group_len)
    np.testing.assert_array_equal(left.zero, right.zero)
    np.testing.assert_array_equal(left.codes, right.codes)
    for one, other in ((left.scale, right.scale), (left.offset, right.offset)):
        assert type(one) is type(other)
        if isinstance(one, TwoLevelScale) and isinstance(other, TwoLevelScale):
            assert one.local.dtype == other.local.dtype
            np.testing.assert_array_equal(one.local, other.local)
            np.testing.assert_array_equal(one.super_scale, other.super_scale)
        else:
            np.testing.assert_array_equal(one, other)


def check_values(checkpoint: ArtifactCheckpoint) -> None:
    assert set(checkpoint.tensors) == set(VALUES)
    for name, value in VALUES.items():
        assert checkpoint.tensors[name].shape == value.shape
        assert_same(checkpoint.read(name), value)


def test_values_survive_exactly(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, ArtifactCheckpoint)
    check_values(checkpoint)
    checkpoint.verify()
    assert (checkpoint.spec, checkpoint.receipt, checkpoint.provenance) == ({"a": 1}, {"kl": 0.1}, None)
    assert set(checkpoint.files()) == {"tokenizer.json", "chat_template.jinja"}
    assert checkpoint.files()["tokenizer.json"].read_bytes() == b"{}"
    assert checkpoint.tensors["Q4_0"].num_bytes == 6 * 64 // 2 + 6 * 2 * 2
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    write_artifact(tmp_path / "model", {}, VALUES.items(), shard_bytes=300)
    assert (tmp_path / "model" / "weights-2.safetensors").is_file()
    check_values(ArtifactCheckpoint(tmp_path / "model"))


def test_a_whole_model_goes_through(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(tiny_model().build())
    source = GGUFCheckpoint(tmp_path / "model.gguf")
    spec = load_spec(source)
    reader = ParameterReader(source, spec)
    write_artifact(tmp_path / "artifact", spec_to_json(spec), reader.read_all())
    copy = ArtifactCheckpoint(tmp_path / "artifact")
    assert load_spec(copy) == spec
    copied = ParameterReader(copy, load_spec(copy))
    for path, value in reader.read_all():
        assert_same(copied.read(path), value)


def test_writing_is_all_or_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="exists already"):
        write_artifact(folder, {}, VALUES.items())

    def failing() -> Iterator[tuple[str, TensorValue]]:
        yield from VALUES.items()
        raise FormatError("NaN in the last tensor")

    with pytest.raises(FormatError):
        write_artifact(tmp_path / "other", {}, failing())

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(CapacityError, match=r"No space left.*bytes free.*make room"):
        write_artifact(tmp_path / "other", {}, VALUES.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_really_full_disk_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(CapacityError, match=r"No space left.*bytes free.*make room"):
            write_artifact(disk / "model", {}, [("x", np.ones(1 << 20, np.float32))])
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("name", ["../tokenizer.json", "strop.json", "more.safetensors"])
def test_files_that_would_leave_or_overwrite_the_artifact_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file"):
        write_artifact(tmp_path / "model", {}, [], files={name: b""})


def test_changed_files_are_noticed(folder: Path) -> None:
    first = ArtifactCheckpoint(folder).source_hash()
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for method in ("verify", "source_hash"):
        with pytest.raises(FormatError, match=r"weights\.safetensors.*SHA-256"):
            getattr(ArtifactCheckpoint(folder), method)()
    content[-1] ^= 1
    weights.write_bytes(content)
    assert ArtifactCheckpoint(folder).source_hash() == first


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "strop.json").read_text())
        change(manifest)
        (folder / "strop.json").write_text(json.dumps(manifest))

    return damage


def set_entry(name: str, key: str, value: object) -> Callable[[Path], None]:
    return edit(lambda manifest: manifest["tensors"][name].update({key: value}))


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "weights.safetensors", (folder / "weights.safetensors").stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate_weights, "not a whole safetensors file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"'tokenizer.json'.*missing"),
        (lambda folder: (folder / "strop.json").write_text("{"), "not valid JSON"),
        (edit(lambda manifest: manifest.pop("spec")), "no object 'spec'"),
        (edit(lambda manifest: manifest.update(tensors=[])), "no object 'tensors'"),
        (edit(lambda manifest: manifest["sha256"].update({"../x": "0"})), r"'\.\./x'"),
        (edit(lambda manifest: manifest["tensors"].update({"x": 3})), "bad entry for the tensor 'x'"),
        (set_entry("single", "shape", [3, 2]), r"'single'.*\(2, 3\)"),
        (set_entry("single", "format", "F64"), "'single'.*F64"),
        (set_entry("single", "file", "elsewhere.safetensors"), r"'single'.*elsewhere"),
        (set_entry("Q4_0", "shape", [6, 128]), "'Q4_0'"),
        (set_entry("Q4_0", "shape", [6, 33]), "whole groups"),
        (set_entry("Q4_0", "bits", 7), "bits=7"),
        (set_entry("Q4_0", "bits", 3), "'Q4_0'"),
        (set_entry("Q4_0", "group_len", 48), "group_len=48"),
        (set_entry("Q4_0", "two_level", {"scale": "I8"}), "groups of 256"),
        (set_entry("Q6_K", "two_level", {}), "'Q6_K'"),
        (set_entry("Q6_K", "two_level", {"scale": "U8"}), "'Q6_K'.*U8"),
        (set_entry("Q6_K", "two_level", {"scale": "F64"}), "two_level"),
        (set_entry("Q6_K", "two_level", ["scale"]), "'Q6_K'"),
        (set_entry("Q6_K", "group_len", 32), "'Q6_K'"),
        (set_entry("Q4_0", "zero", 16), "zero=16"),
        (set_entry("Q4_0", "offset", True), "'Q4_0'"),
        (set_entry("Q4_0", "bits", 8), "'Q4_0'"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], named: str) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=named):
        ArtifactCheckpoint(folder)


def test_codes_beyond_their_bits_are_refused(folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    weights["Q5_0.codes"][0, 0] = 32
    save_file(weights, folder / "weights.safetensors")
    with pytest.raises(FormatError, match="'Q5_0' has codes above 5 bits"):
        ArtifactCheckpoint(folder).read("Q5_0")


def test_other_versions_are_refused(folder: Path) -> None:
    edit(lambda manifest: manifest.update(version=2))(folder)
    with pytest.raises(UnsupportedError, match="artifact version 2; version 1 is read"):
        ArtifactCheckpoint(folder)
