"""Split GGUF files: any part opens the whole set, and a set that is not whole is refused by name."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import RawGGUF, RawTensor, split_parts, tiny_model, value, write_parts

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.checkpoint import open_checkpoint
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.values import dense
from strop.models.reader import ParameterReader, load_spec


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def parts() -> list[RawGGUF]:
    return split_parts(tiny_model(), 3)


def test_any_part_opens_the_whole_set(tmp_path: Path, parts: list[RawGGUF]) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model.gguf").write_bytes(tiny_model().build())
    whole = GGUFCheckpoint(tmp_path / "whole" / "model.gguf")
    paths = write_parts(tmp_path, parts)
    hashes = set()
    for path in paths:
        checkpoint = GGUFCheckpoint(path)
        assert checkpoint.path == path
        assert checkpoint.tensors == whole.tensors
        assert checkpoint.metadata["general.architecture"] == "llama"
        for name in whole.tensors:
            np.testing.assert_array_equal(dense(checkpoint.read(name)), dense(whole.read(name)))
        assert load_spec(checkpoint) == load_spec(whole)
        ParameterReader(checkpoint, load_spec(checkpoint))
        hashes.add(checkpoint.source_hash())
    assert len(hashes) == 1
    content = bytearray(paths[2].read_bytes())
    content[-40] ^= 1
    paths[2].write_bytes(content)
    assert GGUFCheckpoint(paths[0]).source_hash() not in hashes


def test_what_the_gguf_package_splits_is_read(tmp_path: Path) -> None:
    weights = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", weights + i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    checkpoint = GGUFCheckpoint(tmp_path / "model-00002-of-00003.gguf")
    assert checkpoint.metadata["general.architecture"] == "llama"
    for i in range(5):
        np.testing.assert_array_equal(checkpoint.read(f"t{i}"), weights + i)


def test_a_folder_with_one_set_is_one_model(tmp_path: Path, parts: list[RawGGUF]) -> None:
    write_parts(tmp_path, parts)
    assert len(open_checkpoint(tmp_path).tensors) == len(tiny_model().tensors)
    write_parts(tmp_path, parts, "other")
    with pytest.raises(UnsupportedError, match=r"6 GGUF files.*path of one"):
        open_checkpoint(tmp_path)


def test_a_set_of_one_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(split_parts(tiny_model(), 1)[0].build())
    assert len(GGUFCheckpoint(tmp_path / "model.gguf").tensors) == len(tiny_model().tensors)


def test_half_a_set_names_what_is_missing(tmp_path: Path, parts: list[RawGGUF]) -> None:
    paths = write_parts(tmp_path, parts)
    paths[0].unlink()
    for opened in (paths[1], tmp_path):
        with pytest.raises(FormatError, match=r"one of 3 parts, and 1 are not beside it: model-00001-of-00003\.gguf;"):
            open_checkpoint(opened)
    paths[2].unlink()
    with pytest.raises(FormatError, match=r"2 are not.*model-00001-of-00003\.gguf, model-00003-of-00003\.gguf;"):
        GGUFCheckpoint(paths[1])
    paths[2].mkdir()
    with pytest.raises(FormatError, match="2 are not"):
        GGUFCheckpoint(paths[1])


def test_a_list_of_missing_parts_stays_short(tmp_path: Path) -> None:
    keys = [("split.no", value(0)), ("split.count", value(65535)), ("split.tensors.count", value(0))]
    path = tmp_path / "model-00001-of-65535.gguf"
    path.write_bytes(RawGGUF(keys).build())
    with pytest.raises(FormatError, match=r"65534 are not.*-00009-of-65535\.gguf, \.\.\.;"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    "name",
    [
        "model.gguf",
        "model-00002-of-00003.gguf",
        "model-00001-of-00004.gguf",
        "model-1-of-3.gguf",
        "model-00001-of-00003.gguf.part",
    ],
)
def test_a_name_that_disagrees_with_its_keys_is_refused(tmp_path: Path, parts: list[RawGGUF], name: str) -> None:
    write_parts(tmp_path, parts)[0].rename(tmp_path / name)
    with pytest.raises(FormatError, match=r"split\.no=0 and split\.count=3.*-00001-of-00003\.gguf"):
        GGUFCheckpoint(tmp_path / name)


def with_key(part: RawGGUF, key: str, raw: bytes | None) -> RawGGUF:
    entries = [entry for entry in part.metadata if entry[0] != key]
    return RawGGUF(entries if raw is None else [*entries, (key, raw)], part.tensors)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda part: with_key(part, "split.no", value(0)), "split.no=0, expected 1"),
        (lambda part: with_key(part, "split.no", value("1")), "split.no='1'"),
        (lambda part: with_key(part, "split.no", None), "split.no=None"),
        (lambda part: with_key(part, "split.count", value(4)), "split.count=4, expected 3"),
        (lambda part: with_key(part, "split.count", None), "split.count=None"),
        (lambda part: with_key(part, "split.count", value(True)), "split.count=True"),
        (lambda part: with_key(part, "split.count", value([3])), r"split.count=\[3\]"),
        (lambda part: with_key(part, "split.tensors.count", value(7)), r"split.tensors.count=7, expected 20"),
        (lambda part: with_key(part, "split.tensors.count", None), "split.tensors.count=None"),
        (lambda part: with_key(part, "split.tensors.count", b"\5\0\0\0\xff\xff\xff\xff"), "split.tensors.count=-1"),
        (lambda part: RawGGUF(part.metadata, part.tensors[:-1]), "split.tensors.count=20, expected 19"),
        (lambda part: RawGGUF(part.metadata, [*part.tensors, part.tensors[0]]), "appears twice"),
        (lambda part: RawGGUF(part.metadata, part.tensors, num_tensors=2**62), "claims 4611686018427387904 tensors"),
        (lambda part: RawGGUF(part.metadata, part.tensors, num_entries=2**62), "metadata entries"),
        (lambda part: RawGGUF(part.metadata, [RawTensor("x", (2**40, 32), 8, b"")]), "cannot hold"),
        (lambda part: RawGGUF(part.metadata, part.tensors, magic=b"PK\3\4"), "not a GGUF file"),
    ],
)
@pytest.mark.parametrize("opened", [0, 2])
def test_a_part_that_lies_is_refused(
    tmp_path: Path, parts: list[RawGGUF], damage: Callable[[RawGGUF], RawGGUF], cause: str, opened: int
) -> None:
    parts[1] = damage(parts[1])
    paths = write_parts(tmp_path, parts)
    with pytest.raises(FormatError, match=cause):
        GGUFCheckpoint(paths[opened])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path, parts: list[RawGGUF]) -> None:
    twice = [*parts[1].tensors[:-1], parts[0].tensors[0]]
    paths = write_parts(tmp_path, [parts[0], RawGGUF(parts[1].metadata, twice), parts[2]])
    name = parts[0].tensors[0].name
    with pytest.raises(FormatError, match=f"00002-of-00003.gguf: the tensor '{name}' is also in model-00001-of"):
        GGUFCheckpoint(paths[1])


def test_a_set_that_promises_more_tensors_than_it_has_is_refused(tmp_path: Path) -> None:
    parts = [with_key(part, "split.tensors.count", value(21)) for part in split_parts(tiny_model(), 2)]
    with pytest.raises(FormatError, match=r"split.tensors.count=21, expected 20"):
        GGUFCheckpoint(write_parts(tmp_path, parts)[1])


@pytest.mark.parametrize("cut", [0, 10, 100, -100])
def test_a_truncated_part_is_refused(tmp_path: Path, parts: list[RawGGUF], cut: int) -> None:
    paths = write_parts(tmp_path, parts)
    paths[1].write_bytes(paths[1].read_bytes()[:cut])
    with pytest.raises(FormatError, match="00002-of-00003"):
        GGUFCheckpoint(paths[0])


@pytest.mark.parametrize(("key", "raw"), [("split.count", value("3")), ("split.count", value(-1.0))])
def test_a_lone_file_with_a_count_that_is_no_number(tmp_path: Path, key: str, raw: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(RawGGUF([(key, raw)]).build())
    with pytest.raises(FormatError, match=r"split\.count="):
        GGUFCheckpoint(tmp_path / "model.gguf")
