"""The pack cache under concurrency, crashes, damage and full disks; the processes in these tests are real."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from strop.core.errors import CapacityError
from strop.formats import pack_cache
from strop.formats.pack_cache import KEEP_UNUSED_S, PackCache, PackFile, PackWriter, cache_directory

BIG = np.arange(3000, dtype=np.float32).reshape(30, 100)


def build_sample(writer: PackWriter) -> None:
    writer.add("small", np.array([1, 2, 3], np.int8))
    writer.add("big", BIG)
    view = writer.reserve("streamed", (5, 1000), "bfloat16")
    view[:] = 2.5
    writer.add("empty", np.zeros((0, 4), np.float16))


def refuse_to_build(writer: PackWriter) -> None:
    raise AssertionError("the pack was built a second time")


def check_sample(pack: PackFile) -> None:
    assert set(pack) == {"small", "big", "streamed", "empty"}
    np.testing.assert_array_equal(pack["small"], [1, 2, 3])
    np.testing.assert_array_equal(pack["big"], BIG)
    assert pack["streamed"].dtype == ml_dtypes.bfloat16
    assert pack["streamed"].shape == (5, 1000)
    assert (pack["streamed"] == 2.5).all()
    assert pack["empty"].shape == (0, 4)


def file_names(directory: Path, suffix: str) -> list[str]:
    return [path.name for path in directory.glob(f"*{suffix}")]


def test_built_once_then_mapped(tmp_path: Path) -> None:
    check_sample(PackCache(tmp_path).open_or_build("a", build_sample))
    pack = PackCache(tmp_path).open_or_build("a", refuse_to_build)
    check_sample(pack)
    assert pack.num_bytes == next(tmp_path.glob("*.pack")).stat().st_size
    for name in pack:
        assert not pack[name].flags.writeable
        assert pack[name].ctypes.data % (4096 if pack[name].nbytes >= 4096 else 64) == 0 or pack[name].size == 0
    assert file_names(tmp_path, ".part") == []


def test_views_outlive_the_pack_and_its_file(tmp_path: Path) -> None:
    view = PackCache(tmp_path).open_or_build("a", build_sample)["big"]
    next(tmp_path.glob("*.pack")).unlink()
    np.testing.assert_array_equal(view, BIG)


def test_keys_have_packs_of_their_own(tmp_path: Path) -> None:
    cache = PackCache(tmp_path)
    cache.open_or_build("a", lambda writer: writer.add("x", np.zeros(1, np.uint8)))
    other = cache.open_or_build("b", lambda writer: writer.add("x", np.ones(1, np.uint8)))
    assert other["x"][0] == 1


def test_packs_not_opened_for_long_make_room_for_new_ones(tmp_path: Path) -> None:
    cache = PackCache(tmp_path)
    paths: dict[str, Path] = {}
    packs: dict[str, PackFile] = {}
    for key in ("unused", "opened", "young"):
        packs[key] = cache.open_or_build(key, build_sample)
        (paths[key],) = set(tmp_path.glob("*.pack")) - set(paths.values())
    for key, path in paths.items():
        opened_s = time.time() - KEEP_UNUSED_S + (60 if key == "young" else -60)
        os.utime(path, (opened_s, opened_s))
    cache.open_or_build("opened", refuse_to_build)
    assert all(path.exists() for path in paths.values())
    cache.open_or_build("new", build_sample)
    assert {key for key, path in paths.items() if path.exists()} == {"opened", "young"}
    check_sample(packs["unused"])
    check_sample(cache.open_or_build("unused", build_sample))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def flip(position: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 0x55
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage", [truncate, cut_to_nothing, flip(0), flip(8), flip(16), flip(24), flip(40), flip(-1), flip(-40)]
)
def test_a_damaged_pack_is_rebuilt(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    PackCache(tmp_path).open_or_build("a", build_sample)
    damage(next(tmp_path.glob("*.pack")))
    check_sample(PackCache(tmp_path).open_or_build("a", build_sample))
    check_sample(PackCache(tmp_path).open_or_build("a", refuse_to_build))


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        PackCache(tmp_path).open_or_build("a", refuse_to_build)
    assert file_names(tmp_path, ".part") + file_names(tmp_path, ".pack") == []
    check_sample(PackCache(tmp_path).open_or_build("a", build_sample))


def test_what_a_pack_cannot_hold_is_refused(tmp_path: Path) -> None:
    def duplicate(writer: PackWriter) -> None:
        writer.add("x", BIG)
        writer.add("x", BIG)

    with pytest.raises(ValueError, match="already"):
        PackCache(tmp_path).open_or_build("a", duplicate)
    for bad in (np.array(["text"]), np.array([object()]), BIG.astype(">f4")):
        with pytest.raises(ValueError, match="dtype"):
            PackCache(tmp_path).open_or_build("a", lambda writer, bad=bad: writer.add("x", bad))  # type: ignore[misc]


@pytest.mark.parametrize("expected_bytes", [0, 1 << 20])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_bytes: int, code: int) -> None:
    def full(file_descriptor: int, start: int, num_bytes: int) -> None:
        if start + num_bytes > 8192:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=r"needs \d+ more bytes.*\d+ free.*STROP_CACHE") as caught:
        PackCache(tmp_path).open_or_build("a", build_sample, expected_bytes=expected_bytes)
    assert not expected_bytes or str(4096 + expected_bytes) in str(caught.value)
    assert file_names(tmp_path, ".part") + file_names(tmp_path, ".pack") == []


def test_a_really_full_disk_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(CapacityError, match="STROP_CACHE"):
            PackCache(disk).open_or_build("a", lambda writer: writer.add("x", np.ones(1 << 20, np.uint8)))
        with pytest.raises(CapacityError, match="STROP_CACHE"):
            PackCache(disk).open_or_build("a", lambda writer: writer.reserve("x", (1 << 20,), np.uint8).fill(1))
        assert file_names(disk, ".part") + file_names(disk, ".pack") == []
        check_sample(PackCache(disk).open_or_build("a", build_sample))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_without_fallocate_space_is_claimed_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file_descriptor: int, start: int, num_bytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    check_sample(PackCache(tmp_path).open_or_build("a", build_sample))


def test_an_unwritable_directory_means_packing_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        check_sample(PackCache(tmp_path / "file" / "below").open_or_build("a", build_sample))
    assert "STROP_CACHE" in caplog.text


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", "/somewhere/else")
    assert cache_directory() == Path("/somewhere/else")
    monkeypatch.delenv("STROP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/strop")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "strop"


def start(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def expect_line(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line + b"\n"


PACK_WHEN_TOLD = textwrap.dedent("""
    import sys, time
    import numpy as np
    from strop.formats.pack_cache import PackCache

    def build(writer):
        print("built", flush=True)
        time.sleep(0.3)  # long enough for the others to arrive
        writer.add("x", np.arange(5000))

    print("ready", flush=True)
    sys.stdin.readline()
    pack = PackCache(sys.argv[1]).open_or_build("a", build)
    assert (pack["x"] == np.arange(5000)).all()
    print("done", flush=True)
