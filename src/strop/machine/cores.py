"""How many threads this process may usefully run: affinity, container quotas, one per physical core; who else runs."""

import os
import time
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from strop.core.errors import StropError
from strop.machine.cgroup import limits


def usable_cores() -> int:
    """Threads to compute with, at least 1.

    `STROP_THREADS` decides when set. Otherwise the physical cores in the affinity mask (hardware threads of one core
    share its vector units), capped by the processor quota of the container (cgroup v1 or v2), rounded down.

    Raises:
        StropError: `STROP_THREADS` is not a positive integer.
    """
    if chosen := os.environ.get("STROP_THREADS", "").strip():
        if not chosen.isdecimal() or int(chosen) < 1:
            raise StropError(
                f"STROP_THREADS={chosen!r} is not a number of threads: set an integer of 1 or more, or unset it"
            )
        return int(chosen)
    return count_cores(_allowed())


def count_cores(allowed: AbstractSet[int], root: Path = Path("/")) -> int:
    """Physical cores among the logical processors `allowed`, capped by the quota; files are read below `root`."""
    num_cores = len({_core_of(processor, root) for processor in allowed})
    quotas = [quota for quota in (_quota(directory) for directory in limits("cpu", root)) if quota is not None]
    return max(1, min([num_cores, *(int(quota) for quota in quotas)]))


class OtherWork:
    """Who else computes on this process's processors from now on: other processes and, where it shows, other guests."""

    def __init__(self, allowed: AbstractSet[int] | None = None, root: Path = Path("/")) -> None:
        self._allowed, self._root = _allowed() if allowed is None else allowed, root
        self._begin, self._own_begin_s = self._read(), time.process_time()

    def share(self) -> float:
        """Of the processors' time since then, that others took: 0 to 1; 0 where the system does not say."""
        end, own_s = self._read(), time.process_time() - self._own_begin_s
        busy, total = end[0] - self._begin[0], end[1] - self._begin[1]
        return min(1.0, max(0.0, busy - own_s * os.sysconf("SC_CLK_TCK")) / total) if total > 0 else 0.0

    def _read(self) -> tuple[int, int]:
        """Busy and all ticks of these processors."""
        busy = total = 0
        with suppress(OSError, ValueError):
            for line in (self._root / "proc/stat").read_text().splitlines():
                name, *fields = line.split()
                if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in self._allowed:
                    ticks = [int(field) for field in fields[:8]]  # what follows is counted in these
                    busy += sum(ticks) - sum(ticks[3:5])  # idle, and waiting for a disk
                    total += sum(ticks)
        return busy, total


def _allowed() -> AbstractSet[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _core_of(processor: int, root: Path) -> tuple[str, str]:
    """(package, core) of a logical processor; a machine that does not say is taken to have no hardware threads."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    try:
        package, core = ((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return ("", f"processor {processor}")
    return (package, core)


def _quota(directory: Path) -> float | None:
    """Processors' worth of time one cgroup may use, or None."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((directory / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return float(quota) / float(period) if float(quota) > 0 and float(period) > 0 else None
    except (OSError, ValueError):  # "max" is not a number: no limit
        return None
