"""Models on the Hugging Face Hub: `org/name`, `org/name@revision`, and `org/name:Q4_K_M` for one GGUF model of many."""

import errno
import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strop.core.errors import CapacityError, FormatError, StropError, UnsupportedError
from strop.formats.foreign import kind_of_config, kind_of_files
from strop.formats.gguf import set_name
from strop.formats.hf import read_json
from strop.formats.quantizers import refuse_unknown_quantizer

_HUB_ID = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?"
    r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?(?::(?P<type>[\w.-]{1,64}))?"
)
_MODEL_FILE = re.compile(
    r"[^/]+\.(json|jinja)|\d+_(Pooling|Normalize)/config\.json|tokenizer\.model|vocab\.txt|[^/]+\.safetensors", re.ASCII
)
_NOT_THE_MODEL = re.compile(r"consolidated.*\.safetensors|(.*/)?mmproj[^/]*\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubModel:
    """What a Hub id names."""

    repo: str
    """org/name."""
    revision: str | None
    """A branch, tag or commit; None means the main branch."""
    gguf_type: str | None
    """As the end of a GGUF file's name says it, such as Q4_K_M; None means the only one, or safetensors."""

    def __str__(self) -> str:
        return (
            self.repo
            + (f"@{self.revision}" if self.revision else "")
            + (f":{self.gguf_type}" if self.gguf_type else "")
        )


def parse_hub_id(model: str) -> HubModel | None:
    """None when the text cannot be a Hub id."""
    match = _HUB_ID.fullmatch(model)
    if match is None or match["repo"].endswith((".gguf", ".safetensors")):
        return None
    return HubModel(match["repo"], match["revision"], match["type"])


def fetch(model: HubModel) -> Path:
    """The local folder, or first GGUF file, of a model; what is not in the Hub's cache is downloaded, and no pickles.

    Where the Hub cannot be reached (or `HF_HUB_OFFLINE` is set), what the cache has is used. `HF_HOME`, `HF_TOKEN` and
    `HF_ENDPOINT` apply.

    Raises FormatError when the model cannot be had, UnsupportedError for repositories without a model that Strop reads
    or without huggingface_hub, CapacityError when the disk is full.
    """
    try:
        import huggingface_hub  # only here: it is slow to import, and files need it not
    except ImportError as error:
        raise UnsupportedError(
            f"{str(model)!r} is not a local path, and fetching it from the Hugging Face Hub needs huggingface_hub:"
            " `pip install huggingface_hub`"
        ) from error
    try:
        info = huggingface_hub.HfApi().model_info(model.repo, revision=model.revision)
    except Exception as error:  # the library passes on those of whichever HTTP client it uses
        folder = _cached_folder(huggingface_hub, model)
        if folder is None:
            raise _explain(error, model) from error
        cached = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return _start_of(folder, choose_files(cached, model, where=f"{model.repo} in the Hub's cache, offline,"))
    wanted = choose_files([file.rfilename for file in info.siblings or ()], model, where=model.repo)
    if "config.json" in wanted:
        _refuse_before_the_weights_come(
            read_json(_download(huggingface_hub, model, ["config.json"]) / "config.json"), model
        )
    return _start_of(_download(huggingface_hub, model, wanted), wanted)


def _download(huggingface_hub: Any, model: HubModel, names: list[str]) -> Path:
    patterns = [glob.escape(name) for name in names]
    try:
        return Path(huggingface_hub.snapshot_download(model.repo, revision=model.revision, allow_patterns=patterns))
    except Exception as error:
        raise _explain(error, model) from error


def _refuse_before_the_weights_come(config: dict[str, Any], model: HubModel) -> None:
    if config.get("is_encoder_decoder") is True:
        raise UnsupportedError(f"{model.repo} holds {kind_of_config(config)}")
    refuse_unknown_quantizer(config, model.repo)


def _cached_folder(huggingface_hub: Any, model: HubModel) -> Path | None:
    """Where the cache keeps what it has of this revision."""
    try:  # asks for no file, so that a partly downloaded snapshot is found too
        folder = huggingface_hub.snapshot_download(
            model.repo, revision=model.revision, allow_patterns=["-"], local_files_only=True
        )
    except (OSError, ValueError):
        return None
    return Path(folder)


def _start_of(folder: Path, wanted: list[str]) -> Path:
    return folder / wanted[0] if wanted[0].endswith(".gguf") else folder


def choose_files(names: Iterable[str], model: HubModel, where: str) -> list[str]:
    """The files of a repository that the model needs: a folder's, or the parts of one GGUF model in order.

    Raises UnsupportedError naming what there is instead, and what to do.
    """
    names = [name for name in sorted(names) if not _NOT_THE_MODEL.fullmatch(name)]
    files = [name for name in names if _MODEL_FILE.fullmatch(name)]
    if model.gguf_type is None and "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return files
    sets: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".gguf"):
            sets.setdefault(set_name(Path(name)), []).append(name)
    if not sets and model.gguf_type is not None and files:
        raise UnsupportedError(f"{where} holds no GGUF files: pass {model.repo} without ':{model.gguf_type}'")
    if not sets:
        kind = kind_of_files(names) or "neither safetensors nor GGUF files with a config.json: pass another repository"
        raise UnsupportedError(f"{where} holds {kind}")
    if model.gguf_type is not None:
        end = re.compile(rf"(.*[-._])?{re.escape(model.gguf_type)}(-\*-of-\d+)?\.gguf", re.IGNORECASE)
        sets_of_type = {name: parts for name, parts in sets.items() if end.fullmatch(name)}
    else:
        sets_of_type = sets
    if len(sets_of_type) == 1:
        return next(iter(sets_of_type.values()))
    found = ", ".join(sorted(sets_of_type or sets))
    asked = f"{len(sets_of_type) or 'no'} GGUF models" + (f" of type {model.gguf_type!r}" if model.gguf_type else "")
    raise UnsupportedError(
        f"{where} holds {asked}; pass {model.repo}:TYPE with the TYPE that ends one of these names, such as Q4_K_M:"
        f" {found}"
    )


