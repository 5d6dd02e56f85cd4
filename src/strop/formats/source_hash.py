"""A file's SHA-256, remembered, so that a second start need not read the whole file."""

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from strop.formats.pack_cache import cache_directory

SETTLING_NS = 3_000_000_000
"""A file touched more recently than this is hashed but not remembered: a further edit could keep its time stamp."""

log = logging.getLogger(__name__)


def file_hash(path: Path) -> str:
    """Hex SHA-256 of the whole file.

    The result is remembered beside the packs, under the file's real path, device, inode, size, modification time and
    change time (both in ns). Any write moves the change time, which no ordinary program can set back, so an edit in
    place is seen even if it keeps size and modification time.
    """
    real_path = path.resolve()
    with real_path.open("rb") as file:
        status = os.fstat(file.fileno())
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        identity = hashlib.sha256(repr((str(real_path), stamp)).encode()).hexdigest()
        memo = cache_directory() / "hashes" / identity[:32]
        try:
            remembered = memo.read_text("ascii")
            if len(remembered) == 64 and set(remembered) <= set("0123456789abcdef"):
                return remembered
        except (OSError, UnicodeDecodeError):
            pass
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - SETTLING_NS
        if settled and os.fstat(file.fileno()).st_ctime_ns == status.st_ctime_ns:
            _remember(memo, digest)
    return digest


def files_hash(paths: Iterable[Path]) -> str:
    """Hex SHA-256 over the names and contents of several files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        total.update(f"{path.name}\0{file_hash(path)}\n".encode())
    return total.hexdigest()


def _remember(memo: Path, digest: str) -> None:
    part = memo.with_name(f"{memo.name}.{os.getpid()}.tmp")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(digest, "ascii")
        part.replace(memo)
    except OSError as error:  # only costs the next start some time
        log.debug("cannot remember the hash of a model file in %s: %s", memo, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)
