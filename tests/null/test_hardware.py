"""Hardware as data: names, counts, files of one's own, and files that are damaged or meant to harm."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.core.errors import FormatError, RequestError
from strop.machine.catalog import HARDWARE, MAX_FILE_BYTES, devices, find_machines, read_device

GOOD = (HARDWARE / "h200.toml").read_text(encoding="utf-8")


def read(directory: Path, text: str | bytes) -> object:
    path = directory / "mine.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_device(path)


def test_the_catalog_has_what_people_ask_for() -> None:
    wanted = {"tpu-v4", "tpu-v5e", "tpu-v5p", "a100-40gb", "a100-80gb", "h100-sxm", "h200", "l4", "rtx-4090"}
    assert wanted | {"xeon-8480", "epyc-9654"} == set(devices())


def test_figures_of_the_paper() -> None:
    device = find_machines("tpu-v4").device
    assert (device.peak("bf16"), device.memory_bytes, device.memory_bytes_per_s) == (275e12, 32 << 30, 1200e9)
    assert device.all_links_bytes_per_s == 270e9
    assert find_machines("h200").device.all_links_bytes_per_s == 450e9


@pytest.mark.parametrize(
    ("text", "name", "num_devices"),
    [
        ("h200", "h200", 1),
        ("h200x8", "h200", 8),
        ("H200x8", "h200", 8),
        ("tpu-v4x64", "tpu-v4", 64),
        ("rtx4090", "rtx-4090", 1),
        ("rtx4090x2", "rtx-4090", 2),
        ("a100", "a100-80gb", 1),
    ],
)
def test_names_and_counts(text: str, name: str, num_devices: int) -> None:
    machines = find_machines(text)
    assert (machines.device.name, machines.num_devices) == (name, num_devices)


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(RequestError, match=r"'h20'; near it are h200") as caught:
        find_machines("h20x8")
    assert "tpu-v4" in str(caught.value) and "file.toml" in str(caught.value)


@pytest.mark.parametrize("text", ["h200x0", "h200x9", "tpu-v5ex257"])
def test_a_count_that_links_do_not_reach(text: str) -> None:
    with pytest.raises(RequestError, match="groups of 1 to"):
        find_machines(text)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert find_machines(str(path)).num_devices == 1
    machines = find_machines(f"{path}x4")
    assert (machines.device.name, machines.num_devices, machines.device.peak("bf16")) == ("mine", 4, 989.4e12)
    with pytest.raises(RequestError, match="cannot read the hardware file"):
        find_machines(str(tmp_path / "none.toml"))


def test_a_type_without_a_peak_is_refused() -> None:
    with pytest.raises(RequestError, match="tpu-v4 has no peak for 'f64'; it has bf16, int8"):
        find_machines("tpu-v4").device.peak("f64")


def test_axes_close_where_every_one_is_a_multiple() -> None:
    device = find_machines("tpu-v4").device
    assert device.axis_closes((4, 4, 4)) and device.axis_closes((8, 4, 4)) and not device.axis_closes((4, 2, 4))
    assert not find_machines("h200").device.axis_closes((8,))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_bytes_per_s = 4800e9", "memory_bandwidth = 4800e9", "unknown key 'memory_bandwidth'; did you mean"),
        ("memory_bytes_per_s = 4800e9", "", "lacks memory_bytes_per_s"),
        ("memory_bytes_per_s = 4800e9", "memory_bytes_per_s = nan", "memory_bytes_per_s=nan is not a number from"),
        ("memory_bytes_per_s = 4800e9", "memory_bytes_per_s = inf", "not a number from"),
        ("memory_bytes_per_s = 4800e9", "memory_bytes_per_s = -1.0", "not a number from"),
        ("memory_bytes_per_s = 4800e9", "memory_bytes_per_s = true", "not a number from"),
        ("memory_bytes_per_s = 4800e9", 'memory_bytes_per_s = "fast"', "not a number from"),
        ("memory_bytes = 141_000_000_000", "memory_bytes = 141.5e9", "memory_bytes=141500000000.0 is not an integer"),
        ("memory_bytes = 141_000_000_000", "memory_bytes = 99999999999999999999", "not an integer from"),
        ('topology = "switch"', 'topology = "hypercube"', "is not one of torus, switch, none"),
        ('topology = "switch"', 'topology = "torus"', "lacks num_torus_axes"),
        ('topology = "switch"', "topology = 3", "is not one of torus, switch, none"),
        ('title = "NVIDIA H200 SXM"', "title = 3", "title=3 is not a str"),
        ('aliases = ["h200-sxm"]', 'aliases = "h200-sxm"', "is not a list"),
        ("[sources]", "usd_per_device_hour = 3.0\n[sources]", "no price_date"),
        ("[sources]", "[other]", "unknown key 'other'"),
        ("memory_bytes_per_s = 4800e9", "memory_bytes_per_s = 4800e9\nmax_devices = 8", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(FormatError, match=message) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert str(caught.value).startswith("mine.toml: ")


def test_a_figure_without_a_source_is_refused(tmp_path: Path) -> None:
    head, sources = GOOD.split("[sources]")
    lines = [line for line in sources.splitlines() if not line.startswith("peak_bf16")]
    with pytest.raises(FormatError, match="peak_bf16_flops_per_s has no source"):
        read(tmp_path, "\n".join([head + "[sources]", *lines]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not TOML"),
        (b"", "lacks title"),
        (b"a = " + b"[" * 30_000, "not TOML"),
        (b"#" * (MAX_FILE_BYTES + 1), "over 65536 bytes"),
    ],
)
def test_hostile_files(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path, content)


@given(cut=st.integers(0, len(GOOD.encode()) - 2))
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    with pytest.raises(FormatError):
        read(tmp_path_factory.mktemp("cut"), GOOD.encode()[:cut])