def _explain(error: Exception, model: HubModel) -> StropError:
    """The error for people."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            cache = Path(constants.HF_HUB_CACHE)
            free_bytes = shutil.disk_usage(cache if cache.exists() else Path.home()).free
            return CapacityError(
                f"{str(model)!r}: the disk is full ({free_bytes} bytes free at {cache}): make room, or set HF_HOME to a"
                " place with more; the download goes on where it stopped"
            )
        if isinstance(cause, GatedRepoError):
            return FormatError(
                f"{model.repo!r} is gated: accept its terms at {constants.ENDPOINT}/{model.repo} and log in with"
                " `hf auth login` (or set HF_TOKEN)"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return FormatError(
                f"{model.repo!r} is neither a local path nor a model on the Hugging Face Hub that you may see: check"
                " the spelling, or log in with `hf auth login` if it is private"
            )
        if isinstance(cause, RevisionNotFoundError):
            return FormatError(
                f"{model.repo!r} has no revision {model.revision!r}: a branch, tag or commit that is listed at"
                f" {constants.ENDPOINT}/{model.repo}/commits/main"
            )
    offline = any(isinstance(cause, OfflineModeIsEnabled) for cause in causes) or os.environ.get("HF_HUB_OFFLINE")
    why = "HF_HUB_OFFLINE is set" if offline else str(causes[-1]).strip().partition("\n")[0] or type(error).__name__
    part = "not wholly" if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) else "not"
    return FormatError(
        f"{str(model)!r} is no local path, {part} in the Hub's cache ({constants.HF_HUB_CACHE}), and the Hugging Face"
        f" Hub cannot be reached ({why}): run this once with a network, or pass a local folder or file"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
