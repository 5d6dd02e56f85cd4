"""How much memory this process may still take, what its libraries take, and the most it ever took."""

from pathlib import Path

from strop.machine.cgroup import limits

_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def available_bytes(root: Path = Path("/")) -> int:
    """The lesser of what the machine has free (MemAvailable) and what the container's limit leaves.

    Page cache charged to a container counts as free: the kernel drops it first. Files are read below `root`.
    """
    free = _kib_field(root / "proc/meminfo", "MemAvailable")
    left = [room for room in (_room_bytes(directory) for directory in limits("memory", root)) if room is not None]
    return max(0, min([free if free is not None else _UNLIMITED_BYTES, *left]))


def library_bytes(root: Path = Path("/")) -> int:
    """What of the shared libraries is in memory for this process; 0 where the system does not say.

    The same libraries take a third more where their files were just written, in larger pages.
    """
    total, is_library = 0, False
    try:
        with (root / "proc/self/smaps").open() as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name == "Rss":
                    total += int(value.split()[0]) * 1024 if is_library else 0
                elif " " in name:  # `55d0-55d1 r-xp 0000 08:01 12  /usr/lib/libc.so.6`
                    is_library = ".so" in line.rpartition("/")[2]
    except (OSError, ValueError, IndexError):
        return 0
    return total


def peak_rss_bytes(root: Path = Path("/")) -> int:
    """The most physical memory this process held at once (VmHWM); 0 where the system does not say."""
    return _kib_field(root / "proc/self/status", "VmHWM") or 0


def _room_bytes(directory: Path) -> int | None:
    """Bytes one cgroup may still take, or None without a limit."""
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((directory / limit_name).read_text())
            usage = int((directory / usage_name).read_text())
        except (OSError, ValueError):  # "max" is not a number: no limit
            continue
        if limit < _UNLIMITED_BYTES:
            return limit - max(0, usage - _stat_field(directory / "memory.stat", cache_name))
    return None


def _stat_field(path: Path, name: str) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0


def _kib_field(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
