"""What the caches hold: packed weights, and snapshots of the Hugging Face Hub. Listed, and removed one by one."""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from strop.core.errors import RequestError, StropError
from strop.formats.pack_cache import PackCache, PackFile

_HUB_SNAPSHOT = re.compile(r"/models--([^/]+)--([^/]+)/(?:snapshots|blobs)/")
_MIN_PREFIX_LEN = 2


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One thing that can be removed."""

    kind: Literal["packed", "hub"]
    name: str
    """Of the model: a Hub id, else the file's or folder's name."""
    source: str
    """Where it was made from: a path, or the Hub's revision names."""
    hash: str
    """SHA-256 of a pack's source, commit of a Hub snapshot; "" for a damaged pack."""
    id: str
    """Unique: the pack's file name, or the commit."""
    num_bytes: int
    last_used_s: float
    """Seconds since 1970."""
    path: Path

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"path": str(self.path)}


def cached_models(pack_directory: Path | None = None, hub_directory: Path | None = None) -> list[CachedModel]:
    """Everything in both caches, the last used first. None means the directories that loading uses."""
    directory = pack_directory or PackCache().directory
    packs = [_pack(path) for path in directory.glob("*.pack") if path.is_file()]
    return sorted([*packs, *_snapshots(hub_directory)], key=lambda model: -model.last_used_s)


def _pack(path: Path) -> CachedModel:
    status = path.stat()
    key, source = "", "damaged: the next start makes it again"
    try:
        with path.open("rb") as file:
            pack = PackFile(file.fileno(), None)
        key = pack.key
        source = str(json.loads(bytes(pack["manifest"])).get("source", "unknown: packed by an older version"))
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        pass  # listed all the same, so that it can be removed
    name = _name_of(source) if source.startswith("/") else path.stem
    source_hash = key.partition("-")[0]
    return CachedModel("packed", name, source, source_hash, path.stem, status.st_size, status.st_mtime, path)


def _name_of(source: str) -> str:
    found = _HUB_SNAPSHOT.search(source)
    return f"{found[1]}/{found[2]}" if found else Path(source).name


def _scan(hub_directory: Path | None) -> Any:
    """The Hub cache's own listing; None when there is none."""
    try:
        from huggingface_hub import CacheNotFound, scan_cache_dir
    except ImportError:
        return None
    try:
        return scan_cache_dir(hub_directory)
    except (CacheNotFound, OSError, ValueError):  # ValueError: the path is a file
        return None


def _hub_root(hub_directory: Path | None) -> Path:
    from huggingface_hub import constants

    return Path(hub_directory or constants.HF_HUB_CACHE).expanduser().resolve()


def _snapshots(hub_directory: Path | None) -> Iterable[CachedModel]:
    scanned = _scan(hub_directory)
    if scanned is None:
        return
    for repo in scanned.repos:
        if repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            used_s = max((file.blob_last_accessed for file in revision.files), default=revision.last_modified)
            source = ", ".join(sorted(revision.refs)) or "no branch"
            commit = revision.commit_hash
            yield CachedModel(
                "hub", repo.repo_id, source, commit, commit, revision.size_on_disk, used_s, revision.snapshot_path
            )


def choose(models: Sequence[CachedModel], names: Sequence[str]) -> list[CachedModel]:
    """What each name stands for: all models of exactly this name or hash, else the one that begins with it.

    Raises:
        RequestError: a prefix is too short, fits nothing, or fits several.
    """
    chosen: dict[tuple[str, str], CachedModel] = {}
    for name in names:
        found = [model for model in models if name in _handles(model)]
        if not found:
            found = [_only(name, [m for m in models if any(handle.startswith(name) for handle in _handles(m))])]
        chosen |= {(model.kind, model.id): model for model in found}
    return list(chosen.values())


def _handles(model: CachedModel) -> tuple[str, ...]:
    return tuple(handle for handle in (model.name, model.hash, model.id) if handle)


