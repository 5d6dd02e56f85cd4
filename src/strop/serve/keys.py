"""API keys: a file of names and SHA-256 hashes, read again whenever it changes.

A key is 32 random bytes that we make, so a plain hash keeps it as safe as a slow one would.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from strop.core.errors import RequestError

log = logging.getLogger(__name__)

_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<hash>[0-9a-f]{64})")


class KeyFile:
    """Who holds which key, and the salt that keeps their cached prefixes apart."""

    def __init__(self, path: Path) -> None:
        """Raises RequestError if the file cannot be read or a line is not as it should be."""
        self._path = path
        self._secret = secrets.token_bytes(32)
        self._names, self._version = _read(path), _version(path)

    def name_of(self, key: str) -> str | None:
        """Whose key it is; None if nobody's. A changed file counts at once, a damaged one not until it is mended."""
        version = _version(self._path)
        if version != self._version:
            self._version = version
            try:
                self._names = _read(self._path)
                log.info("%s: %d keys", self._path, len(self._names))
            except RequestError as error:
                log.error("%s; the keys read before stay valid", error)
        return self._names.get(_hash(key))

    def salt(self, name: str) -> bytes:
        """Same for all requests of a name, unknown to everybody, other after a restart."""
        return hmac.digest(self._secret, name.encode(), "sha256")


def new_key(path: Path, name: str) -> str:
    """Adds a fresh key of `name` to the file, made if need be, and returns it: it is not stored anywhere.

    Raises RequestError for a name that is taken or cannot be used.
    """
    key = f"sk-{secrets.token_urlsafe(32)}"
    line = f"{name} {_hash(key)}"
    if not _LINE.fullmatch(line):
        raise RequestError(f"name={name!r:.80}: give 1 to 64 letters, digits, '.', '_', '@' or '-'")
    if path.exists() and name in _read(path).values():
        raise RequestError(f"{path} has a key of {name!r} already: take another name, or delete its line first")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(handle, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _version(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> dict[str, str]:
    """Hash -> name."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"the key file {path} cannot be read ({error}): `strop keys {path} NAME` makes one"
        ) from None
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise RequestError(f"{path}, line {number}: a line is NAME HASH, as `strop keys {path} NAME` writes it")
        if found["name"] in names.values():
            raise RequestError(f"{path}, line {number}: {found['name']!r} is there twice: delete one of the lines")
        names[found["hash"]] = found["name"]
    return names
