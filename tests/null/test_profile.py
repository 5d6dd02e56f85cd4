"""The figures of a machine: lines between points, and a file that is believed only when it is whole."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_up_profile import MACHINE, profile

from strop.core.errors import FormatError
from strop.machine.profile import Curve, profile_path, read_profile, this_machine, write_profile


def test_lines_between_points() -> None:
    curve = Curve((1.0, 3.0, 4.0), (10.0, 30.0, 20.0))
    assert [curve.at(x) for x in (0.5, 1, 2, 3, 3.5, 4, 9)] == [10, 10, 20, 30, 25, 20, 20]
    assert [curve.growing(x) for x in (2, 4, 8)] == [20, 20, 40]
    assert Curve((2.0,), (5.0,)).at(7) == 5


@pytest.mark.parametrize(
    ("x", "y"),
    [((), ()), ((1.0,), (1.0, 2.0)), ((2.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 1.0)), ((0.0,), (1.0,)),
     ((1.0,), (-1.0,)), ((1.0,), (float("nan"),)), ((1.0,), (float("inf"),)), (tuple(range(1, 400)),) * 2],
)  # fmt: skip
def test_a_curve_that_cannot_be(x: tuple[float, ...], y: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"points|point"):
        Curve(x, y)


def test_small_steps_run_from_the_caches() -> None:
    found = profile(read_bytes_per_s=Curve((2.0**20, 2.0**24, 2.0**28), (100e9, 100e9, 25e9)))
    assert found.coldness(1 << 20) == found.coldness(1 << 24) == found.coldness(5) == 0
    assert found.coldness(1 << 28) == found.coldness(1 << 40) == 1
    assert 0 < found.coldness(1 << 26) < 1
    assert profile(read_bytes_per_s=Curve((2.0**20, 2.0**28), (30e9, 30e9))).coldness(1 << 20) == 1


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_profile(tmp_path, MACHINE) is None
    path = write_profile(tmp_path, profile())
    assert read_profile(tmp_path, MACHINE) == profile()
    assert read_profile(tmp_path, msgspec.structs.replace(MACHINE, num_threads=3)) is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert write_profile(tmp_path, profile(call_s=5e-6)) == path
    found = read_profile(tmp_path, MACHINE)
    assert found is not None and found.call_s == 5e-6


def test_figures_of_another_version_or_machine_do_not_count(tmp_path: Path) -> None:
    path = write_profile(tmp_path, profile())
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"version": 99, "more": 1}))
    assert read_profile(tmp_path, MACHINE) is None
    path.write_text(json.dumps(stored | {"machine": stored["machine"] | {"isa": "amx"}}))
    assert read_profile(tmp_path, MACHINE) is None


@dataclass(frozen=True)
class Damage:
    key: str
    value: Any


@pytest.mark.parametrize(
    "damage",
    [
        Damage("call_s", -1e-6), Damage("call_s", "fast"), Damage("surprise", 1), Damage("linear", {}),
        Damage("linear", {"q4": []}), Damage("attention", {"int8": []}), Damage("embed_s", {"q4": -1}),
        Damage("step_s", {"x": [1.0], "y": []}), Damage("step_s", {"x": [2.0, 1.0], "y": [1.0, 1.0]}),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_named(damage: Damage, tmp_path: Path) -> None:
    path = write_profile(tmp_path, profile())
    path.write_text(json.dumps(json.loads(path.read_text()) | {damage.key: damage.value}))
    with pytest.raises(FormatError, match=r"is no profile of a machine .*delete it and calibrate again"):
        read_profile(tmp_path, MACHINE)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b'{"version": NaN}', b" " * (2 << 20), b'{"a":' + b"[" * 500_000]
)
def test_no_profile_at_all(content: bytes, tmp_path: Path) -> None:
    path = profile_path(tmp_path, MACHINE)
    path.parent.mkdir()
    path.write_bytes(content)
    if content == b"{}":
        assert read_profile(tmp_path, MACHINE) is None
        return
    with pytest.raises(FormatError, match="calibrate again"):
        read_profile(tmp_path, MACHINE)


def test_a_machine_is_known_by_its_library(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"one")
    first = this_machine("avx2", 4, library)
    library.write_bytes(b"two")
    second = this_machine("avx2", 4, library)
    assert first.cpu == second.cpu != ""
    assert first.library != second.library
    assert profile_path(tmp_path, first) != profile_path(tmp_path, second)