def _only(prefix: str, found: list[CachedModel]) -> CachedModel:
    if len(prefix) < _MIN_PREFIX_LEN:
        raise RequestError(f"{prefix!r} is too short: give {_MIN_PREFIX_LEN} or more characters of a name or hash")
    if not found:
        raise RequestError(f"{prefix!r} is not cached: `strop models` lists what is")
    if len(found) > 1:
        several = ", ".join(f"{model.name} ({model.kind}, {(model.hash or model.id)[:12]})" for model in found)
        raise RequestError(f"{prefix!r} fits {len(found)} models: {several}; give the whole name or hash")
    return found[0]


@dataclass(frozen=True, slots=True)
class Removal:
    """What became of one model."""

    model: CachedModel
    freed_bytes: int
    note: str = ""
    """Why nothing was freed, or when it will be."""


def remove(model: CachedModel, pack_directory: Path | None = None, hub_directory: Path | None = None) -> Removal:
    """Deletes one model from its cache, and nothing outside it.

    Raises:
        StropError: it cannot be deleted, or would take a file outside the cache with it.
    """
    try:
        if model.kind == "packed":
            return _remove_pack(model, pack_directory or PackCache().directory)
        return _remove_snapshot(model, hub_directory)
    except OSError as error:
        raise StropError(f"{model.path}: cannot be deleted ({error.strerror}): check its permissions") from error


def _remove_pack(model: CachedModel, directory: Path) -> Removal:
    path = directory / f"{model.id}.pack"
    lock_fd = os.open(directory / f"{model.id}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        users = _users([path])
        path.unlink(missing_ok=True)  # who has it mapped keeps what it sees
    except BlockingIOError:
        return Removal(model, 0, "another process is packing it: try again when it has ended")
    finally:
        os.close(lock_fd)
    note = f"its space is free when the processes that use it end: {_some(users)}" if users else ""
    return Removal(model, model.num_bytes, note)


def _users(paths: Iterable[Path]) -> list[int]:
    """Processes that have one of these files, or one below these folders, open or mapped, as far as we may see."""
    wanted = {str(path.resolve()) for path in paths}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mapped = [
                line.split(maxsplit=5)[5:] for line in (process / "maps").read_text(errors="replace").splitlines()
            ]
            opened = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # another user's, or it has just ended
            continue
        names = {*opened, *(name for (name,) in filter(None, mapped))}
        if any(not wanted.isdisjoint((name, *map(str, Path(name).parents))) for name in names if name.startswith("/")):
            found.append(int(process.name))
    return sorted(found)


def _some(process_ids: list[int]) -> str:
    return ", ".join(map(str, process_ids[:5])) + ", ..." * (len(process_ids) > 5)


def _remove_snapshot(model: CachedModel, hub_directory: Path | None) -> Removal:
    scanned = _scan(hub_directory)
    if scanned is None:
        return Removal(model, 0, "gone already")
    repos = frozenset(repo for repo in scanned.repos if repo.repo_type == "model" and repo.repo_id == model.name)
    strategy = replace(scanned, repos=repos).delete_revisions(model.id)
    root = _hub_root(hub_directory)
    doomed = [*strategy.repos, *strategy.snapshots, *strategy.blobs, *strategy.refs]
    for path in doomed:
        if not path.resolve().is_relative_to(root):
            raise StropError(
                f"{model.name}: {path.resolve()} lies outside the Hub's cache {root} and will not be deleted: remove"
                " the link to it first"
            )
    if users := _users(doomed):  # another program may be about to open the next of its files
        return Removal(model, 0, f"processes use it: {_some(users)}; try again when they have ended")
    strategy.execute()
    if left := [path for path in (*strategy.repos, *strategy.snapshots) if path.exists()]:
        raise StropError(f"{left[0]}: cannot be deleted: check its permissions")
    return Removal(model, strategy.expected_freed_size)
