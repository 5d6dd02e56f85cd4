"""`strop models`: both caches listed, prefixes that must fit one, and nothing outside a cache deleted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from strop.core.errors import RequestError, StropError
from strop.formats.cached import CachedModel, cached_models, choose, remove
from strop.formats.pack_cache import PackCache, PackWriter

COMMITS = ("a1" * 20, "b2" * 20)


def pack(directory: Path, key: str, source: str | None) -> None:
    def build(writer: PackWriter) -> None:
        manifest = {} if source is None else {"source": source}
        writer.add("weights", np.zeros(5000, np.uint8))
        writer.add("manifest", np.frombuffer(json.dumps(manifest).encode(), np.uint8))

    PackCache(directory).open_or_build(key, build)


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    directory = tmp_path / "packs"
    pack(directory, "1234-tiles1", "/models/small.gguf")
    pack(directory, "5678-tiles1", "/hub/models--org--name/snapshots/abc")
    pack(directory, "9abc-tiles1", None)
    return directory


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMITS[0])
    for i, commit in enumerate(COMMITS):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, blob in (("config.json", "shared"), ("model.safetensors", f"own{i}")):
            (repo / "blobs" / blob).write_bytes(bytes(100 * (i + 1)) if blob != "shared" else b"{}")
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return tmp_path / "hub"


def test_packs_tell_their_source(packs: Path, tmp_path: Path) -> None:
    found = {model.hash: model for model in cached_models(packs, tmp_path / "none")}
    assert found["1234"].name == "small.gguf" and found["1234"].source == "/models/small.gguf"
    assert found["5678"].name == "org/name"
    assert found["9abc"].source.startswith("unknown")
    assert all(model.kind == "packed" and model.num_bytes > 5000 for model in found.values())


def test_a_damaged_pack_is_listed_and_can_go(packs: Path, tmp_path: Path) -> None:
    (packs / "feed.pack").write_bytes(b"rubbish")
    (model,) = choose(cached_models(packs, tmp_path / "none"), ["feed"])
    assert model.source.startswith("damaged")
    assert remove(model, packs).freed_bytes == 7
    assert not (packs / "feed.pack").exists()


def test_the_last_used_comes_first(packs: Path, hub: Path) -> None:
    times = [model.last_used_s for model in cached_models(packs, hub)]
    assert len(times) == 5 and times == sorted(times, reverse=True)


def model(name: str, digest: str) -> CachedModel:
    return CachedModel("packed", name, "", digest, f"id-{digest}", 1, 0.0, Path(name))


@pytest.mark.parametrize(
    ("prefix", "chosen"), [("alpha", "alpha"), ("alpha-", "alpha-chat"), ("77", "beta"), ("id-77", "beta")]
)
def test_a_prefix_that_fits_one(prefix: str, chosen: str) -> None:
    models = [model("alpha", "1111"), model("alpha-chat", "2222"), model("beta", "7777")]
    assert [found.name for found in choose(models, [prefix, prefix])] == [chosen]


def test_a_whole_name_is_everything_of_that_name() -> None:
    models = [model("org/name", "1111"), model("org/name", "2222"), model("org/name-chat", "3333")]
    assert [found.hash for found in choose(models, ["org/name"])] == ["1111", "2222"]
    assert [found.hash for found in choose(models, ["22", "org/name-"])] == ["2222", "3333"]
    with pytest.raises(RequestError, match=r"fits 3 .*org/name \(packed, 1111\).*whole name"):
        choose(models, ["org/"])


@pytest.mark.parametrize(
    ("prefix", "said"), [("al", "fits 2"), ("zeta", "not cached"), ("", "too short"), ("a", "short")]
)
def test_a_prefix_that_does_not(prefix: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        choose([model("alpha", "1111"), model("alpha-chat", "2222")], [prefix])


def test_removing_a_pack_leaves_the_others(packs: Path, tmp_path: Path) -> None:
    (chosen,) = choose(cached_models(packs, tmp_path / "none"), ["small"])
    removal = remove(chosen, packs)
    assert removal.freed_bytes == chosen.num_bytes and removal.note == ""
    assert {found.hash for found in cached_models(packs, tmp_path / "none")} == {"5678", "9abc"}


_HOLD = """
import fcntl, mmap, sys
file = open(sys.argv[1], "r+b")
{}
print("ready", flush=True)
sys.stdin.read()
"""


def hold(path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HOLD.format(how), str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_pack_that_is_being_made_stays(packs: Path, tmp_path: Path) -> None:
    (chosen,) = choose(cached_models(packs, tmp_path / "none"), ["small"])
    with hold(packs / f"{chosen.id}.lock", "fcntl.flock(file, fcntl.LOCK_EX)") as process:
        removal = remove(chosen, packs)
        process.communicate("")
    assert removal.freed_bytes == 0 and "packing" in removal.note
    assert chosen.path.exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_pack_in_use_goes_and_says_so(packs: Path, tmp_path: Path) -> None:
    (chosen,) = choose(cached_models(packs, tmp_path / "none"), ["small"])
    with hold(chosen.path, "kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)") as process:
        removal = remove(chosen, packs)
        process.communicate("")
    assert str(process.pid) in removal.note
    assert not chosen.path.exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("how", ["kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); file.close()", ""])
def test_a_hub_snapshot_in_use_stays(how: str, hub: Path, tmp_path: Path) -> None:
    """Mapped, or open as a download's file is."""
    (chosen,) = choose(cached_models(tmp_path / "none", hub), [COMMITS[1]])
    with hold(hub / "models--org--name" / "blobs" / "own1", how) as process:
        removal = remove(chosen, tmp_path / "none", hub)
        process.communicate("")
    assert removal.freed_bytes == 0 and str(process.pid) in removal.note
    assert (chosen.path / "model.safetensors").stat().st_size == 200
    assert remove(chosen, tmp_path / "none", hub).freed_bytes == 200


def test_a_hub_snapshot_goes_without_what_another_shares(packs: Path, hub: Path) -> None:
    (chosen,) = choose(cached_models(packs, hub), [COMMITS[1][:6]])
    assert (chosen.kind, chosen.name, chosen.num_bytes) == ("hub", "org/name", 202)
    assert remove(chosen, packs, hub).freed_bytes == 200
    repo = hub / "models--org--name"
    assert sorted(os.listdir(repo / "blobs")) == ["own0", "shared"]
    assert os.listdir(repo / "snapshots") == [COMMITS[0]]


@pytest.mark.parametrize("last", [False, True])
def test_nothing_outside_the_hub_cache_is_deleted(last: bool, hub: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.safetensors"
    precious.write_bytes(b"do not delete")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    repo = hub / "models--org--name"
    (repo / "snapshots" / COMMITS[1] / "extra.safetensors").symlink_to(precious)
    if last:
        (repo / "snapshots" / COMMITS[1] / "folder").symlink_to(outside)
    (chosen,) = choose(cached_models(tmp_path / "none", hub), [COMMITS[1]])
    with pytest.raises(StropError, match="outside"):
        remove(chosen, tmp_path / "none", hub)
    assert precious.read_bytes() == b"do not delete"
    assert (outside / "kept").read_text() == "kept"


def test_a_snapshot_that_is_a_link_elsewhere_is_refused(hub: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    (hub / "models--org--name" / "snapshots" / ("c3" * 20)).symlink_to(elsewhere)
    (chosen,) = choose(cached_models(tmp_path / "none", hub), ["c3c3"])
    with pytest.raises(StropError, match="outside"):
        remove(chosen, tmp_path / "none", hub)
    assert (elsewhere / "config.json").exists()
