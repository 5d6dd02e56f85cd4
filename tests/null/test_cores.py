"""Cores and memory under affinity, hardware threads and container limits, on made-up system trees."""

from pathlib import Path

import pytest

from strop.core.errors import StropError
from strop.machine.cores import OtherWork, count_cores, usable_cores
from strop.machine.memory import available_bytes, library_bytes, peak_rss_bytes

MIB = 2**20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def topology(cores: dict[int, tuple[int, int]]) -> dict[str, str]:
    files = {}
    for processor, (package, core) in cores.items():
        where = f"sys/devices/system/cpu/cpu{processor}/topology/"
        files |= {where + "physical_package_id": f"{package}\n", where + "core_id": f"{core}\n"}
    return files


EIGHT_THREADS = topology({i: (i // 2 % 2, i // 4) for i in range(8)})  # two packages of two cores of two threads


def test_hardware_threads_of_one_core_count_once(tmp_path):
    write(tmp_path, EIGHT_THREADS)
    assert count_cores(set(range(8)), tmp_path) == 4
    assert count_cores({0, 1}, tmp_path) == 1
    assert count_cores({0, 2, 4}, tmp_path) == 3


def test_without_topology_every_processor_counts(tmp_path):
    assert count_cores({0, 1, 5}, tmp_path) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("junk", 4), ("", 4)],
)
def test_quota_v2_rounds_down_but_leaves_one(tmp_path, text, expected):
    write(tmp_path, EIGHT_THREADS | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})
    assert count_cores(set(range(8)), tmp_path) == expected


def test_every_group_above_limits_too(tmp_path):
    groups = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/cpu.max": "100000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "max 1",
    }
    assert count_cores(set(range(8)), write(tmp_path, EIGHT_THREADS | groups)) == 1


def test_quota_v1(tmp_path):
    where = "sys/fs/cgroup/cpu/"
    files = {
        "proc/self/cgroup": "3:cpuacct,cpu:/x\n",
        where + "cpu.cfs_quota_us": "-1",
        where + "cpu.cfs_period_us": "100000",
    }
    inner = {where + "x/cpu.cfs_quota_us": "300000", where + "x/cpu.cfs_period_us": "100000"}
    assert count_cores(set(range(8)), write(tmp_path, EIGHT_THREADS | files)) == 4
    assert count_cores(set(range(8)), write(tmp_path, inner)) == 3


def test_a_path_that_climbs_out_is_ignored(tmp_path):
    files = {"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/cpu.max": "200000 100000"}
    assert count_cores(set(range(8)), write(tmp_path, EIGHT_THREADS | files)) == 2


def test_environment_decides(monkeypatch):
    monkeypatch.setenv("STROP_THREADS", "7")
    assert usable_cores() == 7
    monkeypatch.delenv("STROP_THREADS")
    assert usable_cores() >= 1


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_environment_must_be_a_positive_integer(monkeypatch, value):
    monkeypatch.setenv("STROP_THREADS", value)
    with pytest.raises(StropError, match="STROP_THREADS"):
        usable_cores()


MEMINFO = {"proc/meminfo": "MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:    4096 kB\n"}


def test_available_is_what_the_machine_has_free(tmp_path):
    assert available_bytes(write(tmp_path, MEMINFO)) == 4 * MIB


def test_container_limit_less_usage_without_droppable_cache(tmp_path):
    group = "sys/fs/cgroup/memory."
    files = {
        group + "max": str(3 * MIB),
        group + "current": str(2 * MIB),
        group + "stat": f"anon 5\ninactive_file {MIB}\n",
    }
    assert available_bytes(write(tmp_path, MEMINFO | files)) == 2 * MIB


def test_unlimited_containers_do_not_count(tmp_path):
    v2 = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1"}
    v1 = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
    }
    assert available_bytes(write(tmp_path, MEMINFO | v2 | v1)) == 4 * MIB


def test_usage_above_the_limit_leaves_nothing(tmp_path):
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "4096", "sys/fs/cgroup/memory/memory.usage_in_bytes": "8192"}
    assert available_bytes(write(tmp_path, MEMINFO | files)) == 0


def test_peak_rss(tmp_path):
    assert peak_rss_bytes(write(tmp_path, {"proc/self/status": "VmPeak: 9 kB\nVmHWM:\t   12 kB\n"})) == 12 * 1024
    assert peak_rss_bytes(tmp_path / "nowhere") == 0
    assert peak_rss_bytes() > MIB


def test_other_work_is_what_this_process_did_not_do(tmp_path):
    def stat(*busy: int) -> str:
        lines = [f"cpu{i} {ticks} 0 0 {1000 - ticks} 0 0 0 0 0 0" for i, ticks in enumerate(busy)]
        return "cpu  1 2 3 4\n" + "\n".join(lines) + "\nintr 12 13\n"

    write(tmp_path, {"proc/stat": "cpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n"})
    both, second = OtherWork({0, 1}, tmp_path), OtherWork({1}, tmp_path)
    assert both.share() == 0  # no time has passed
    write(tmp_path, {"proc/stat": stat(900, 300)})
    assert both.share() == pytest.approx(0.6, abs=0.1)
    assert second.share() == pytest.approx(0.3, abs=0.1)


def test_other_work_is_unknown_where_the_system_does_not_say(tmp_path):
    assert OtherWork({0}, tmp_path).share() == 0
    write(tmp_path, {"proc/stat": "cpu0 a b\n"})
    assert OtherWork({0}, tmp_path).share() == 0


def test_libraries_in_memory(tmp_path):
    smaps = """55d0-55d1 r-xp 00000000 08:01 12                 /usr/bin/python3.11
Rss:                 500 kB
7f00-7f01 r-xp 00000000 08:01 13                 /usr/lib/x86_64/libc.so.6
Size:               1000 kB
Rss:                 300 kB
Pss:                 100 kB
7f02-7f03 r--p 00000000 08:01 14                 /some.sock/model.gguf
Rss:                9000 kB
7f04-7f05 rw-p 00000000 00:00 0
Rss:                 700 kB
7f06-7f07 r--p 00001000 08:01 15                 /lib/_jax.cpython-311.so
Rss:                  12 kB
"""
    assert library_bytes(write(tmp_path, {"proc/self/smaps": smaps})) == 312 * 1024
    assert library_bytes(tmp_path / "none") == 0
    assert library_bytes(write(tmp_path, {"proc/self/smaps": "a b\nRss: none\n"})) == 0
