"""Reads what `strop plan --out` writes."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from strop.core.config import EngineConfig
from strop.core.errors import FormatError, RequestError

MAX_FILE_BYTES = 1 << 20


def read_engine_settings(path: Path) -> dict[str, Any]:
    """The fields of EngineConfig that a plan sets.

    Raises:
        RequestError: the file cannot be read.
        FormatError: it is not a plan, or has a field or a value that EngineConfig has not.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RequestError(f"the plan {str(path)!r} cannot be read ({error.strerror}): check its path") from None
    try:
        found = json.loads(content) if len(content) <= MAX_FILE_BYTES else None
    except (ValueError, RecursionError):
        found = None
    settings = found.get("engine") if isinstance(found, dict) else None
    if not isinstance(settings, dict):
        raise FormatError(f"{path.name} is not a plan: make one with `strop plan MODEL --hardware NAME --out FILE`")
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    for name, value in settings.items():
        if name not in defaults or type(value) is not type(defaults[name]):
            raise FormatError(
                f"{path.name}: the engine's setting {name!r:.40}={value!r:.40} is not one of this Strop's: make the "
                "plan again"
            )
    return settings
