"""The pack cache: weights in the layout one instruction set wants, written once, then memory-mapped. Disposable.

One file per key. Layout: a 64-byte preamble, data from byte 4096 on, then a JSON header (names, dtypes, shapes,
offsets, key) whose place, length and SHA-256 the preamble gives. Deleting the directory only costs the next start its
packing. Opening a pack sets its modification time; building one deletes those not opened for `KEEP_UNUSED_S`, such as
packs of models that changed and of older versions of Strop.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from strop.core.errors import CapacityError

try:
    import fcntl
except ImportError:  # not a POSIX system: the atomic rename alone keeps concurrent packing correct
    fcntl = None  # type: ignore[assignment]

MAGIC = b"STROPPAK"
VERSION = 1
PAGE_BYTES = 4096
LINE_BYTES = 64
KEEP_UNUSED_S = 14 * 24 * 3600
_PREAMBLE = struct.Struct("<8sIIQQ32s")  # magic, version, zero, header start, header length, header SHA-256
_DTYPES = {
    **{name: np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")},
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """`$STROP_CACHE`, else `strop` in the user's cache directory (`$XDG_CACHE_HOME`, `~/.cache`). Not created here."""
    if chosen := os.environ.get("STROP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "strop"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One array in a pack."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PackWriter:
    """Builds one pack. Disk space is claimed before it is written, so a full disk is an error and never a crash."""

    def __init__(self, file_descriptor: int, directory: Path, expected_bytes: int = 0) -> None:
        self._fd, self._directory = file_descriptor, directory
        self._entries: dict[str, _Entry] = {}
        self._end = PAGE_BYTES
        self._allocated = 0
        self._expected_bytes = expected_bytes
        self._allocate(PAGE_BYTES + expected_bytes)

    def add(self, name: str, array: np.ndarray) -> None:
        """Copies an array in. Raises CapacityError when the disk is full."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        entry = self._append(name, array.shape, array.dtype)
        data, written = array.reshape(-1).view(np.uint8).data, 0
        while written < len(data):
            with self._disk_full_is_named(len(data)):
                written += os.pwrite(self._fd, data[written:], entry.offset + written)

    def reserve(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A writable zeroed array in the pack, to be filled before `build` returns. Drop it early to bound memory."""
        entry = self._append(name, shape, np.dtype(dtype))
        if entry.num_bytes == 0:
            return np.empty(entry.shape, entry.dtype)
        start = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        lead = entry.offset - start
        mapped = _in_huge_pages(mmap.mmap(self._fd, lead + entry.num_bytes, offset=start))
        flat: np.ndarray = np.frombuffer(mapped, np.uint8, entry.num_bytes, lead)
        return flat.view(entry.dtype).reshape(entry.shape)

    def finish(self, key: str) -> None:
        """Writes the header, after every array has been added."""
        header = json.dumps(
            {
                "key": key,
                "tensors": {
                    name: {"dtype": entry.dtype.name, "shape": entry.shape, "offset": entry.offset}
                    for name, entry in self._entries.items()
                },
            }
        ).encode()
        start = _round_up(self._end, LINE_BYTES)
        self._allocate(start + len(header))
        preamble = _PREAMBLE.pack(MAGIC, VERSION, 0, start, len(header), hashlib.sha256(header).digest())
        with self._disk_full_is_named(len(header)):
            os.pwrite(self._fd, header, start)
            os.ftruncate(self._fd, start + len(header))
            os.pwrite(self._fd, preamble, 0)

    def _append(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Entry:
        if name in self._entries:
            raise ValueError(f"{name!r} is in the pack already")
        if _DTYPES.get(dtype.name) != dtype:
            raise ValueError(f"{name!r} has dtype {dtype}; a pack holds {', '.join(_DTYPES)}")
        num_bytes = math.prod(shape) * dtype.itemsize
        alignment = PAGE_BYTES if num_bytes >= PAGE_BYTES else LINE_BYTES
        entry = _Entry(dtype, tuple(int(dim) for dim in shape), _round_up(self._end, alignment))
        self._allocate(entry.offset + num_bytes)
        self._entries[name] = entry
        self._end = entry.offset + num_bytes
        return entry

    def _allocate(self, end: int) -> None:
        if end > self._allocated:
            with self._disk_full_is_named(max(end, self._expected_bytes) - self._allocated):
                _allocate(self._fd, self._allocated, end - self._allocated)
            self._allocated = end

    @contextlib.contextmanager
    def _disk_full_is_named(self, needed_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            free_bytes = shutil.disk_usage(self._directory).free
            raise CapacityError(
                f"packing the weights needs {needed_bytes} more bytes in {self._directory} ({free_bytes} free,"
                f" {os.strerror(error.errno)}): make room, or set STROP_CACHE to a directory on a larger disk"
            ) from error


class PackFile:
    """A finished pack, mapped read-only: `pack[name]` is a 64-byte aligned view, no copy, that keeps the map alive."""

    def __init__(self, file_descriptor: int, key: str | None) -> None:
        """Raises ValueError when the file is not a whole, undamaged pack for `key`; None takes any."""
        size = os.fstat(file_descriptor).st_size
        if size < PAGE_BYTES:
            raise ValueError(f"{size} bytes are too few")
        self._map = _in_huge_pages(mmap.mmap(file_descriptor, size, access=mmap.ACCESS_READ))
        magic, version, _, start, length, digest = _PREAMBLE.unpack_from(self._map)
        if magic != MAGIC or version != VERSION:
            raise ValueError(f"begins with {magic!r} version {version}, not {MAGIC!r} version {VERSION}")
        if start + length != size:
            raise ValueError(f"has {size} bytes, not {start + length}")
        header = self._map[start:]
        if hashlib.sha256(header).digest() != digest:
            raise ValueError("its header does not match its checksum")
        content = json.loads(header)
        self.key = str(content["key"])
        if key not in (None, self.key):
            raise ValueError(f"was made for {content['key']!r}, not {key!r}")
        self._entries = {
            name: _Entry(_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["offset"])
            for name, entry in content["tensors"].items()
        }
        for entry in self._entries.values():
            if min(entry.shape, default=0) < 0 or not PAGE_BYTES <= entry.offset <= start - entry.num_bytes:
                raise ValueError("lists an array outside the file")
        self.num_bytes = size
        """Size of the whole pack."""

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        flat: np.ndarray = np.frombuffer(self._map, np.uint8, entry.num_bytes, entry.offset)
        return flat.view(entry.dtype).reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class PackCache:
    """A directory of packs, shared by any number of processes."""

    def __init__(self, directory: str | Path | None = None) -> None:
        """`directory=None` means `cache_directory()` / "packs"."""
        self.directory = Path(directory) if directory is not None else cache_directory() / "packs"

    def open_or_build(self, key: str, build: Callable[[PackWriter], None], *, expected_bytes: int = 0) -> PackFile:
        """The pack for `key`, built first if it is absent or damaged.

        `key` must name all that the packed bytes depend on (source hash, layout version, instruction set). Processes
        that ask for the same key at once build it once. `expected_bytes` (optional) claims that much disk at the start,
        so that a disk too small fails before any work. A directory that cannot be written costs packing at every start:
        the pack is then built in anonymous memory, with a logged warning. Raises CapacityError when the disk is full,
        and whatever `build` raises; nothing is left behind then.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        path = self.directory / f"{name}.pack"
        if pack := _open_pack(path, key):
            return pack
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(self.directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            return self._without_directory(key, build, expected_bytes, error)
        try:
            _lock(lock_fd, path)
            if pack := _open_pack(path, key):  # another process has just built it
                return pack
            self._remove_orphans(name)
            self._remove_unused()
            return self._build_file(path, key, build, expected_bytes)
        finally:
            os.close(lock_fd)  # releases the lock

    def _build_file(self, path: Path, key: str, build: Callable[[PackWriter], None], expected_bytes: int) -> PackFile:
        try:
            part_fd, part = tempfile.mkstemp(suffix=".part", prefix=f"{path.stem}.", dir=self.directory)
        except OSError as error:
            return self._without_directory(key, build, expected_bytes, error)
        try:
            writer = PackWriter(part_fd, self.directory, expected_bytes)
            build(writer)
            writer.finish(key)
            os.fsync(part_fd)
            pack = PackFile(part_fd, key)
            os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        finally:
            os.close(part_fd)
        return pack

    def _without_directory(
        self, key: str, build: Callable[[PackWriter], None], expected_bytes: int, cause: OSError
    ) -> PackFile:
        if cause.errno in _DISK_FULL:
            raise CapacityError(
                f"the cache directory {self.directory} is full ({cause.strerror}): make room, or set STROP_CACHE to a"
                " directory on a larger disk"
            ) from cause
        log.warning(
            "cannot write to the cache directory %s (%s): packing in memory, at every start; set STROP_CACHE to a"
            " directory you can write to",
            self.directory,
            cause.strerror,
        )
        with _anonymous_file() as memory_fd:
            writer = PackWriter(memory_fd, Path(tempfile.gettempdir()), expected_bytes)
            build(writer)
            writer.finish(key)
            return PackFile(memory_fd, key)

    def _remove_orphans(self, own_name: str) -> None:
        """Deletes what killed processes left. A part file is an orphan when the lock of its pack can be had."""
        for part in self.directory.glob("*.part"):
            name = part.name.split(".")[0]
            with contextlib.suppress(OSError):
                if name == own_name:
                    part.unlink()
                elif fcntl is not None:
                    lock_fd = os.open(self.directory / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                    try:
                        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        part.unlink()
                    finally:
                        os.close(lock_fd)

    def _remove_unused(self) -> None:
        """Makes room. A process that has a pack mapped keeps what it sees."""
        oldest_s = time.time() - KEEP_UNUSED_S
        for path in self.directory.glob("*.pack"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest_s:
                    path.unlink()
                    log.info("deleted %s: not used for %d days", path, KEEP_UNUSED_S // (24 * 3600))


def _open_pack(path: Path, key: str) -> PackFile | None:
    """The pack if it is there and whole; None (logged) if it must be built."""
    try:
        pack_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        pack = PackFile(pack_fd, key)
        with contextlib.suppress(OSError):  # somebody else's file
            os.utime(path)
        return pack
    except (ValueError, LookupError, TypeError, OSError) as error:
        log.warning("rebuilding the pack %s: it %s", path, error)
        return None
    finally:
        os.close(pack_fd)


def _lock(lock_fd: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process that is packing %s", path)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks: the rename still keeps the pack whole
        log.warning("cannot lock %s (%s): two processes may pack the same weights at once", path, error.strerror)


def _allocate(file_descriptor: int, start: int, num_bytes: int) -> None:
    """Claims disk blocks, so that a later write through a map cannot fail (which would kill the process)."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file_descriptor, start, num_bytes)
            return
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
    zeros = bytes(1 << 20)
    while num_bytes:
        written = os.pwrite(file_descriptor, zeros[:num_bytes], start)
        start, num_bytes = start + written, num_bytes - written


def _in_huge_pages(mapped: mmap.mmap) -> mmap.mmap:
    """Asks for them: every token reads all weights, and some file systems grant them (ext4 of Linux 6.16)."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


@contextlib.contextmanager
def _anonymous_file() -> Iterator[int]:
    """A file with no name: in memory where the system can, else in the temporary directory."""
    if hasattr(os, "memfd_create"):
        memory_fd = os.memfd_create("strop-pack", os.MFD_CLOEXEC)
        try:
            yield memory_fd
        finally:
            os.close(memory_fd)
    else:
        with tempfile.TemporaryFile() as file:
            yield file.fileno()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