""")


def test_processes_that_pack_at_once_do_the_work_once(tmp_path: Path) -> None:
    processes = [start(PACK_WHEN_TOLD, tmp_path) for _ in range(3)]
    for process in processes:
        expect_line(process, b"ready")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    answers = sorted(process.communicate()[0] for process in processes)
    assert answers == [b"built\ndone\n", b"done\n", b"done\n"]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert file_names(tmp_path, ".part") == []


HANG_WHILE_PACKING = textwrap.dedent("""
    import sys, time
    import numpy as np
    from strop.formats.pack_cache import PackCache

    def build(writer):
        writer.reserve("x", (100_000,), np.uint8)[:] = 7
        print("packing", flush=True)
        time.sleep(600)

    PackCache(sys.argv[1]).open_or_build(sys.argv[2], build)
""")


def start_packing(directory: Path, key: str) -> subprocess.Popen[bytes]:
    process = start(HANG_WHILE_PACKING, directory, key)
    expect_line(process, b"packing")
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    with process:
        process.send_signal(signal.SIGKILL)


def test_killed_while_packing(tmp_path: Path) -> None:
    kill(start_packing(tmp_path, "a"))
    assert len(file_names(tmp_path, ".part")) == 1
    assert file_names(tmp_path, ".pack") == []
    check_sample(PackCache(tmp_path).open_or_build("a", build_sample))
    assert file_names(tmp_path, ".part") == []


def test_orphans_of_other_keys_are_cleaned_but_not_the_work_of_the_living(tmp_path: Path) -> None:
    kill(start_packing(tmp_path, "dead"))
    living = start_packing(tmp_path, "living")
    try:
        check_sample(PackCache(tmp_path).open_or_build("a", build_sample))
        assert len(file_names(tmp_path, ".part")) == 1
    finally:
        kill(living)
    check_sample(PackCache(tmp_path).open_or_build("living", build_sample))
    assert file_names(tmp_path, ".part") == []


def test_packing_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reserved view that is dropped is unmapped: packing never holds the whole model."""
    maps = []
    real_mmap = pack_cache.mmap.mmap

    class CountedMap(real_mmap):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object, **kwargs: object) -> None:
            maps.append(1)

        def __del__(self) -> None:
            maps.pop()

    def build(writer: PackWriter) -> None:
        for i in range(4):
            writer.reserve(f"x{i}", (10_000,), np.uint8)[:] = i
            assert len(maps) == 0

    monkeypatch.setattr(pack_cache.mmap, "mmap", CountedMap)
    pack = PackCache(tmp_path).open_or_build("a", build)
    assert len(maps) == 1
    assert (pack["x3"] == 3).all()
