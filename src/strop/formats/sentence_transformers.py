"""How a folder of sentence-transformers makes one vector of a text: `modules.json` and the files that it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from strop.core.config import MIB
from strop.core.errors import FormatError, UnsupportedError
from strop.formats.hf import read_json

PoolingKind = Literal["mean", "cls", "last", "max"]
"""Of a text's hidden states, those of special tokens among them: their mean, the first, the last, or the largest value
of each dimension."""

MAX_LISTING_BYTES = MIB
_KINDS: dict[str, PoolingKind] = {
    "mean": "mean", "mean_tokens": "mean",
    "cls": "cls", "cls_token": "cls",
    "lasttoken": "last",
    "max": "max", "max_tokens": "max",
}  # fmt: skip
"""By the names that newer and older versions of the library write."""
_LIMITS_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where the library looks for the limits of its Transformer module, in this order."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a text becomes a vector."""

    kind: PoolingKind
    normalize: bool = True
    """To length 1."""
    max_tokens: int | None = None
    """Longer texts are cut, special tokens included; None: no such limit."""
    prompt: str = ""
    """Put before every text."""
    lowercase: bool = False


def read_pooling(folder: Path) -> Pooling | None:
    """What sentence-transformers would do with the model in `folder`; None if it has no `modules.json`.

    Raises FormatError for damaged files, UnsupportedError for modules and modes other than a transformer, one of
    PoolingKind and a normalisation.
    """
    listing = folder / "modules.json"
    if not listing.is_file():
        return None
    modules = _modules(listing)
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise UnsupportedError(
            f"{listing}: has modules {', '.join(names) or 'none'}; accepted are Transformer, Pooling and perhaps"
            " Normalize, in this order: Strop would give other vectors"
        )
    (_, transformer), (_, pooling) = modules[:2]
    limits = next((found for name in _LIMITS_FILES if (found := _read_if_there(folder / transformer / name))), {})
    task = limits.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise UnsupportedError(f"{folder}: transformer_task={task!r:.80}; accepted is 'feature-extraction'")
    max_tokens = limits.get("max_seq_length") or _read_if_there(folder / "tokenizer_config.json").get(
        "model_max_length"
    )
    prompt = _default_prompt(folder / "config_sentence_transformers.json")
    return Pooling(
        _kind(folder / pooling / "config.json", has_prompt=bool(prompt)),
        normalize="Normalize" in names,
        max_tokens=None if max_tokens is None else _num_tokens(max_tokens, folder),
        prompt=prompt,
        lowercase=limits.get("do_lower_case") is True,
    )


def _modules(listing: Path) -> list[tuple[str, str]]:
    """The last name of each module's class, and where its files are below the model's folder."""
    if listing.stat().st_size > MAX_LISTING_BYTES:
        raise FormatError(f"{listing}: larger than {MAX_LISTING_BYTES} bytes; download the model again")
    try:
        entries = msgspec.json.decode(listing.read_bytes(), type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{listing}: not a list of modules ({error}); download the model again") from None
    modules = []
    for entry in entries:
        kind, path = entry.get("type"), entry.get("path")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise FormatError(f"{listing}: {entry!r:.80} has no type and path; download the model again")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise FormatError(f"{listing}: path {path!r:.80} leads out of the model's folder; download the model again")
        modules.append((kind.rpartition(".")[2], path))
    return modules


def _kind(path: Path, *, has_prompt: bool) -> PoolingKind:
    if not path.is_file():
        raise FormatError(f"{path}: missing; it says how hidden states are pooled: download the model again")
    config = read_json(path)
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    named = config.get("pooling_mode", [flag.removeprefix("pooling_mode_") for flag in flags])
    modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    if len(modes) != 1 or modes[0] not in _KINDS:
        raise UnsupportedError(f"{path}: pools by {modes!r:.200}; accepted is one of {', '.join(_KINDS)}")
    if has_prompt and config.get("include_prompt") is False:
        raise UnsupportedError(f"{path}: include_prompt=false with a default prompt: Strop pools over the prompt too")
    return _KINDS[modes[0]]


def _default_prompt(path: Path) -> str:
    settings = _read_if_there(path)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts")
    if name is None:
        return ""
    prompt = prompts.get(name) if isinstance(prompts, Mapping) else None
    if not isinstance(prompt, str):
        raise FormatError(f"{path}: default_prompt_name={name!r:.80} is not among its prompts; download it again")
    return prompt


def _num_tokens(value: Any, folder: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise FormatError(f"{folder}: max_seq_length={value!r:.80} must be a number of tokens, 1 or more")
    return int(min(value, 1 << 40))  # transformers writes 1e30 where it knows no limit


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
